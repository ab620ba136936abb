"""Warm means proven: real generations at every batch size, which also give the cost table."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from broker.messages import Delivery, Job, SamplingParams, WarmModel
from models.catalog import ModelSpec, Size
from workers.engine.engine import Engine, run_until_done
from workers.engine.outputs import Finished, GenerationFailed, PreviewReady
from workers.engine.request import RequestState

NUM_STEPS = 2
Progress = Callable[[str], None]


class WarmUpError(Exception):
    """A model whose warm-up gave no sound picture: it must not serve."""


def batch_sizes(max_batch_size: int) -> list[int]:
    """Powers of two up to the maximum, and the maximum."""
    powers = [2**i for i in range(max_batch_size.bit_length()) if 2**i < max_batch_size]
    return [*powers, max_batch_size]


def warm_up(engine: Engine, model: str, report: Progress = lambda _: None) -> WarmModel:
    """Proves `model` at each of its warm sizes and batch sizes. Raises WarmUpError when a picture isn't sound."""
    spec = engine.runners[model].pipeline.spec
    sizes = batch_sizes(spec.max_batch_size)
    costs: dict[int, list[RequestState]] = {}
    for size in spec.warm_sizes:
        for num_rows in sizes:
            report(f"{size[0]}x{size[1]}, batch {num_rows}")
            _generate(engine, spec, size, num_rows, previews=True)  # pays for allocations and compilations
            costs.setdefault(num_rows, _generate(engine, spec, size, num_rows))
    return WarmModel(
        model=model,
        revision=spec.public_revision,
        sizes=tuple(spec.warm_sizes),
        max_batch_size=spec.max_batch_size,
        text_ms=_text_ms(engine, spec),
        step_ms={n: round(median(ms for r in requests for ms in r.steps_ms), 3) for n, requests in costs.items()},
        decode_ms={n: round(median(r.decode_ms for r in requests), 3) for n, requests in costs.items()},
    )


def num_warm_ups(spec: ModelSpec) -> int:
    """How often `warm_up` reports."""
    return len(spec.warm_sizes) * len(batch_sizes(spec.max_batch_size))


def _generate(
    engine: Engine, spec: ModelSpec, size: Size, num_rows: int, *, previews: bool = False
) -> list[RequestState]:
    for index in range(num_rows):
        engine.add(Delivery(_job(spec, size, index, previews=previews), attempt=1, waited_ms=0))
    outputs = run_until_done(engine)
    for output in outputs:
        if isinstance(output, GenerationFailed):
            raise WarmUpError(f"{spec.name} failed at {size[0]}x{size[1]}, batch {num_rows}: {output.error}")
    for output in outputs:
        if isinstance(output, Finished | PreviewReady):
            _check_picture(spec, output)
    return [output.request for output in outputs if isinstance(output, Finished)]


def _check_picture(spec: ModelSpec, output: Finished | PreviewReady) -> None:
    denoising = output.request.denoising
    assert denoising is not None
    if not torch.isfinite(denoising.latents).all():
        raise WarmUpError(f"{spec.name}: the network gave latents that are not finite")
    if np.ptp(output.pixels) == 0:
        kind = "preview" if isinstance(output, PreviewReady) else "picture"
        raise WarmUpError(f"{spec.name}: the {kind} is one constant colour; an fp16 VAE that overflows does that")


def _text_ms(engine: Engine, spec: ModelSpec) -> float:
    """One prompt that no cache holds."""
    engine.add(Delivery(_job(spec, spec.default_size, 0, prompt="a prompt that nobody sent"), attempt=1, waited_ms=0))
    outputs = run_until_done(engine)
    return round(next(output.request.text_ms for output in outputs if isinstance(output, Finished)), 3)


def _job(spec: ModelSpec, size: Size, index: int, prompt: str = "warm-up", previews: bool = False) -> Job:
    params = SamplingParams(
        prompt=prompt,
        negative_prompt=None,
        width=size[0],
        height=size[1],
        num_inference_steps=min(NUM_STEPS, spec.num_inference_steps.max),
        guidance_scale=spec.guidance_scale.default,
        seed=index,
        scheduler=spec.default_scheduler,
        num_images=1,
        decoder="full",
        output_format="png",
        output_quality=85,
        previews=previews,
        metadata=False,
    )
    return Job(f"warm-up-{index}", spec.name, params, lane="api", owner="", gateway_id=None, keep_s=0)
