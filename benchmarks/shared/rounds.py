"""Figures of several rounds: percentiles within one, medians over all."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """P50, P95, P99."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[94], cuts[98]


def take_medians(rows: Sequence[Any], *keys: str) -> list[Any]:
    """One dataclass per value of the fields `keys`: the medians of all others, but for those that some round lacks."""
    groups: dict[tuple[object, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, key) for key in keys), []).append(row)
    return [_take_median(group, keys) for group in groups.values()]


def _take_median(group: Sequence[Any], keys: Sequence[str]) -> Any:
    names = [field.name for field in fields(group[0]) if field.name not in keys]
    columns = {name: [getattr(row, name) for row in group] for name in names}
    medians = {name: statistics.median(column) for name, column in columns.items() if None not in column}
    return replace(group[0], **medians)
