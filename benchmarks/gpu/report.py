"""The tables, row by row, and what gathers them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.device import free_memory, wait_for
from benchmarks.shared.report import print_table, write_report
from models.networks import first_line
from workers.engine.calibration import WarmUpError


@dataclass(frozen=True)
class ParameterRow:
    architecture: str
    network: str
    millions: float
    gib: float


@dataclass(frozen=True)
class SubjectRow:
    """What tables about one architecture, at one size, in one mode begin with."""

    architecture: str
    size: str
    mode: str


@dataclass(frozen=True)
class PartRow(SubjectRow):
    """One call of one part, waited for.

    `roofline_ms` is what all its FLOPs, or all its bytes, take at the device's best. `floor_ms` adds that up operation
    by operation, none of them under the shortest kernel's time; torch.compile makes fewer of them. `kernels` are those
    that the device ran.
    """

    batch: int
    part: str
    ms: float
    tflop: float
    tflop_per_s: float
    roofline_ms: float
    floor_ms: float
    times_floor: float
    kernels: int | None


@dataclass(frozen=True)
class WarmUpRow(SubjectRow):
    """What the service's own warm-up measured, which admission goes by, beside the part measured alone."""

    batch: int
    step_ms: float
    decode_ms: float
    preview_ms: float
    text_ms: float
    max_rows: int


@dataclass(frozen=True)
class LatencyRow(SubjectRow):
    """One picture of a new prompt, from the engine's `add` to the bytes of its JPEG."""

    decoder: str
    steps: int
    total_ms: float
    slowest_ms: float
    jpeg_ms: float
    jpeg_kib: float


@dataclass(frozen=True)
class ThroughputRow(SubjectRow):
    """Pictures of new prompts in full batches, JPEGs included. Memory is the highest since the row's start."""

    batch: int
    steps: int
    images_per_s: float
    allocated_gib: float
    reserved_gib: float


@dataclass(frozen=True)
class CaptureRow(SubjectRow):
    """Graphs captured by the end of warm-up, and by the end of a run of varied requests."""

    network: str
    after_warm_up: int
    after_varied: int


@dataclass(frozen=True)
class AttentionRow:
    """One shape of attention in one part: how often, what torch chose for it, and what each backend takes for one."""

    architecture: str
    size: str
    part: str
    count: int
    query: str
    key: str
    causal: bool
    mask: bool
    chosen: str
    default_ms: float
    flash_ms: float | None
    efficient_ms: float | None
    cudnn_ms: float | None
    math_ms: float | None


@dataclass(frozen=True)
class SkippedRow:
    what: str
    why: str


TABLES = {
    kind.__name__.removesuffix("Row"): kind
    for kind in (
        ParameterRow, PartRow, WarmUpRow, LatencyRow, ThroughputRow, CaptureRow, AttentionRow, SkippedRow,
    )
}  # fmt: skip


class OutOfTime(Exception):
    """The budget is spent."""


class Report:
    """Rows of all tables as they come; what fails or finds no time left is a row too."""

    def __init__(self, device: torch.device, budget_s: float) -> None:
        self._device, self._budget_s = device, budget_s
        self._started_s = time.perf_counter()
        self._rows: list[Any] = []

    @property
    def passed_s(self) -> float:
        return time.perf_counter() - self._started_s

    def say(self, text: str) -> None:
        print(f"[{self.passed_s:4.0f} s] {text}", file=sys.stderr, flush=True)

    def check_time(self) -> None:
        """Raises OutOfTime once the budget is spent."""
        if self.passed_s > self._budget_s:
            raise OutOfTime

    @contextmanager
    def section(self, what: str) -> Iterator[None]:
        """Names what fails or is out of time, and goes on with the rest. A device that is lost ends the program."""
        free_memory(self._device)
        self.say(what)
        try:
            yield
        except OutOfTime:
            self.add(SkippedRow(what, "no time left"))
        except (RuntimeError, WarmUpError) as error:
            self.say(f"{what} failed: {error}")
            self.skip(what, error)

    def skip(self, what: str, error: Exception) -> None:
        self.add(SkippedRow(what, first_line(error)[:160].replace("|", "/")))
        wait_for(self._device)

    def add(self, *rows: Any) -> None:
        self._rows += rows

    def add_each(self, rows: Iterable[Any]) -> None:
        """As they come, so that those before a failure are kept."""
        for row in rows:
            self.add(row)

    def of(self, kind: type[Any]) -> list[Any]:
        return [row for row in self._rows if isinstance(row, kind)]

    def print(self, machine: Mapping[str, object]) -> None:
        print(json.dumps(machine, indent=2), end="\n\n")
        for name, kind in TABLES.items():
            if rows := self.of(kind):
                print(f"### {name}\n")
                print_table(rows)

    def write(self, path: Path, settings: Mapping[str, object], machine: Mapping[str, object]) -> None:
        tables = {name.lower(): self.of(kind) for name, kind in TABLES.items()}
        write_report(path, settings, tables, machine)
