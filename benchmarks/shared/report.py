"""What every program here ends with: a table to read and a file to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.machine import describe_machine


def print_table(rows: Sequence[Any]) -> str:
    """Dataclasses of one kind, as Markdown; returns what was printed."""
    names = [field.name for field in fields(rows[0])]
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(format_cell(getattr(row, name)) for name in names) + " |" for row in rows]
    table = "\n".join(lines)
    print(table, end="\n\n", flush=True)
    return table


def write_between(path: Path, marks: tuple[str, str], table: str) -> None:
    """Replace what stands between two marks of a text."""
    before, _, rest = path.read_text(encoding="utf-8").partition(marks[0])
    _, _, after = rest.partition(marks[1])
    path.write_text("\n".join([before + marks[0], table, marks[1] + after]), encoding="utf-8")


def format_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)


def write_report(
    path: Path,
    settings: Mapping[str, object],
    figures: Mapping[str, Any],
    machine: Mapping[str, object] | None = None,
) -> None:
    """Machine, settings and figures (lists of dataclasses, or plain values) as JSON."""
    report = {
        "machine": machine or describe_machine(),
        "settings": {key: str(value) for key, value in settings.items()},
        **{name: _plain(value) for name, value in figures.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [asdict(row) if is_dataclass(row) and not isinstance(row, type) else row for row in value]
