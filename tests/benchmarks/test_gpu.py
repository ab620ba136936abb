"""That the benchmark of the real architectures works, on miniatures; its figures are for people."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SUBJECT = {"architecture": "sd15-lcm", "size": "64x64", "mode": "graphs"}


@pytest.mark.timeout(300)
def test_all_tables_have_rows(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--max-batch", "2"]
    command += ["--architectures", SUBJECT["architecture"], "--modes", SUBJECT["mode"], "--json", str(path)]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280).stdout
    assert path.exists(), output
    report = json.loads(path.read_text())
    assert report.pop("skipped") == []
    tables = {name: rows for name, rows in report.items() if name not in ("machine", "settings")}
    assert {name for name, rows in tables.items() if rows} == {
        "parameter", "part", "warmup", "latency", "throughput", "capture", "attention",
    }  # fmt: skip
    for rows in tables.values():
        assert all(row[key] == SUBJECT[key] for row in rows for key in SUBJECT.keys() & row.keys())
    assert {row["part"] for row in report["part"]} == {"text", "step", "full decode", "tiny decode"}
    assert {row["batch"] for row in report["throughput"]} == {1, 2}
    assert all(row["ms"] > 0 and row["floor_ms"] >= row["roofline_ms"] > 0 for row in report["part"])
