"""People who type, over live sockets of a running `fewstep serve`.

    python -m benchmarks.typing           # never by its path: then it would hide the standard library's `typing`

Each typist types prompts key by key, sends every change, and acknowledges every picture at once. Two modes take turns:
`plain` (previews on, all steps at every change) and `quick` (one step and the tiny decoder while typing, all steps and
the full decoder after a pause). What is measured is what a typist sees: how long after a key its pictures come, how
many come, and how far the screen is behind the words; and what it costs: rows computed for pictures that nobody got.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import random
import re
import statistics
import sys
import time
import urllib.request
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK
from websockets.typing import Subprotocol

from benchmarks.machine import REPOSITORY
from benchmarks.prompts import endless_prompts
from benchmarks.report import write_report
from benchmarks.service import BenchmarkError, Server, free_port, running

SUBPROTOCOL = Subprotocol("fewstep.live.v1")
REFINE_AFTER_MS = 300

# Pauses before a letter and before a word, in units of 1 / keys_per_second, which they give with these prompts.
LETTER_PAUSE, WORD_PAUSE = 0.9, 1.9
JITTER = (0.5, 1.5)
LOOK_S = (1.0, 2.0)  # before a phrase: people stop to look at the picture
PHRASE_START = re.compile(r"^|\b(?:next to|on) ")

WARM_UP_S = 2.0
SAMPLE_S = 0.02
LAST_PICTURE_WITHIN_S = 30.0
WALK_OUT_S = 1.0
NOTHING_LEFT_WITHIN_S = 5.0

MAX_WASTED_SHARE, MIN_FINALS_PER_S = 0.10, 2.0  # the aims, for 20 typists at 5 keys a second


@dataclass(frozen=True)
class Turn:
    """What a number of typists do. `fields` go into each of their requests."""

    port: int
    mode: str
    fields: dict[str, Any]
    typists: int
    seconds: float
    keys_per_second: float
    seed: int
    waits_for_last_picture: bool = True

    @property
    def is_refined(self) -> bool:
        return "refine" in self.fields


@dataclass(frozen=True)
class Window:
    """Keys count when they are typed, pictures when they arrive between `start_s` and `end_s`."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    def __contains__(self, moment_s: float) -> bool:
        return self.start_s <= moment_s <= self.end_s


@dataclass(frozen=True)
class Picture:
    """A picture that arrived. `type` is `preview`, `final` or `refined`."""

    arrived_s: float
    seq: int
    type: str


@dataclass
class Diary:
    """What one typist did and saw. Moments are of `time.perf_counter`; the seq of a key is its place in `typed_s`."""

    typed_s: list[float] = field(default_factory=list)
    looks: list[tuple[float, float]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    superseded: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Report:
    """What came of one turn."""

    window: Window
    diaries: list[Diary]
    cpu_percent: float


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


def main() -> None:
    options = parse_options()
    try:
        measure(options)
    except BenchmarkError as error:
        sys.exit(f"benchmark failed: {error}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-lcm")
    parser.add_argument("--steps", type=int, default=4, help="of plain and of refined pictures")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--typists", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--keys-per-second", type=float, default=5, help="of each typist within a phrase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of each turn")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-typing.json")
    return parser.parse_args()


MODES: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda steps: {"num_inference_steps": steps, "previews": True},
    "quick": lambda steps: {
        "num_inference_steps": 1,
        "previews": False,
        "refine": {"after_ms": REFINE_AFTER_MS, "num_inference_steps": steps, "decoder": "full"},
    },
}


