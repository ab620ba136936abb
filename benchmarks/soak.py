"""Many generations in one process: does its memory stay where it is?

    python -m benchmarks.soak             # about a minute

Requests of all kinds (step counts, schedulers, guidance, several pictures, previews, both decoders), every prompt a new
one, each picture encoded to a file. Resident memory is read after every tenth of them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.shared.diffusers_loop import hush_libraries, parse_dtype
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.prompts import endless_prompts
from benchmarks.shared.report import print_table, write_report
from broker.messages import Delivery, Job
from models.catalog import ModelSpec, get_spec, load_catalog
from models.loading import default_device, load_pipeline
from workers.engine import Engine, Finished
from workers.engine.calibration import warm_up
from workers.engine.jobs import make_job
from workers.engine.runner import ModelRunner
from workers.images import encode_picture

LOADS = (24, 1, 8, 3)  # requests under way: a service has busy and quiet times
LOAD_CHANGES_AFTER = 20
MAX_GROWTH = 0.05


@dataclass(frozen=True)
class Reading:
    generations: int
    resident_mib: float


def main() -> None:
    options = parse_options()
    hush_libraries()
    spec = get_spec(load_catalog(), options.model)
    engine = Engine({spec.name: ModelRunner(load_pipeline(spec, default_device(), parse_dtype(options.dtype)))})
    warm_up(engine, spec.name)
    readings = list(run(engine, new_jobs(spec, options.generations), options.generations // 10))
    print_table(readings)
    growth = readings[-1].resident_mib / readings[0].resident_mib - 1
    aim = f"aim: at most {MAX_GROWTH:.0%}"
    verdict = "met" if growth <= MAX_GROWTH else "missed"
    print(f"{verdict}: grown by {growth:.1%} after the first {readings[0].generations} ({aim})")
    write_report(options.json, vars(options), {"growth": growth, "readings": readings})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-lcm")
    parser.add_argument("--dtype", default="auto", help="auto: the service's own choice")
    parser.add_argument("--generations", type=int, default=2000)
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-soak.json")
    return parser.parse_args()


def run(engine: Engine, jobs: Iterator[Job], every: int) -> Iterator[Reading]:
    """Keeps changing numbers of jobs under way until they are done; a reading after each `every` of them."""
    under_way, done = 0, 0
    process = psutil.Process()
    while True:
        load = LOADS[done // LOAD_CHANGES_AFTER % len(LOADS)]
        while under_way < load and (job := next(jobs, None)) is not None:
            engine.add(Delivery(job, attempt=1, waited_ms=0))
            under_way += 1
        if not engine.has_work:
            return
        for output in engine.step():
            if isinstance(output, Finished):
                for index, pixels in enumerate(output.pixels):
                    encode_picture(output.request.delivery.job, index, pixels)
                under_way, done = under_way - 1, done + 1
                if done % every == 0:
                    yield Reading(done, process.memory_info().rss / 2**20)


def new_jobs(spec: ModelSpec, count: int) -> Iterator[Job]:
    randomness, prompts = random.Random(0), endless_prompts(seed=2)
    for number in range(count):
        changes: dict[str, Any] = {
            "num_inference_steps": randomness.randint(1, 8),
            "scheduler": randomness.choice(list(spec.schedulers)),
            "guidance_scale": randomness.choice([0.0, 0.0, min(2.0, spec.guidance_scale.max)]),
            "num_images": randomness.choice([1, 1, 2]),
            "decoder": randomness.choice(["full", "tiny"] if spec.tiny_vae else ["full"]),
            "output_format": randomness.choice(["png", "jpeg", "webp"]),
            "previews": randomness.random() < 0.5,
            "seed": number,
        }
        yield make_job(spec, str(number), next(prompts), **changes)


if __name__ == "__main__":
    main()
