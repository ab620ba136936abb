"""That the benchmark of the gateway works; its figures are for people."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gateway.__main__ import QUICK
from benchmarks.gateway.clients import FORMS


def test_the_quick_run_has_all_figures(tmp_path: Path) -> None:
    report_path = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.gateway", "--quick", "--json", str(report_path)]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=150).stdout
    assert report_path.exists(), output
    report = json.loads(report_path.read_text())
    assert [row["form"] for row in report["costs"]] == list(FORMS)
    assert all(row["requests_per_s"] > 0 and row["gateway_ms"] > 0 for row in report["costs"])
    loads = [(form, load) for form in FORMS for load in (None, *QUICK.percents)]
    assert [(row["form"], row["percent"]) for row in report["latencies"]] == loads
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in report["latencies"])
    assert {row["script"] for row in report["scripts"]} == {"submit", "take", "finish"}
    assert [row["sockets"] for row in report["idle"]] == list(QUICK.idle)
    [live] = report["live"]
    assert live["finals"] + live["superseded"] == live["prompts"] > 0
    assert live["errors"] == 0
    assert output.count("met: ") + output.count("missed: ") == len(report["verdicts"])