def measure(options: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        service = stack.enter_context(Service.running(options.model))
        rounds: list[Figures] = []
        for number in range(options.rounds):
            for typists, mode in itertools.product(options.typists, options.modes):
                rounds.append(run_turn(pool, service, new_turn(service, options, mode, typists, seed=number + 1)))
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
        walk_out(pool, new_turn(service, options, options.modes[-1], max(options.typists), seed=0))
        service.check_that_nothing_is_left()
    table = medians(rounds)
    print_tables(table)
    verdicts = judge(table, options.keys_per_second)
    print("\n".join(verdicts))
    figures = {"medians": table, "verdicts": verdicts, "rounds": rounds}
    write_report(options.json, vars(options), figures)
    print(f"\nEvery round: {options.json}")


def new_turn(service: Service, options: argparse.Namespace, mode: str, typists: int, seed: int) -> Turn:
    asked = {"model": options.model, **MODES[mode](options.steps)}
    return Turn(service.server.port, mode, asked, typists, options.seconds, options.keys_per_second, seed)


def run_turn(pool: Executor, service: Service, turn: Turn) -> Figures:
    before = service.read_work()
    report = pool.submit(run_typists, turn).result()
    return summarise(turn, report, service.read_work() - before)


def walk_out(pool: Executor, turn: Turn) -> None:
    """All typists leave in the middle of a word, with pictures under way. What they saw doesn't count."""
    pool.submit(run_typists, replace(turn, seconds=WALK_OUT_S, waits_for_last_picture=False)).result()


# The service and its counters


@dataclass(frozen=True)
class Work:
    """Rows that the worker computed, and those among them for requests that were then stopped."""

    rows: float
    stopped_rows: float

    def __sub__(self, earlier: Work) -> Work:
        return Work(self.rows - earlier.rows, self.stopped_rows - earlier.stopped_rows)


@dataclass(frozen=True)
class Service:
    """A running `fewstep serve`."""

    server: Server
    worker_metrics_port: int
    model: str

    @classmethod
    @contextlib.contextmanager
    def running(cls, model: str) -> Iterator[Service]:
        server, metrics_port = Server("fewstep serve", free_port()), free_port()
        command = ["env", f"FEWSTEP_WORKER_METRICS_PORT={metrics_port}"]
        command += [sys.executable, "-c", "from cli import main; main()", "serve"]
        with running([*command, "--port", str(server.port), "--model", model], server):
            yield cls(server, metrics_port, model)

    def read_work(self) -> Work:
        return Work(*scrape(self.worker_metrics_port, self.model, "fewstep_rows_total", "fewstep_stopped_rows_total"))

    def check_that_nothing_is_left(self) -> None:
        """All sockets are closed, so their requests must be gone soon. Raises BenchmarkError."""
        names = ("fewstep_queue_depth", "fewstep_running_requests", "fewstep_live_connections")
        end_s = time.monotonic() + NOTHING_LEFT_WITHIN_S
        while any(left := scrape(self.server.port, self.model, *names)):
            if time.monotonic() > end_s:
                what = dict(zip(names, left, strict=True))
                raise BenchmarkError(f"{NOTHING_LEFT_WITHIN_S:g} s after the last typist left there is still {what}")
            time.sleep(0.1)


def scrape(port: int, model: str, *names: str) -> list[float]:
    """The metrics' values for `model` and where there is no model; 0 for one that has not counted yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    except OSError as error:
        raise BenchmarkError(f"no metrics on port {port}: {error}") from error
    known = {family.name: family.samples for family in families}
    if missing := [name for name in names if name.removesuffix("_total") not in known]:
        raise BenchmarkError(f"the metrics on port {port} lack {', '.join(missing)}")
    return [
        sum(
            sample.value
            for sample in known[name.removesuffix("_total")]
            if sample.name == name and sample.labels.get("model", model) == model
        )
        for name in names
    ]


# The typists, in a process of their own


def run_typists(turn: Turn) -> Report:
    return asyncio.run(type_together(turn))


async def type_together(turn: Turn) -> Report:
    """Connects all typists, lets them type, and returns what they saw. Raises BenchmarkError."""
    async with contextlib.AsyncExitStack() as stack:
        url = f"ws://127.0.0.1:{turn.port}/v1/live"
        typists = [
            Typist(number, turn, await stack.enter_async_context(connect(url, subprotocols=[SUBPROTOCOL])))
            for number in range(turn.typists)
        ]
        start_s = time.perf_counter() + WARM_UP_S
        window = Window(start_s, start_s + turn.seconds)
        try:
            measuring = asyncio.create_task(measure_cpu(window))
            await asyncio.gather(measuring, *(typist.run(window) for typist in typists))
        except ConnectionClosed as closed:
            raise BenchmarkError(f"the service closed a typist's socket: {closed}") from None
    return Report(window, [typist.diary for typist in typists], measuring.result())


async def measure_cpu(window: Window) -> float:
    """Percent of all cores that are busy within the window, whoever uses them."""
    await sleep_until(window.start_s)
    psutil.cpu_percent()
    await sleep_until(window.end_s)
    return psutil.cpu_percent()


async def sleep_until(moment_s: float) -> None:
    await asyncio.sleep(max(0.0, moment_s - time.perf_counter()))


class Typist:
    """One person at a live socket: sends every change, acknowledges every picture, keeps a diary.

    This is all that a client of `fewstep.live.v1` has to do, besides showing the pictures.
    """

    def __init__(self, number: int, turn: Turn, socket: ClientConnection) -> None:
        self.diary = Diary()
        self._number, self._turn, self._socket = number, turn, socket
        self._seed = 1_000_000 + 1_000 * number  # no other typist's, so that a foreign picture is seen as one
        self._dice = random.Random(f"{turn.seed} {number}")
        self._prompts = endless_prompts(1_000 * turn.seed + number)
        self._seqs: dict[str, int] = {}
        self._has_last_picture = asyncio.Event()

    async def run(self, window: Window) -> None:
        await asyncio.gather(self._type(window), self._listen())

    # Out

    async def _type(self, window: Window) -> None:
        due_s = time.perf_counter()
        for key in type_prompts(self._prompts, self._turn.keys_per_second, self._dice):
            if key.follows_look:
                self.diary.looks.append((due_s, due_s + key.pause_s))
            due_s += key.pause_s
            await sleep_until(min(due_s, window.end_s))
            if due_s >= window.end_s:
                break
            await self._ask_for(key.text)
        if self._turn.waits_for_last_picture:
            await self._wait_for_last_picture()
        await self._socket.close()

    async def _ask_for(self, prompt: str) -> None:
        self._has_last_picture.clear()
        seq = len(self.diary.typed_s)
        self.diary.typed_s.append(time.perf_counter())
        await self._send({"type": "generate", "seq": seq, "prompt": prompt, "seed": self._seed, **self._turn.fields})

    async def _wait_for_last_picture(self) -> None:
        try:
            async with asyncio.timeout(LAST_PICTURE_WITHIN_S):
                await self._has_last_picture.wait()
        except TimeoutError:
            what = f"has no picture of the last words {LAST_PICTURE_WITHIN_S:g} s after the last key"
            raise BenchmarkError(f"typist {self._number} of {self._turn.typists} {what}") from None

    async def _send(self, message: dict[str, Any]) -> None:
        await self._socket.send(json.dumps(message))

    # In

    async def _listen(self) -> None:
        """Until the socket is closed. An acknowledgement may meet a socket that this typist has just closed."""
        with contextlib.suppress(ConnectionClosedOK):
            async for message in self._socket:
                if isinstance(message, str):
                    self._hear(json.loads(message))
                else:
                    header, _ = parse_frame(message)
                    self._see(header)
                    await self._send({"type": "ack", "frame": header["frame"]})

    def _hear(self, message: dict[str, Any]) -> None:
        match message["type"]:
            case "ready":
                pass
            case "queued":
                self._seqs[message["request_id"]] = message["seq"]
            case "superseded":
                if not message["refined"]:
                    self.diary.superseded.add(message["seq"])
            case _:
                raise BenchmarkError(f"typist {self._number} of {self._turn.typists} was told {message}")

    def _see(self, header: dict[str, Any]) -> None:
        seq = header["seq"]
        if self._seqs.get(header["request_id"]) != seq or header["seed"] != self._seed + header["index"]:
            raise BenchmarkError(
                f"typist {self._number} of {self._turn.typists} got a frame of another session: {header}"
            )
        type = "refined" if header["refined"] else header["type"]
        self.diary.pictures.append(Picture(time.perf_counter(), seq, type))
        is_newest = seq == len(self.diary.typed_s) - 1
        if is_newest and type == ("refined" if self._turn.is_refined else "final"):
            self._has_last_picture.set()


def parse_frame(frame: bytes) -> tuple[dict[str, Any], bytes]:
    """A binary frame of the live protocol: its header and the image file."""
    end = 4 + int.from_bytes(frame[:4], "big")
    return json.loads(frame[4:end]), frame[end:]


@dataclass(frozen=True)
class Key:
    """One key: the pause before it and all the words after it. `follows_look`: the typist looked at the picture."""

    pause_s: float
    text: str
    follows_look: bool


def type_prompts(prompts: Iterable[str], keys_per_second: float, dice: random.Random) -> Iterator[Key]:
    """Words in bursts, a short pause before each, a long one before each phrase. A new prompt replaces the old one."""
    for prompt in prompts:
        phrase_starts = {match.start() for match in PHRASE_START.finditer(prompt)}
        for place in range(len(prompt)):
            if place in phrase_starts:
                pause_s = dice.uniform(*LOOK_S)
            else:
                pause = WORD_PAUSE if prompt[place - 1] == " " else LETTER_PAUSE
                pause_s = pause / keys_per_second * dice.uniform(*JITTER)
            yield Key(pause_s, prompt[: place + 1], place in phrase_starts)


# Figures


@dataclass(frozen=True)
class Moment:
    """A screen at one moment; both are 0 while it shows the newest words."""

    behind_ms: float
    age_ms: float


def summarise(turn: Turn, report: Report, work: Work) -> Figures:
    window, diaries = report.window, report.diaries
    keys = sum(moment_s in window for diary in diaries for moment_s in diary.typed_s)
    superseded = sum(diary.typed_s[seq] in window for diary in diaries for seq in diary.superseded)
    typing_s = sum(window.seconds - look_s(diary, window) for diary in diaries)
    finals = [count_pictures(diary, window, "final") for diary in diaries]
    refined = sum(count_pictures(diary, window, "refined") for diary in diaries)
    frames = sum(count_pictures(diary, window, "preview", "final", "refined") for diary in diaries)
    moments = [moment for diary in diaries for moment in watch_screen(diary, window)]
    behind = [moment for moment in moments if moment.behind_ms]
    first_p50_ms, first_p95_ms = p50_and_p95(turn, waits_ms(diaries, window, "preview", "final"))
    final_p50_ms, final_p95_ms = p50_and_p95(turn, waits_ms(diaries, window, "final"))
    refined_ms = p50_and_p95(turn, waits_ms(diaries, window, "refined")) if turn.is_refined else (None, None)
    behind_p50_ms, behind_p95_ms = p50_and_p95(turn, [moment.behind_ms for moment in behind])
    age_p50_ms, age_p95_ms = p50_and_p95(turn, [moment.age_ms for moment in behind])
    all_s = window.seconds * turn.typists
    return Figures(
        mode=turn.mode,
        typists=turn.typists,
        keys_per_s=keys / typing_s,
        typing_share=typing_s / all_s,
        first_p50_ms=first_p50_ms,
        first_p95_ms=first_p95_ms,
        final_p50_ms=final_p50_ms,
        final_p95_ms=final_p95_ms,
        refined_p50_ms=refined_ms[0],
        refined_p95_ms=refined_ms[1],
        finals_per_s=sum(finals) / all_s,
        slowest_finals_per_s=min(finals) / window.seconds,
        typing_finals_per_s=sum(finals) / typing_s,
        refined_per_s=refined / all_s,
        frames_per_s=frames / all_s,
        behind_share=len(behind) / len(moments),
        behind_p50_ms=behind_p50_ms,
        behind_p95_ms=behind_p95_ms,
        age_p50_ms=age_p50_ms,
        age_p95_ms=age_p95_ms,
        superseded=superseded,
        superseded_share=superseded / keys,
        rows=work.rows,
        wasted_share=work.stopped_rows / work.rows,
        cpu_percent=report.cpu_percent,
    )


def waits_ms(diaries: Sequence[Diary], window: Window, *types: str) -> list[float]:
    """From each key that got such a picture to the first one."""
    waits = []
    for diary in diaries:
        pictures = (picture for picture in reversed(diary.pictures) if picture.type in types)
        arrived_s = {picture.seq: picture.arrived_s for picture in pictures}
        waits += [(arrived_s[seq] - diary.typed_s[seq]) * 1000 for seq in arrived_s if diary.typed_s[seq] in window]
    return waits


def count_pictures(diary: Diary, window: Window, *types: str) -> int:
    return sum(picture.type in types and picture.arrived_s in window for picture in diary.pictures)


def look_s(diary: Diary, window: Window) -> float:
    """How long the typist looked instead of typing."""
    return sum(max(0.0, min(end, window.end_s) - max(start, window.start_s)) for start, end in diary.looks)


def watch_screen(diary: Diary, window: Window) -> Iterator[Moment]:
    """The screen every SAMPLE_S, once it shows something. It shows the newest words of which a picture has arrived."""
    arrived_s = [picture.arrived_s for picture in diary.pictures]
    shown_seqs = list(itertools.accumulate((picture.seq for picture in diary.pictures), max))
    for number in range(int(window.seconds / SAMPLE_S)):
        now_s = window.start_s + number * SAMPLE_S
        if not (num_arrived := bisect_right(arrived_s, now_s)):
            continue
        shown, newest = shown_seqs[num_arrived - 1], bisect_right(diary.typed_s, now_s) - 1
        if newest > shown:
            yield Moment((now_s - diary.typed_s[shown + 1]) * 1000, (now_s - diary.typed_s[shown]) * 1000)
        else:
            yield Moment(0.0, 0.0)


def p50_and_p95(turn: Turn, values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        raise BenchmarkError(
            f"{turn.mode} with {turn.typists} typists gave too few pictures: more --seconds are needed"
        )
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[94]


def medians(rounds: Sequence[Figures]) -> list[Figures]:
    """One row per mode and number of typists: the median of each figure over the rounds."""
    turns = dict.fromkeys((row.typists, row.mode) for row in rounds)
    return [median([row for row in rounds if (row.typists, row.mode) == turn]) for turn in turns]


def median(rows: Sequence[Figures]) -> Figures:
    names = [field.name for field in fields(Figures) if field.name not in ("mode", "typists")]
    values = {name: [getattr(row, name) for row in rows] for name in names}
    return replace(rows[0], **{name: statistics.median(values[name]) for name in names if None not in values[name]})


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


def print_tables(rows: Sequence[Figures]) -> None:
    print("Pictures: milliseconds from the key, and numbers per second and typist\n")
    print_table(PICTURE_COLUMNS, rows)
    print("The screen and the work\n")
    print_table(WORK_COLUMNS, rows)


def show_refined(row: Figures) -> str:
    if row.refined_p50_ms is None:
        return "-"
    return f"{row.refined_p50_ms:.0f} / {row.refined_p95_ms:.0f}"


Column = tuple[str, Callable[[Figures], str]]

WHO: list[Column] = [("mode", lambda row: row.mode), ("typists", lambda row: str(row.typists))]
PICTURE_COLUMNS: list[Column] = [
    *WHO,
    ("first P50 / P95", lambda row: f"{row.first_p50_ms:.0f} / {row.first_p95_ms:.0f}"),
    ("final P50 / P95", lambda row: f"{row.final_p50_ms:.0f} / {row.final_p95_ms:.0f}"),
    ("refined P50 / P95", show_refined),
    ("finals/s", lambda row: f"{row.finals_per_s:.2f}"),
    ("of the slowest", lambda row: f"{row.slowest_finals_per_s:.2f}"),
    ("while typing", lambda row: f"{row.typing_finals_per_s:.2f}"),
    ("refined/s", lambda row: f"{row.refined_per_s:.2f}"),
    ("frames/s", lambda row: f"{row.frames_per_s:.1f}"),
]
WORK_COLUMNS: list[Column] = [
    *WHO,
    ("typing", lambda row: f"{row.typing_share:.0%}"),
    ("keys/s while typing", lambda row: f"{row.keys_per_s:.1f}"),
    ("behind", lambda row: f"{row.behind_share:.0%}"),
    ("behind for P50 / P95 ms", lambda row: f"{row.behind_p50_ms:.0f} / {row.behind_p95_ms:.0f}"),
    ("age while behind P50 / P95 ms", lambda row: f"{row.age_p50_ms:.0f} / {row.age_p95_ms:.0f}"),
    ("superseded", lambda row: f"{row.superseded:.0f} ({row.superseded_share:.0%})"),
    ("rows", lambda row: f"{row.rows:.0f}"),
    ("wasted", lambda row: f"{row.wasted_share:.1%}"),
    ("CPU", lambda row: f"{row.cpu_percent:.0f}%"),
]


def print_table(columns: Sequence[Column], rows: Sequence[Figures]) -> None:
    print("| " + " | ".join(name for name, _ in columns) + " |")
    print("| --- | " + " | ".join("---:" for _ in columns[1:]) + " |")
    for row in rows:
        print("| " + " | ".join(show(row) for _, show in columns) + " |")
    print()


if __name__ == "__main__":
    main()
