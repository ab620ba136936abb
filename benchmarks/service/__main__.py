"""The service against diffusers alone and against two other servers, in one run on one machine.

    python -m benchmarks.service            # about 18 minutes
    python -m benchmarks.service --smoke    # two minutes, to see that it works; the figures mean nothing

These programs draw the same kind of picture from the same weights: diffusers' pipeline in a loop, one picture at a time
and in batches; over HTTP `fewstep serve`, FastAPI with one pipeline and a lock, and LitServe with its request batching.
First closed loops, then open loops at a part of what `fewstep serve` gave to the most clients of the same round. The
programs take turns, so that whatever else the machine does hits all of them; the tables show the medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.shared.figures import (
    CEILING,
    FLOOR,
    SERVICE,
    BenchmarkError,
    Load,
    Skipped,
    Table,
    Turn,
    Verdict,
    format_cpu,
    format_loops,
    judge,
    measure,
    take_medians,
)
from benchmarks.shared.load import Result
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.report import write_report
from benchmarks.shared.servers import (
    Contender,
    CpuMeter,
    DiffusersLoop,
    Drawing,
    fewstep_server,
    litserve_server,
    plain_server,
)

HOPELESS = 1.5  # times what a program can do: its queue would only grow


@dataclass(frozen=True)
class Settings:
    """What the command line says; `parse_options` describes each."""

    model: str
    steps: int
    clients: Sequence[int]
    percents: Sequence[int]
    rounds: int
    seconds: float
    warmup: float
    deadline_s: float
    dtype: str
    batch_dtype: str
    batch_sizes: Sequence[int]
    windows_ms: Sequence[float]
    threads: int
    json: Path


@dataclass(frozen=True)
class Programs:
    """All of them, ready. The service is the first of the `servers`."""

    floor: DiffusersLoop
    ceiling: DiffusersLoop
    servers: Sequence[Contender]


def main() -> None:
    settings = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that no server is left behind
    try:
        with start_programs(settings) as programs:
            rounds = [row for number in range(settings.rounds) for row in run_round(programs, settings, number)]
            trials = programs.floor.trials + programs.ceiling.trials
            max_rows = programs.servers[0].max_rows
    except BenchmarkError as error:
        sys.exit(f"benchmark failed: {error}")
    table = take_medians(rounds)
    verdicts = judge(table)
    print_report(table, verdicts)
    figures = {
        "trials": trials,
        "max_rows": max_rows,
        "medians": [turn for turn in table.values() if turn],
        "verdicts": list(verdicts),
        "rounds": rounds,
    }
    write_report(settings.json, asdict(settings), figures)
    print(f"The service lets a batch grow to {max_rows} rows.\n\nEvery round: {settings.json}")


def parse_options() -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="mini-lcm")
    add("--steps", type=int, default=4)
    add("--clients", type=int, nargs="+", default=[1, 8, 32, 64], help="of the closed loops")
    add("--percents", type=int, nargs="+", default=[50, 80, 110], help="of capacity, in the open loops")
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=8, help="that count, of each turn")
    add("--warmup", type=float, default=2, help="seconds before them")
    add("--deadline-s", type=float, default=1.0, help="pictures within it are goodput")
    add("--dtype", default="float32", help="of diffusers at batch 1 and the plain server")
    add("--batch-dtype", default="auto", help="of diffusers in batches and LitServe; auto: the service's")
    add("--batch-sizes", type=int, nargs="+", default=[8, 16, 32], help="of diffusers in batches; the fastest is kept")
    add("--windows-ms", type=float, nargs="+", default=[10, 50], help="batching windows of LitServe, each a program")
    add(
        "--threads",
        type=int,
        default=0,
        help="of diffusers and the plain server; 0: the faster of 1 and all cores, tried by each",
    )
    add("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-service.json")
    add("--smoke", action="store_true", help="one short round with few clients")
    options = vars(parser.parse_args())
    is_smoke = options.pop("smoke")
    settings = Settings(**options)
    return make_short(settings) if is_smoke else settings


def make_short(settings: Settings) -> Settings:
    return replace(settings, clients=[1, 4], percents=[80], rounds=1, seconds=2, warmup=1, batch_sizes=[8])


@contextlib.contextmanager
def start_programs(settings: Settings) -> Iterator[Programs]:
    drawing = Drawing(settings.model, settings.steps)
    with contextlib.ExitStack() as stack:
        start = stack.enter_context
        floor = start(DiffusersLoop(FLOOR, drawing, settings.dtype, [1], settings.threads))
        ceiling = start(DiffusersLoop(CEILING, drawing, settings.batch_dtype, settings.batch_sizes, settings.threads))
        servers = [
            start(fewstep_server(drawing)),
            start(plain_server(drawing, settings.dtype, settings.threads)),
            *(start(litserve_server(drawing, settings.batch_dtype, window_ms)) for window_ms in settings.windows_ms),
        ]
        yield Programs(floor, ceiling, servers)


# A round


def run_round(programs: Programs, settings: Settings, number: int) -> list[Turn | Skipped]:
    """Every request of a turn is new, and the same for each program."""
    seed = 100 * (number + 1)
    alone = [loop.run(settings.seconds, settings.deadline_s) for loop in (programs.floor, programs.ceiling)]
    closed = [
        run_closed(contender, clients, settings, seed + index)
        for index, clients in enumerate(settings.clients)
        for contender in programs.servers
    ]
    most = Load("clients", max(settings.clients))
    capacities = {turn.program: turn.figures.images_per_s for turn in closed if turn.load == most}
    opened = [
        run_open(contender, percent, capacities, settings, seed + len(settings.clients) + index)
        for index, percent in enumerate(settings.percents)
        for contender in programs.servers
    ]
    print(f"round {number + 1} of {settings.rounds} done", file=sys.stderr)
    return [*alone, *closed, *opened]


def run_closed(contender: Contender, clients: int, settings: Settings, seed: int) -> Turn:
    return run_turn(contender, Load("clients", clients), None, settings, seed)


def run_open(
    contender: Contender, percent: int, capacities: Mapping[str, float], settings: Settings, seed: int
) -> Turn | Skipped:
    load = Load("percent", percent)
    rate_per_s = capacities[SERVICE] * percent / 100
    if rate_per_s > HOPELESS * capacities[contender.server.name]:
        return Skipped(contender.server.name, load)
    return run_turn(contender, load, rate_per_s, settings, seed)


def run_turn(contender: Contender, load: Load, rate_per_s: float | None, settings: Settings, seed: int) -> Turn:
    name = contender.server.name
    pace = ["--clients", str(load.size)] if rate_per_s is None else ["--rate", str(rate_per_s)]
    with contender.awake():
        meter = CpuMeter(contender.process)
        result = run_load(
            contender, [*pace, "--seconds", str(settings.seconds), "--warmup", str(settings.warmup)], seed
        )
        if result.errors or not result.num_drawn:
            raise BenchmarkError(f"{name}, {load}: {result.num_drawn} pictures, errors {result.errors}")
        cpu_ms = meter.read_ms(result.num_drawn)
    figures = measure(result.latencies_ms, result.num_delivered / result.seconds, result.seconds, settings.deadline_s)
    clients_cpu_ms = result.cpu_s * 1000 / result.num_drawn
    return Turn(name, load, rate_per_s, len(result.latencies_ms), result.num_refused, figures, cpu_ms, clients_cpu_ms)


def run_load(contender: Contender, arguments: Sequence[str], seed: int) -> Result:
    command = [sys.executable, "-m", "benchmarks.shared.load", "--port", str(contender.server.port), *arguments]
    command += ["--seed", str(seed), "--body", json.dumps(dict(contender.fields))]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
    if done.returncode:
        raise BenchmarkError(f"the load on {contender.server.name} broke off, see above")
    return Result(**json.loads(done.stdout))


# The report


def print_report(table: Table, verdicts: Sequence[Verdict]) -> None:
    print(format_loops(table, is_open=False))
    print(format_loops(table, is_open=True))
    print(format_cpu(table))
    for verdict in verdicts:
        print(verdict)


if __name__ == "__main__":
    main()
