"""What a turn gave, and which of the two is better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from benchmarks.process.clients import Load
from benchmarks.process.contenders import PROGRAMS, Program
from benchmarks.shared.figures import format_table

MIN_SIGMAS = 2.0  # a difference below so many standard errors is none


@dataclass(frozen=True)
class Turn:
    """One turn of one program, or the medians of several. `step_ms` is the engine's, `cpu_ms` per picture."""

    program: Program
    load: Load
    images_per_s: float
    p50_ms: float
    p95_ms: float
    step_ms: float
    cpu_ms: float
    previews_per_image: float


FIGURES = [figure.name for figure in fields(Turn)[2:]]
COLUMNS = ("load", "program", "images/s", "P50 ms", "P95 ms", "step ms", "CPU ms/picture", "previews/picture")


def format_turns(turns: Iterable[Turn]) -> str:
    rows = ([str(turn.load), turn.program, *(f"{getattr(turn, name):.1f}" for name in FIGURES)] for turn in turns)
    return format_table(COLUMNS, rows)


@dataclass(frozen=True)
class Ratio:
    """The process's images/s by the thread's; `error` is the standard error of its logarithm."""

    log: float
    error: float

    def __str__(self) -> str:
        return f"{math.exp(self.log):.3f} ± {math.exp(self.log) * self.error:.3f}"


def judge(rounds: Sequence[Turn]) -> str:
    """Which is better, by images/s. Each turn is held against the other program's of the same load and round."""
    thread, process = ([turn for turn in rounds if turn.program == program] for program in PROGRAMS)
    pairs = list(zip(thread, process, strict=True))
    loads = dict.fromkeys(turn.load for turn in thread)
    ratios = {load: compare([pair for pair in pairs if pair[0].load == load]) for load in loads}
    error = math.hypot(*(ratio.error for ratio in ratios.values())) / len(ratios)
    overall = Ratio(statistics.mean(ratio.log for ratio in ratios.values()), error)
    cpu = statistics.geometric_mean(theirs.cpu_ms / ours.cpu_ms for ours, theirs in pairs)
    by_load = ", ".join(f"{load}: {ratio}" for load, ratio in ratios.items())
    figures = f"{overall} times the thread's images/s ({by_load}) for {cpu:.2f} times its CPU time per picture"
    return f"Better: {name_better(overall)}. The process gives {figures}."


def compare(pairs: Sequence[tuple[Turn, Turn]]) -> Ratio:
    logs = [math.log(theirs.images_per_s / ours.images_per_s) for ours, theirs in pairs]
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    return Ratio(statistics.mean(logs), error)


def name_better(ratio: Ratio) -> str:
    if abs(ratio.log) <= MIN_SIGMAS * ratio.error:
        return "neither"
    return "process" if ratio.log > 0 else "thread"
