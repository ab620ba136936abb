"""People who type, over live sockets of a running `fewstep serve`.

    python -m benchmarks.typing

Each typist types prompts key by key, sends every change, and acknowledges every picture at once. Two modes take turns:
`plain` (previews on, all steps at every change) and `quick` (one step and the tiny decoder while typing, all steps and
the full decoder after a pause). What is measured is what a typist sees: how long after a key its pictures come, how
many come, and how far the screen is behind the words; and what it costs: rows computed for pictures that nobody got.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.shared.figures import BenchmarkError
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.report import write_report
from benchmarks.shared.rounds import take_medians
from benchmarks.typing.figures import Figures, judge, print_tables, summarise
from benchmarks.typing.service import Service
from benchmarks.typing.typists import Turn, run_typists

REFINE_AFTER_MS = 300
WALK_OUT_S = 1.0
MODES: dict[str, Callable[[int], dict[str, Any]]] = {
    "plain": lambda steps: {"num_inference_steps": steps, "previews": True},
    "quick": lambda steps: {
        "num_inference_steps": 1,
        "previews": False,
        "refine": {"after_ms": REFINE_AFTER_MS, "num_inference_steps": steps, "decoder": "full"},
    },
}


def main() -> None:
    options = parse_options()
    try:
        rounds = measure(options)
    except BenchmarkError as error:
        sys.exit(f"benchmark failed: {error}")
    table = take_medians(rounds, "typists", "mode")
    print_tables(table)
    verdicts = judge(table, options.keys_per_second)
    print("\n".join(verdicts))
    write_report(options.json, vars(options), {"medians": table, "verdicts": verdicts, "rounds": rounds})
    print(f"\nEvery round: {options.json}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.typing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini-lcm")
    parser.add_argument("--steps", type=int, default=4, help="of plain and of refined pictures")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--typists", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--keys-per-second", type=float, default=5, help="of each typist within a phrase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of each turn")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-typing.json")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> list[Figures]:
    """Each round's turns. At the end nothing may be left of typists who went away. Raises BenchmarkError."""
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
    return rounds


def new_turn(service: Service, options: argparse.Namespace, mode: str, typists: int, seed: int) -> Turn:
    asked = {"model": options.model, **MODES[mode](options.steps)}
    return Turn(service.port, mode, asked, typists, options.seconds, options.keys_per_second, seed)


def run_turn(pool: Executor, service: Service, turn: Turn) -> Figures:
    before = service.read_work()
    report = pool.submit(run_typists, turn).result()
    return summarise(turn, report, service.read_work() - before)


def walk_out(pool: Executor, turn: Turn) -> None:
    """All typists leave in the middle of a word, with pictures under way. What they saw doesn't count."""
    pool.submit(run_typists, replace(turn, seconds=WALK_OUT_S, waits_for_last_picture=False)).result()


if __name__ == "__main__":
    main()
