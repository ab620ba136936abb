"""What every program here ends with: a table to read and a file to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine


def print_table(rows: Sequence[Any]) -> None:
    """Dataclasses of one kind, as Markdown."""
    names = list(asdict(rows[0]))
    print("| " + " | ".join(names) + " |\n| " + " | ".join("---" for _ in names) + " |")
    for row in rows:
        print("| " + " | ".join(format_cell(value) for value in asdict(row).values()) + " |")
    print(flush=True)


def format_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)


def write_report(path: Path, settings: Mapping[str, object], figures: Mapping[str, Any]) -> None:
    """Machine, settings and figures (lists of dataclasses, or plain values) as JSON."""
    report = {
        "machine": describe_machine(),
        "settings": {key: str(value) for key, value in settings.items()},
        **{name: _plain(value) for name, value in figures.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [asdict(row) if is_dataclass(row) and not isinstance(row, type) else row for row in value]
