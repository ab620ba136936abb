"""That the table of all models works, on narrow twins; its figures are for people."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODELS = ["cm-imagenet64", "sd15-lcm"]  # one of classes, and one of words with a LoRA


@pytest.mark.timeout(300)
def test_each_model_is_served_and_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.models", "--small", "--pictures", "3", "--json", str(path)]
    command += ["--models", *MODELS]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280).stdout
    assert path.exists(), output
    report = json.loads(path.read_text())
    assert report["skipped"] == []
    assert [row["model"] for row in report["models"]] == MODELS
    for row in report["models"]:
        assert all(value > 0 for value in row.values() if isinstance(value, int | float)), row
