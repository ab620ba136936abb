"""That the sheet of schedulers works; its figures are for people."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from benchmarks.machine import REPOSITORY


def test_the_sheet_has_a_cell_for_each_scheduler_and_count(tmp_path: Path) -> None:
    sheet, report = tmp_path / "sheet.webp", tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.sheets", "--prompts", "4", "--steps", "1", "4"]
    command += ["--schedulers", "lcm", "no LoRA: dpm-solver", "-o", str(sheet), "--json", str(report)]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120).stdout
    assert report.exists(), output
    cells = json.loads(report.read_text())["cells"]
    assert [(cell["scheduler"], cell["steps"]) for cell in cells] == [
        ("lcm", 1), ("lcm", 4), ("no LoRA: dpm-solver", 1), ("no LoRA: dpm-solver", 4),
    ]  # fmt: skip
    right = {(cell["scheduler"], cell["steps"]): cell["right"] for cell in cells}
    assert right["lcm", 4] >= 0.75
    assert all(cell["low"] <= cell["right"] <= cell["high"] for cell in cells)
    with Image.open(sheet) as picture:
        assert picture.height > 2 * 64


def test_the_shipped_sheet_is_light() -> None:
    sheet = REPOSITORY / "docs" / "images" / "schedulers.webp"
    assert sheet.stat().st_size <= 80 * 1024
