"""The worker with its engine in a thread, as it is shipped, against the same worker with its engine in a process.

    python -m benchmarks.process            # about four minutes

A thread shares the interpreter lock with the event loop and the encoders of pictures; a process pays for every request
and every picture that crosses between the two. Both workers are real ones on the real broker, without HTTP: clients in
a process of their own submit jobs to an embedded Redis and read the replies, each its next one when its last one is
answered. The workers take turns, and whoever has no turn is stopped; the table shows the medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

from benchmarks.process.clients import Load, Task, run_clients
from benchmarks.process.contenders import PROGRAMS, Contender, Program
from benchmarks.process.engine_process import SPAWN
from benchmarks.process.figures import Turn, format_turns, judge
from benchmarks.shared.figures import BenchmarkError
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.report import write_report
from benchmarks.shared.rounds import percentiles, take_medians
from broker.embedded import EmbeddedRedis
from workers.settings import WorkerSettings


def main() -> None:
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that no worker is left behind
    try:
        rounds = measure(options)
    except BenchmarkError as error:
        sys.exit(f"benchmark failed: {error}")
    table = take_medians(rounds, "load", "program")
    verdict = judge(rounds)
    print(format_turns(table))
    print(verdict)
    write_report(options.json, vars(options), {"medians": table, "verdict": verdict, "rounds": rounds})
    print(f"\nEvery round: {options.json}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.process", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini-lcm")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--preview-clients", type=int, nargs="*", default=[8], help="who also ask for previews")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="that count, of each turn")
    parser.add_argument("--warmup", type=float, default=1.5, help="seconds before them")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-process.json")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> list[Turn]:
    """All turns of all rounds. Raises BenchmarkError."""
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(EmbeddedRedis())
        contenders = [
            stack.enter_context(Contender(program, new_settings(options, redis.url, program))) for program in PROGRAMS
        ]
        pool = stack.enter_context(ProcessPoolExecutor(1, SPAWN))
        return [turn for number in range(options.rounds) for turn in run_round(pool, contenders, options, number)]


def new_settings(options: argparse.Namespace, redis_url: str, program: Program) -> WorkerSettings:
    """An hour is no hang here: whoever rests makes no progress."""
    prefix = f"benchmark-{program}"
    return WorkerSettings.load(redis_url=redis_url, redis_prefix=prefix, models=options.model, max_stall_s=3600)


def run_round(
    pool: Executor, contenders: Sequence[Contender], options: argparse.Namespace, number: int
) -> Iterator[Turn]:
    """Who goes first changes from round to round."""
    loads = [*map(Load, options.clients), *(Load(clients, previews=True) for clients in options.preview_clients)]
    for index, load in enumerate(loads):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            seed = 100 * number + index
            task = Task(contender.settings, load, options.steps, options.warmup, options.seconds, seed)
            yield run_turn(pool, contender, task)
    print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)


def run_turn(pool: Executor, contender: Contender, task: Task) -> Turn:
    with contender.awake() as meter:
        seen = pool.submit(run_clients, task).result()
        cpu_ms = sum(meter.read_ms(seen.num_pictures).values())
    if len(seen.waits_ms) < 2:
        raise BenchmarkError(f"only {len(seen.waits_ms)} pictures in {task.seconds:g} s: more --seconds are needed")
    p50_ms, p95_ms, _ = percentiles(seen.waits_ms)
    return Turn(
        program=contender.program,
        load=task.load,
        images_per_s=seen.images_per_s,
        p50_ms=p50_ms,
        p95_ms=p95_ms,
        step_ms=statistics.median(seen.steps_ms),
        cpu_ms=cpu_ms,
        previews_per_image=seen.num_previews / seen.num_pictures,
    )


if __name__ == "__main__":
    main()
