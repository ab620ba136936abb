"""diffusers' own pipeline in a loop: at batch 1 the floor for the latency of one picture, in large batches the ceiling
for pictures per second.

Tries its batch sizes and numbers of threads and keeps the fastest. Prints a line of JSON when it is ready, with what it
tried, then answers each line of its input, a number of seconds, with a line of JSON: the milliseconds of every call in
that time. Prompts, steps, size and file format are those of the service.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from benchmarks.shared.prompts import endless_prompts
from models.catalog import ModelSpec, get_spec, load_catalog
from models.loading import default_device, default_dtype, load_diffusers
from workers.images import PNG_COMPRESS_LEVEL

MIN_TRIALS, MAX_TRIALS = 3, 12
TRIALS_S = 10.0
THREADS = sorted({1, os.cpu_count() or 1})


@dataclass(frozen=True)
class Mode:
    """How the pipeline is called: torch's threads, and prompts per call."""

    threads: int
    batch_size: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], help="the one of most images/s is kept")
    parser.add_argument("--threads", type=int, required=True, help="torch threads; 0 tries 1 and all cores")
    options = parser.parse_args()

    hush_libraries()
    spec = get_spec(load_catalog(), options.model)
    loop = Loop(load_diffusers(spec, default_device(), parse_dtype(options.dtype)), spec, options.steps)
    threads = [options.threads] if options.threads else THREADS
    tried = loop.try_out([Mode(*mode) for mode in itertools.product(threads, options.batch_sizes)])
    best = fastest(tried)
    trials = [asdict(mode) | {"images_per_s": speed} for mode, speed in tried.items()]
    print(json.dumps(asdict(best) | {"trials": trials}), flush=True)
    for line in sys.stdin:
        print(json.dumps(loop.run(best, float(line))), flush=True)


class Loop:
    """One pipeline; every call has new prompts and seeds."""

    def __init__(self, pipe: Any, spec: ModelSpec, steps: int) -> None:
        self._pipe, self._spec, self._steps = pipe, spec, steps
        self._prompts, self._seeds = endless_prompts(seed=1), itertools.count()

    def run(self, mode: Mode, seconds: float) -> list[float]:
        """The milliseconds of each call."""
        torch.set_num_threads(mode.threads)
        end_s = time.perf_counter() + seconds
        times_ms = []
        while time.perf_counter() < end_s:
            times_ms.append(self._time_call_ms(mode.batch_size))
        return times_ms

    def try_out(self, modes: Iterable[Mode]) -> dict[Mode, float]:
        """Pictures per second in each mode. Small networks are often slower on more threads. The trials alternate."""
        times_ms: dict[Mode, list[float]] = {mode: [] for mode in modes}
        end_s = time.perf_counter() + TRIALS_S
        for trial in range(MAX_TRIALS):
            if trial >= MIN_TRIALS and time.perf_counter() > end_s:
                break
            for mode, times in times_ms.items():
                torch.set_num_threads(mode.threads)
                self._time_call_ms(mode.batch_size)  # settles the thread pool
                times.append(self._time_call_ms(mode.batch_size))
        return {mode: mode.batch_size * 1000 / statistics.median(times) for mode, times in times_ms.items()}

    def _time_call_ms(self, batch_size: int) -> float:
        started_s = time.perf_counter()
        prompts = list(itertools.islice(self._prompts, batch_size))
        draw(self._pipe, self._spec, self._steps, prompts, list(itertools.islice(self._seeds, batch_size)))
        return (time.perf_counter() - started_s) * 1000


def fastest(tried: Mapping[Mode, float]) -> Mode:
    return max(tried, key=lambda mode: tried[mode])


def parse_dtype(name: str) -> torch.dtype:
    """`auto` is the service's own choice for this machine."""
    return default_dtype(default_device()) if name == "auto" else getattr(torch, name)


def draw(pipe: Any, spec: ModelSpec, steps: int, prompts: Sequence[str], seeds: Sequence[int]) -> list[bytes]:
    """One picture per prompt, all in one call, as the bytes of PNG files."""
    width, height = spec.default_size
    images = pipe(
        list(prompts),
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=spec.guidance_scale.default,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
    ).images
    return [encode_png(image) for image in images]


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_COMPRESS_LEVEL)
    return buffer.getvalue()


def hush_libraries() -> None:
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
