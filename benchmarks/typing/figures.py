"""What typists see, in figures: of one turn or as medians of several; tables and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.shared.figures import BenchmarkError, format_table
from benchmarks.shared.rounds import percentiles
from benchmarks.typing.service import Work
from benchmarks.typing.typists import Report, Turn

MAX_WASTED_SHARE, MIN_FINALS_PER_S = 0.10, 2.0  # the aims, for 20 typists at 5 keys a second


@dataclass(frozen=True)
class Figures:
    """One turn in figures, or the medians of several. Times are milliseconds from the key; rates are per typist.

    `first` is the first picture of a key, preview or final. `refined` counts from the last key before the pause, so the
    wait for the pause is in it. A screen is behind while it shows older words than the newest: `behind` is since when,
    `age` is how old the words are that it shows, in which a pause of the typist's own counts too.
    """

    mode: str
    typists: int
    keys_per_s: float
    typing_share: float
    first_p50_ms: float
    first_p95_ms: float
    final_p50_ms: float
    final_p95_ms: float
    refined_p50_ms: float | None
    refined_p95_ms: float | None
    finals_per_s: float
    slowest_finals_per_s: float
    typing_finals_per_s: float
    refined_per_s: float
    frames_per_s: float
    behind_share: float
    behind_p50_ms: float
    behind_p95_ms: float
    age_p50_ms: float
    age_p95_ms: float
    superseded: float
    superseded_share: float
    rows: float
    wasted_share: float
    cpu_percent: float


def summarise(turn: Turn, report: Report, work: Work) -> Figures:
    waits_and_screens = summarise_waits(turn, report) | summarise_screens(turn, report)
    window, diaries = report.window, report.diaries
    all_s = window.seconds * turn.typists
    typing_s = sum(diary.typing_s(window) for diary in diaries)
    keys = sum(diary.count_keys(window) for diary in diaries)
    superseded = sum(diary.count_superseded(window) for diary in diaries)
    finals, refined, previews = (
        [diary.count_pictures(window, type) for diary in diaries] for type in ("final", "refined", "preview")
    )
    return Figures(
        mode=turn.mode,
        typists=turn.typists,
        keys_per_s=keys / typing_s,
        typing_share=typing_s / all_s,
        finals_per_s=sum(finals) / all_s,
        slowest_finals_per_s=min(finals) / window.seconds,
        typing_finals_per_s=sum(finals) / typing_s,
        refined_per_s=sum(refined) / all_s,
        frames_per_s=sum(finals + refined + previews) / all_s,
        superseded=superseded,
        superseded_share=superseded / keys,
        rows=work.rows,
        wasted_share=work.stopped_rows / work.rows,
        cpu_percent=report.cpu_percent,
        **waits_and_screens,
    )


def summarise_waits(turn: Turn, report: Report) -> dict[str, Any]:
    def columns(name: str, *types: str) -> dict[str, float]:
        waits_ms = [ms for diary in report.diaries for ms in diary.waits_ms(report.window, *types)]
        return p50_and_p95(turn, name, waits_ms)

    refined = columns("refined", "refined") if turn.is_refined else {"refined_p50_ms": None, "refined_p95_ms": None}
    return columns("first", "preview", "final") | columns("final", "final") | refined


def summarise_screens(turn: Turn, report: Report) -> dict[str, Any]:
    moments = [moment for diary in report.diaries for moment in diary.watch_screen(report.window)]
    behind = [moment for moment in moments if moment.behind_ms]
    return {
        "behind_share": len(behind) / len(moments),
        **p50_and_p95(turn, "behind", [moment.behind_ms for moment in behind]),
        **p50_and_p95(turn, "age", [moment.age_ms for moment in behind]),
    }


def p50_and_p95(turn: Turn, name: str, values: Sequence[float]) -> dict[str, float]:
    """The two columns of Figures."""
    if len(values) < 2:
        raise BenchmarkError(
            f"{turn.mode} with {turn.typists} typists gave too few pictures: more --seconds are needed"
        )
    p50_ms, p95_ms, _ = percentiles(values)
    return {f"{name}_p50_ms": p50_ms, f"{name}_p95_ms": p95_ms}


def judge(table: Sequence[Figures], keys_per_second: float) -> list[str]:
    """What the benchmark is for, in a sentence each; the aims stand beside the figures."""
    most = max(row.typists for row in table)
    verdicts = []
    for row in (row for row in table if row.typists == most):
        who = f"{row.mode}, {most} typists at {keys_per_second:g} keys/s"
        rates = f"{row.finals_per_s:.2f} finals/s per typist, {row.slowest_finals_per_s:.2f} for the slowest"
        typing = f"typing {row.typing_share:.0%} of the time, {row.typing_finals_per_s:.2f} finals per second of that"
        verdicts += [
            f"{who}: {row.wasted_share:.1%} of the rows wasted (aim: at most {MAX_WASTED_SHARE:.0%})",
            f"{who}: {rates} (aim: at least {MIN_FINALS_PER_S:g}; {typing})",
        ]
    return verdicts


# Tables

Column = tuple[str, Callable[[Figures], str]]

WHO: list[Column] = [("mode", lambda row: row.mode), ("typists", lambda row: str(row.typists))]
PICTURES: list[Column] = [
    *WHO,
    ("first P50 / P95", lambda row: format_pair(row.first_p50_ms, row.first_p95_ms)),
    ("final P50 / P95", lambda row: format_pair(row.final_p50_ms, row.final_p95_ms)),
    ("refined P50 / P95", lambda row: format_pair(row.refined_p50_ms, row.refined_p95_ms)),
    ("finals/s", lambda row: f"{row.finals_per_s:.2f}"),
    ("of the slowest", lambda row: f"{row.slowest_finals_per_s:.2f}"),
    ("while typing", lambda row: f"{row.typing_finals_per_s:.2f}"),
    ("refined/s", lambda row: f"{row.refined_per_s:.2f}"),
    ("frames/s", lambda row: f"{row.frames_per_s:.1f}"),
]
SCREEN_AND_WORK: list[Column] = [
    *WHO,
    ("typing", lambda row: f"{row.typing_share:.0%}"),
    ("keys/s while typing", lambda row: f"{row.keys_per_s:.1f}"),
    ("behind", lambda row: f"{row.behind_share:.0%}"),
    ("behind for P50 / P95 ms", lambda row: format_pair(row.behind_p50_ms, row.behind_p95_ms)),
    ("age while behind P50 / P95 ms", lambda row: format_pair(row.age_p50_ms, row.age_p95_ms)),
    ("superseded", lambda row: f"{row.superseded:.0f} ({row.superseded_share:.0%})"),
    ("rows", lambda row: f"{row.rows:.0f}"),
    ("wasted", lambda row: f"{row.wasted_share:.1%}"),
    ("CPU", lambda row: f"{row.cpu_percent:.0f}%"),
]


def print_tables(rows: Sequence[Figures]) -> None:
    print("Pictures: milliseconds from the key, and numbers per second and typist\n")
    print(format_columns(PICTURES, rows))
    print("The screen and the work\n")
    print(format_columns(SCREEN_AND_WORK, rows))


def format_columns(columns: Sequence[Column], rows: Sequence[Figures]) -> str:
    return format_table([name for name, _ in columns], ([show(row) for _, show in columns] for row in rows))


def format_pair(p50_ms: float | None, p95_ms: float | None) -> str:
    return "-" if p50_ms is None else f"{p50_ms:.0f} / {p95_ms:.0f}"
