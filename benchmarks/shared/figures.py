"""The figures of a comparison: what one turn of a program gave, medians over the rounds, tables and verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Literal, TypeAlias

from benchmarks.shared.rounds import percentiles

FLOOR, CEILING = "diffusers", "diffusers in batches"
SERVICE, PLAIN, LITSERVE = "fewstep serve", "FastAPI + lock", "LitServe"
AIMED_AT_CLIENTS = 32
COLUMNS = (
    "program", "load", "images/s", "P50 ms", "P95 ms", "P99 ms", "goodput/s", "refused", "CPU ms/picture", "pictures",
)  # fmt: skip

WORDS = ("program", "load", "mode")  # columns of words; all others have numbers


class BenchmarkError(Exception):
    """A run whose figures would mean nothing."""


@dataclass(frozen=True)
class Load:
    """`size` pictures per call, or `size` clients in a closed loop, or an open loop at `size` percent of the service's
    capacity."""

    kind: Literal["calls", "clients", "percent"]
    size: int

    def __str__(self) -> str:
        names = {"calls": "per call", "clients": "client" if self.size == 1 else "clients", "percent": "%"}
        return f"{self.size} {names[self.kind]}"


@dataclass(frozen=True)
class Figures:
    """`goodput_per_s` counts the pictures that came within the deadline."""

    images_per_s: float
    goodput_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Turn:
    """One turn of one program, or the medians of several.

    `asked_per_s` is the rate of an open loop. `cpu_ms` is CPU time per picture by the role of the process,
    `clients_cpu_ms` that of the clients.
    """

    program: str
    load: Load
    asked_per_s: float | None
    num_pictures: int
    num_refused: int
    figures: Figures
    cpu_ms: Mapping[str, float]
    clients_cpu_ms: float

    @property
    def total_cpu_ms(self) -> float:
        return sum(self.cpu_ms.values())


@dataclass(frozen=True)
class Skipped:
    """A turn left out: the rate was so far above what the program can do that its queue would only have grown."""

    program: str
    load: Load


@dataclass(frozen=True)
class Verdict:
    """What the comparison is for, in a sentence. `is_met` is None where there is no aim."""

    text: str
    is_met: bool | None = None

    def __str__(self) -> str:
        return {True: "met: ", False: "missed: ", None: ""}[self.is_met] + self.text


Table: TypeAlias = dict[tuple[str, Load], Turn | None]
"""The medians, in the order of the turns; None for what was skipped in every round."""


def measure(latencies_ms: Sequence[float], images_per_s: float, seconds: float, deadline_s: float) -> Figures:
    if len(latencies_ms) < 2:
        raise BenchmarkError(f"only {len(latencies_ms)} pictures in {seconds:.0f} s: more --seconds are needed")
    num_good = sum(ms <= deadline_s * 1000 for ms in latencies_ms)
    return Figures(images_per_s, num_good / seconds, *percentiles(latencies_ms))


def take_medians(rounds: Sequence[Turn | Skipped]) -> Table:
    groups: dict[tuple[str, Load], list[Turn]] = {}
    for row in rounds:
        same = groups.setdefault((row.program, row.load), [])
        if isinstance(row, Turn):
            same.append(row)
    return {key: take_median(same) if same else None for key, same in groups.items()}


def take_median(same: Sequence[Turn]) -> Turn:
    """The median of each figure; pictures and refusals are added up."""
    asked = [turn.asked_per_s for turn in same if turn.asked_per_s is not None]
    columns = zip(*(astuple(turn.figures) for turn in same), strict=True)
    return Turn(
        same[0].program,
        same[0].load,
        statistics.median(asked) if asked else None,
        sum(turn.num_pictures for turn in same),
        sum(turn.num_refused for turn in same),
        Figures(*(statistics.median(column) for column in columns)),
        {role: statistics.median(turn.cpu_ms.get(role, 0.0) for turn in same) for role in same[0].cpu_ms},
        statistics.median(turn.clients_cpu_ms for turn in same),
    )


# Tables


def format_loops(table: Table, *, is_open: bool) -> str:
    rows = [(key, turn) for key, turn in table.items() if (key[1].kind == "percent") == is_open]
    dashes = ["-"] * (len(COLUMNS) - 2)
    return format_table(
        COLUMNS, (row_of(turn) if turn else [program, str(load), *dashes] for (program, load), turn in rows)
    )


def row_of(turn: Turn) -> list[str]:
    figures = turn.figures
    numbers = (figures.images_per_s, figures.p50_ms, figures.p95_ms, figures.p99_ms, figures.goodput_per_s)
    cells = [turn.program, describe_load(turn), *(f"{number:.1f}" for number in numbers)]
    return [*cells, str(turn.num_refused), f"{turn.total_cpu_ms:.1f}", str(turn.num_pictures)]


def describe_load(turn: Turn) -> str:
    return f"{turn.load}" if turn.asked_per_s is None else f"{turn.load}: {turn.asked_per_s:.1f}/s"


def format_cpu(table: Table) -> str:
    """Where the service's CPU time per picture goes."""
    turns = [turn for turn in table.values() if turn and turn.program == SERVICE]
    roles = list(turns[0].cpu_ms)
    rows = ([*(turn.cpu_ms.get(role, 0.0) for role in roles), turn.clients_cpu_ms] for turn in turns)
    cells = ([str(turn.load), *(f"{ms:.2f}" for ms in row)] for turn, row in zip(turns, rows, strict=True))
    return format_table(["CPU ms/picture at", *roles, "the clients"], cells)


