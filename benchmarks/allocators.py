"""What the memory allocator of a worker gives on a CPU: glibc's own, and each other one that the system has.

    python -m benchmarks.allocators       # some minutes

The engine alone, as a worker starts it, in a process for each allocator (LD_PRELOAD); they take turns in each round,
and the table has the medians of the rounds. `training_ms` is a training step of the bundled model's UNet, 32 rows forth
and back in float32. Resident memory is that after the pictures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from diffusers import UNet2DConditionModel

from benchmarks.shared.device import median_ms
from benchmarks.shared.diffusers_loop import hush_libraries
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.prompts import endless_prompts
from benchmarks.shared.report import print_table, write_report
from benchmarks.shared.rounds import take_medians
from broker.messages import Delivery
from models.catalog import ModelSpec, get_spec, load_catalog
from models.loading import load_diffusers
from workers.allocator import PRELOAD, TCMALLOC
from workers.engine import Engine
from workers.engine.calibration import warm_up
from workers.engine.engine import run_until_done
from workers.engine.jobs import make_job
from workers.settings import WorkerSettings
from workers.standalone import load_engine

ALLOCATORS = {"glibc": "", "tcmalloc": TCMALLOC, "jemalloc": "libjemalloc.so.2", "mimalloc": "libmimalloc.so.2"}
TRAINED_ROWS, TRIES = 32, 24
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """Milliseconds of 1, 8 and 32 pictures drawn together, without encoding them to files."""

    allocator: str
    one_ms: float
    eight_ms: float
    thirty_two_ms: float
    training_ms: float
    resident_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-lcm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-allocators.json")
    parser.add_argument("--measure", metavar="NAME", help="only this one, in this process, as JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(asdict(measure(options.measure, get_spec(load_catalog(), options.model)))))
        return
    found = [name for name in ALLOCATORS if is_installed(name)]
    print(f"not installed: {', '.join(set(ALLOCATORS) - set(found)) or 'none'}")
    rounds = [measure_apart(name, options.model) for _ in range(options.rounds) for name in found]
    rows = take_medians(rounds, "allocator")
    print_table(rows)
    write_report(options.json, vars(options), {"rows": rows})


def is_installed(name: str) -> bool:
    """What can't be preloaded is a warning of the loader."""
    command = [sys.executable, "-c", ""]
    return not subprocess.run(command, env=environment(name), capture_output=True, check=True).stderr


def measure_apart(name: str, model: str) -> Row:
    command = [sys.executable, "-m", "benchmarks.allocators", "--measure", name, "--model", model]
    done = subprocess.run(command, env=environment(name), check=True, stdout=subprocess.PIPE, text=True)
    print(f"- {name}", flush=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def environment(name: str) -> dict[str, str]:
    return os.environ | {PRELOAD: ALLOCATORS[name]}


def measure(name: str, spec: ModelSpec) -> Row:
    """In this process."""
    hush_libraries()
    engine = load_engine(spec, WorkerSettings.load())
    warm_up(engine, spec.name)
    one, eight, thirty_two = (median_ms(drawing(engine, spec, rows), CPU, TRIES) for rows in (1, 8, 32))
    resident_mib = psutil.Process().memory_info().rss / 2**20
    return Row(name, one, eight, thirty_two, median_ms(training(spec), CPU, TRIES), resident_mib)


def drawing(engine: Engine, spec: ModelSpec, rows: int) -> Callable[[], object]:
    prompts, numbers = endless_prompts(seed=1), itertools.count()

    def draw() -> None:
        for _ in range(rows):
            job = make_job(spec, f"r{next(numbers)}", next(prompts), seed=1)
            engine.add(Delivery(job, attempt=1, waited_ms=0))
        run_until_done(engine)

    return draw


def training(spec: ModelSpec) -> Callable[[], object]:
    unet: UNet2DConditionModel = load_diffusers(spec, CPU, torch.float32).unet
    unet.train().requires_grad_(True)
    config = unet.config
    latents = torch.randn(TRAINED_ROWS, config.in_channels, config.sample_size, config.sample_size)
    states = torch.randn(TRAINED_ROWS, 16, config.cross_attention_dim)
    timesteps = torch.full((TRAINED_ROWS,), 500)

    @torch.enable_grad()
    def train() -> None:
        unet.zero_grad()
        unet(latents, timesteps, states).sample.square().mean().backward()

    return train


if __name__ == "__main__":
    main()
