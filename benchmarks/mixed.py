"""Short and long requests together: batches that change at every step against batches of whole requests.

    python -m benchmarks.mixed            # about three minutes

Half of the requests take 1 step, half take 8. They come at random times, at a share of what the engine can do with
such a mix. The same arrivals are served twice: as the engine does it, and as servers with request batching do, where
requests of one step count start together and nobody joins before they have ended. Both take turns.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shared.diffusers_loop import hush_libraries, parse_dtype
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.prompts import endless_prompts
from benchmarks.shared.report import print_table, write_report
from broker.messages import Delivery
from models.catalog import ModelSpec, get_spec, load_catalog
from models.loading import default_device, load_pipeline
from workers.engine import Engine, Finished
from workers.engine.calibration import warm_up
from workers.engine.jobs import make_job
from workers.engine.request import RequestState
from workers.engine.runner import ModelRunner
from workers.engine.scheduler import Batch, Scheduler

STEP_COUNTS = (1, 8)


class RequestBatches(Scheduler[RequestState]):
    """Requests of one step count start together; nobody joins before all of them have ended."""

    def schedule(self) -> Batch[RequestState] | None:
        if not self.running and not self._start():
            return None
        return Batch(tuple(self.running), tuple(request for request in self.running if request.denoising is None))

    def _start(self) -> bool:
        waiting = sorted(self.waiting, key=lambda request: request.due_s)
        alike = [request for request in waiting if _kind(request) == _kind(waiting[0])]
        self.running = alike[: self.max_rows(alike[0])] if alike else []
        self.waiting = [request for request in self.waiting if request not in self.running]
        return bool(self.running)


def _kind(request: RequestState) -> tuple[object, int]:
    return request.group, request.params.num_inference_steps


@dataclass(frozen=True)
class Arrival:
    due_s: float
    steps: int


@dataclass(frozen=True)
class Row:
    """One program and one step count; milliseconds from arrival to the pixels. `images_per_s` is of both kinds."""

    program: str
    steps: int
    pictures: int
    p50_ms: float
    p95_ms: float
    images_per_s: float


def main() -> None:
    options = parse_options()
    hush_libraries()
    spec = get_spec(load_catalog(), options.model)
    device = default_device()
    runner = ModelRunner(load_pipeline(spec, device, parse_dtype(options.dtype)))
    engines = {
        "step by step": Engine({spec.name: runner}),
        "whole requests": Engine({spec.name: runner}, scheduler_class=RequestBatches),
    }
    warm_up(engines["step by step"], spec.name)
    capacity = measure_capacity(engines["step by step"], spec, options.seconds / 2)
    rate = capacity * options.percent / 100
    rows: list[Row] = []
    for number in range(options.rounds):
        arrivals = list(draw_arrivals(rate, options.seconds, seed=number))
        for program, engine in engines.items():
            rows += summarise(program, serve(engine, spec, arrivals, seed=number), options.seconds)
    table = medians(rows)
    print(f"Capacity for the mix: {capacity:.1f} images/s; requests come at {rate:.1f} a second.\n")
    print_table(table)
    for line in compare(table):
        print(line)
    write_report(options.json, vars(options), {"capacity": capacity, "rate": rate, "medians": table, "rounds": rows})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-lcm")
    parser.add_argument("--dtype", default="auto", help="auto: the service's own choice")
    parser.add_argument("--percent", type=float, default=80, help="load, of the capacity for the mix")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of each program in each round")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-mixed.json")
    return parser.parse_args()


def measure_capacity(engine: Engine, spec: ModelSpec, seconds: float) -> float:
    """Pictures per second of the mix with as many requests under way as the batch takes."""
    requests = new_deliveries(spec, itertools.cycle(STEP_COUNTS), seed=1000)
    under_way, done = 0, 0
    start_s = time.perf_counter()
    while time.perf_counter() - start_s < seconds:
        for delivery in itertools.islice(requests, spec.max_batch_size - under_way):
            engine.add(delivery)
            under_way += 1
        ended = sum(isinstance(output, Finished) for output in engine.step())
        under_way, done = under_way - ended, done + ended
    elapsed_s = time.perf_counter() - start_s
    while engine.has_work:
        engine.step()
    return done / elapsed_s


def draw_arrivals(rate: float, seconds: float, seed: int) -> Iterator[Arrival]:
    """A Poisson process; each arrival takes one step count or the other."""
    randomness = random.Random(seed)
    due_s = randomness.expovariate(rate)
    while due_s < seconds:
        yield Arrival(due_s, randomness.choice(STEP_COUNTS))
        due_s += randomness.expovariate(rate)


def new_deliveries(spec: ModelSpec, step_counts: Iterator[int], seed: int) -> Iterator[Delivery]:
    prompts = endless_prompts(seed)
    for number, steps in enumerate(step_counts):
        job = make_job(spec, f"{seed}-{number}", next(prompts), seed=number, num_inference_steps=steps)
        yield Delivery(job, attempt=1, waited_ms=0)


def serve(engine: Engine, spec: ModelSpec, arrivals: Sequence[Arrival], seed: int) -> list[tuple[int, float, float]]:
    """(steps, latency in ms, end in s) of each, all served."""
    deliveries = new_deliveries(spec, iter([arrival.steps for arrival in arrivals]), seed)
    due = deque(zip(arrivals, deliveries, strict=True))
    known = {delivery.job.request_id: arrival for arrival, delivery in due}
    served: list[tuple[int, float, float]] = []
    start_s = time.perf_counter()
    while due or engine.has_work:
        now_s = time.perf_counter() - start_s
        while due and due[0][0].due_s <= now_s:
            engine.add(due.popleft()[1])
        if not engine.has_work:
            time.sleep(max(0.0, due[0][0].due_s - now_s))
            continue
        for output in engine.step():
            if isinstance(output, Finished):
                end_s, arrival = time.perf_counter() - start_s, known[output.request.request_id]
                served.append((arrival.steps, (end_s - arrival.due_s) * 1000, end_s))
    return served


def summarise(program: str, served: Sequence[tuple[int, float, float]], seconds: float) -> list[Row]:
    images_per_s = sum(end_s <= seconds for _, _, end_s in served) / seconds
    rows = []
    for steps in STEP_COUNTS:
        cuts = statistics.quantiles([ms for count, ms, _ in served if count == steps], n=100, method="inclusive")
        num_pictures = sum(count == steps for count, _, _ in served)
        rows.append(Row(program, steps, num_pictures, cuts[49], cuts[94], images_per_s))
    return rows


def medians(rows: Sequence[Row]) -> list[Row]:
    table = []
    for program, steps in dict.fromkeys((row.program, row.steps) for row in rows):
        same = [row for row in rows if (row.program, row.steps) == (program, steps)]
        figures = (
            statistics.median(getattr(row, name) for row in same) for name in ("p50_ms", "p95_ms", "images_per_s")
        )
        table.append(Row(program, steps, sum(row.pictures for row in same), *figures))
    return table


def compare(table: Sequence[Row]) -> Iterator[str]:
    ours = {row.steps: row for row in table if row.program == "step by step"}
    theirs = {row.steps: row for row in table if row.program == "whole requests"}
    for steps, aim in zip(STEP_COUNTS, (0.5, 1.3), strict=True):
        ratio = ours[steps].p95_ms / theirs[steps].p95_ms
        yield f"{'met' if ratio <= aim else 'missed'}: P95 at {steps} steps {ratio:.2f} times (aim: at most {aim})"
    ratio = ours[1].images_per_s / theirs[1].images_per_s
    yield f"{'met' if abs(ratio - 1) <= 0.05 else 'missed'}: images/s {ratio:.3f} times (aim: within 5 %)"


if __name__ == "__main__":
    main()
