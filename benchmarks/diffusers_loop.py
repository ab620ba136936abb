"""diffusers' own pipeline in a loop: at batch 1 the floor for the latency of one picture, in large batches the ceiling
for pictures per second.

Prints a line of JSON when it is ready, then answers each line of its input, a number of seconds, with a line of JSON:
the milliseconds of every call in that time. Prompts, steps, size and file format are those of the service.
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
from collections.abc import Iterator, Sequence
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from benchmarks.prompts import endless_prompts
from models.catalog import ModelSpec, get_spec, load_catalog
from models.loading import default_device, default_dtype, load_diffusers
from workers.images import PNG_COMPRESS_LEVEL

TRIALS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument(
        "--threads", type=int, required=True, help="torch threads; 0 takes the faster of 1 and all cores"
    )
    options = parser.parse_args()

    hush_libraries()
    spec = get_spec(load_catalog(), options.model)
    pipe = load_diffusers(spec, default_device(), parse_dtype(options.dtype))
    prompts = endless_prompts(seed=1)
    torch.set_num_threads(options.threads or fastest_threads(pipe, spec, options.steps, prompts))
    batch_size: int = options.batch_size
    draw(pipe, spec, options.steps, take(prompts, batch_size), range(batch_size))
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(timed_loop(pipe, spec, options.steps, prompts, float(line), batch_size)), flush=True)


def timed_loop(
    pipe: Any, spec: ModelSpec, steps: int, prompts: Iterator[str], seconds: float, batch_size: int
) -> list[float]:
    latencies_ms: list[float] = []
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        started_s = time.perf_counter()
        seed = len(latencies_ms) * batch_size
        draw(pipe, spec, steps, take(prompts, batch_size), range(seed, seed + batch_size))
        latencies_ms.append((time.perf_counter() - started_s) * 1000)
    return latencies_ms


def take(prompts: Iterator[str], count: int) -> list[str]:
    return list(itertools.islice(prompts, count))


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
    transformers.logging.set_verbosity_error()


def fastest_threads(pipe: Any, spec: ModelSpec, steps: int, prompts: Iterator[str]) -> int:
    """One thread or all, whichever is faster: small networks are often slower on more. The trials alternate."""
    times_s: dict[int, list[float]] = {1: [], os.cpu_count() or 1: []}
    for trial in range(TRIALS):
        for threads, times in times_s.items():
            torch.set_num_threads(threads)
            draw(pipe, spec, steps, take(prompts, 1), [trial])  # settles the thread pool
            started_s = time.perf_counter()
            draw(pipe, spec, steps, take(prompts, 1), [trial])
            times.append(time.perf_counter() - started_s)
    return min(times_s, key=lambda threads: statistics.median(times_s[threads]))


if __name__ == "__main__":
    main()