def format_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [names, ["---" if name in WORDS else "---:" for name in names], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# Verdicts


def judge(table: Table) -> list[Verdict]:
    """The aims beside the figures."""
    turns = {key: turn for key, turn in table.items() if turn is not None}
    crowd = choose_crowd(turns)
    service = turns[SERVICE, crowd]
    rivals = [turn for turn in turns.values() if turn.load == crowd and turn is not service]
    ceiling = next(turn for turn in turns.values() if turn.program == CEILING)
    litserve = [turn for turn in rivals if turn.program.startswith(LITSERVE)]
    return [
        *judge_latency(turns),
        judge_speed(service, ceiling, 0.85),
        judge_speed(service, max(litserve, key=lambda turn: turn.figures.images_per_s), 1.3),
        judge_speed(service, turns[PLAIN, crowd], 4.0),
        judge_p95(service, rivals),
        *describe_cpu(service, ceiling),
        *describe_goodput(table),
    ]


def choose_crowd(turns: Mapping[tuple[str, Load], Turn]) -> Load:
    """The number of clients that the aims name, else the largest."""
    sizes = [load.size for program, load in turns if program == SERVICE and load.kind == "clients"]
    return Load("clients", AIMED_AT_CLIENTS if AIMED_AT_CLIENTS in sizes else max(sizes))


def judge_latency(turns: Mapping[tuple[str, Load], Turn]) -> Iterator[Verdict]:
    alone = turns.get((SERVICE, Load("clients", 1)))
    if alone is not None:
        ratio = alone.figures.p50_ms / turns[FLOOR, Load("calls", 1)].figures.p50_ms
        yield Verdict(f"1 client: {ratio:.2f} times diffusers' P50 (aim: at most 1.10)", ratio <= 1.10)


def judge_speed(service: Turn, other: Turn, aim: float) -> Verdict:
    ratio = service.figures.images_per_s / other.figures.images_per_s
    text = f"{service.load}: {ratio:.2f} times the images/s of {other.program}, {other.load} (aim: at least {aim})"
    return Verdict(text, ratio >= aim)


def judge_p95(service: Turn, rivals: Sequence[Turn]) -> Verdict:
    others = ", ".join(f"{turn.figures.p95_ms:.0f} ({turn.program})" for turn in rivals)
    text = f"{service.load}: P95 {service.figures.p95_ms:.0f} ms against {others} (aim: below all)"
    return Verdict(text, all(service.figures.p95_ms < turn.figures.p95_ms for turn in rivals))


def describe_cpu(service: Turn, ceiling: Turn) -> Iterator[Verdict]:
    """The model's part of a picture can't be seen from outside: it is taken to be what the offline loop needs."""
    total, model = service.total_cpu_ms, ceiling.total_cpu_ms
    beside = total - service.cpu_ms.get("worker", 0.0)
    yield Verdict(
        f"{service.load}: {total - model:.2f} CPU ms/picture that are not the model's "
        f"({total:.2f} less {model:.2f} of {ceiling.program}); outside the worker {beside:.2f}"
    )


def describe_goodput(table: Table) -> Iterator[Verdict]:
    for load in dict.fromkeys(load for _, load in table if load.kind != "calls"):
        row = {program: turn for (program, other), turn in table.items() if other == load}
        goodputs = (
            f"{turn.figures.goodput_per_s:.1f} ({name})" if turn else f"- ({name})" for name, turn in row.items()
        )
        name = next((describe_load(turn) for turn in row.values() if turn), str(load))
        yield Verdict(f"{name}: goodput/s {', '.join(goodputs)}")
