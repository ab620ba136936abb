"""Warm means proven: real generations at every size and batch size, which also give the cost table."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from broker.messages import Delivery, Job, SizeCosts, WarmModel
from models.catalog import ModelSpec, Size
from models.networks import LoadError
from models.pipeline import FewStepPipeline
from workers.engine.decoding import Decode, decoder_for
from workers.engine.engine import POLL_S, Engine
from workers.engine.jobs import make_job
from workers.engine.outputs import Blocked, EngineOutput, Finished, GenerationFailed, Pixels, PreviewReady
from workers.engine.request import RequestState
from workers.engine.runner import ModelRunner

logger = logging.getLogger(__name__)

CPU_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
GPU_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
NUM_STEPS = 3
NUM_DECODES = 2
NUM_SWEEPS = 3
MAX_KERNELS_S = 3.0
# A larger batch must be cheaper per row by this much: measured times are never exact, and each row waits for all.
WORTHWHILE = 0.02
Progress = Callable[[str], None]
T = TypeVar("T")
Turns = Generator[None, None, T]  # work that may pause at each yield


class WarmUpError(Exception):
    """A model whose warm-up gave no sound picture: it must not serve."""


def warm_up(engine: Engine, model: str, report: Progress = lambda _: None) -> WarmModel:
    """Proves `model` at each of its warm sizes and batch sizes, and lets its runner go by what that cost.

    Raises WarmUpError when a picture isn't sound.
    """
    turns = warm_up_in_turns(engine, model, report)
    while True:
        try:
            next(turns)
        except StopIteration as end:
            warm_model: WarmModel = end.value
            return warm_model


def warm_up_in_turns(engine: Engine, model: str, report: Progress = lambda _: None) -> Turns[WarmModel]:
    """The same, with a pause after each step and each decode: other models of the device may have theirs meanwhile."""
    runner = engine.runners[model]
    spec = runner.pipeline.spec
    runner.warm_model = None
    rows = batch_sizes(spec, runner.pipeline.device)
    sizes: list[SizeCosts] = []
    for size in spec.warm_sizes:
        sizes.append((yield from _measure_size(engine, spec, size, rows, report)))
    text_ms = _text_ms(runner.pipeline)
    yield from _try_loras(runner, report)
    runner.forget_prompts()
    revision = runner.pipeline.revision
    return runner.set_warm(WarmModel(spec.name, revision, spec.max_batch_size, text_ms, tuple(sizes)))


def batch_sizes(spec: ModelSpec, device: torch.device) -> list[int]:
    """The row counts that are measured, up to the model's maximum; a GPU runs at no others."""
    sizes = GPU_BATCH_SIZES if device.type == "cuda" else CPU_BATCH_SIZES
    return [size for size in sizes if size < spec.max_batch_size] + [spec.max_batch_size]


def num_warm_ups(spec: ModelSpec, device: torch.device) -> int:
    """How often `warm_up` reports."""
    return len(spec.warm_sizes) * len(batch_sizes(spec, device)) * NUM_SWEEPS


def useful_rows(step_ms: Mapping[int, float]) -> int:
    """Where a batch should stop to grow.

    One more row makes the n others wait s(n+1) - s(n) longer each step, and spares whoever waits for it a step of
    s(n). That pays as long as the time per row still falls.
    """
    rows = sorted(step_ms)
    best = rows[0]
    for larger in rows[1:]:
        if step_ms[larger] / larger < (1 - WORTHWHILE) * step_ms[best] / best:
            best = larger
    return best


def _measure_size(
    engine: Engine, spec: ModelSpec, size: Size, rows: Sequence[int], report: Progress
) -> Turns[SizeCosts]:
    """The fastest of several tries, each some time after the last: what other work on the machine adds isn't the
    model's. The first one pays for allocations and recordings."""
    runner = engine.runners[spec.name]
    pipeline = runner.pipeline
    step_ms, decode_ms, preview_ms = (dict.fromkeys(rows, math.inf) for _ in range(3))
    check_ms = {} if spec.safety_checker is None else dict.fromkeys(rows, math.inf)
    for sweep in range(NUM_SWEEPS):
        for num_rows in rows:
            report(f"{size[0]}x{size[1]}, batch {num_rows}")
            finished = yield from _generate(engine, spec, size, num_rows, previews=sweep == 0)
            _note(step_ms, num_rows, min(ms for request in finished for ms in request.steps_ms))
            _note(decode_ms, num_rows, _decode_ms(pipeline, pipeline.decode, size, num_rows, of_rows=num_rows))
            _note(preview_ms, num_rows, _decode_ms(pipeline, pipeline.preview, size, num_rows, of_rows=rows[-1]))
            yield
            if check_ms:
                _note(check_ms, num_rows, _check_ms(runner, size, num_rows))
                yield
    yield from _make_kernels(engine, spec, size, rows)
    return SizeCosts(*size, useful_rows(step_ms), step_ms, decode_ms, preview_ms, check_ms)


def _note(table: dict[int, float], num_rows: int, ms: float) -> None:
    table[num_rows] = min(table[num_rows], round(ms, 3))


def _make_kernels(engine: Engine, spec: ModelSpec, size: Size, known: Sequence[int]) -> Turns[None]:
    """A CPU makes kernels for each number of rows: rather now than while somebody waits.

    A model so slow that this would take long has no use for it: beside its steps that time is nothing.
    """
    end_s = time.perf_counter() + MAX_KERNELS_S
    for num_rows in engine.runners[spec.name].pipeline.row_counts(spec.max_batch_size):
        if num_rows not in known and time.perf_counter() < end_s:
            yield from _generate(engine, spec, size, num_rows, previews=True, num_steps=2)


def _generate(
    engine: Engine,
    spec: ModelSpec,
    size: Size,
    num_rows: int,
    *,
    previews: bool = False,
    num_steps: int = NUM_STEPS,
) -> Turns[list[RequestState]]:
    for index in range(num_rows):
        # Each another, so that texts are encoded in batches too.
        prompt = engine.runners[spec.name].pipeline.sample_prompt(num_rows**2 + index)
        job = _job(spec, size, index, prompt, previews=previews, num_steps=num_steps)
        engine.add(Delivery(job, attempt=1, waited_ms=0))
    outputs = yield from _run(engine, engine.runners[spec.name])
    for output in outputs:
        if isinstance(output, GenerationFailed):
            raise WarmUpError(f"{spec.name} failed at {size[0]}x{size[1]}, batch {num_rows}: {output.error}")
        if output.request.is_alone:  # the engine went on with one row at a time
            where = f"{size[0]}x{size[1]}, batch {num_rows}"
            raise WarmUpError(f"{spec.name}: {where} ran only one by one: lower max_batch_size ({spec.max_batch_size})")
    for output in outputs:
        if isinstance(output, Finished | PreviewReady | Blocked):
            check_picture(engine.runners[spec.name].pipeline, output)
    return [output.request for output in outputs if isinstance(output, Finished | Blocked)]


def _run(engine: Engine, runner: ModelRunner) -> Turns[list[EngineOutput]]:
    outputs: list[EngineOutput] = []
    while engine.has_work:
        runner.ensure_device()  # waits for what other models still compute: not part of this one's time
        outputs += engine.step()
        yield
    return outputs


def _decode_ms(pipeline: FewStepPipeline, decode: Decode, size: Size, num_rows: int, *, of_rows: int) -> float:
    """All rows, as one request's in a batch of `of_rows`: a preview in company has fewer cores than one alone."""
    latents = torch.randn(num_rows, *pipeline.latent_shape(*size)).to(pipeline.device)
    decoder = decoder_for(pipeline.device)
    pipeline.expect_rows(of_rows)
    with torch.inference_mode():
        return min(decoder.start(decode, [latents])[0].collect()[1] for _ in range(NUM_DECODES))


def _check_ms(runner: ModelRunner, size: Size, num_rows: int) -> float:
    """Of that many pictures in one batch."""
    images = np.random.default_rng(0).integers(0, 256, (num_rows, size[1], size[0], 3), dtype=np.uint8)
    started_s = time.perf_counter()
    with torch.inference_mode():
        runner.check(list(images))
    return (time.perf_counter() - started_s) * 1000


def _pixels(pipeline: FewStepPipeline, output: Finished | PreviewReady | Blocked) -> Pixels:
    """A picture that the safety checker blocked must be sound too: it is drawn once more."""
    if not isinstance(output, Blocked):
        return output.pixels
    with torch.inference_mode():
        return pipeline.decode(_latents(output.request)).cpu().numpy()


def _latents(request: RequestState) -> torch.Tensor:
    assert request.denoising is not None
    return request.denoising.latents


def check_picture(pipeline: FewStepPipeline, output: Finished | PreviewReady | Blocked) -> None:
    """Raises WarmUpError for a picture that isn't sound."""
    spec, pixels = pipeline.spec, _pixels(pipeline, output)
    if not torch.isfinite(_latents(output.request)).all():
        raise WarmUpError(f"{spec.name}: the network gave latents that are not finite")
    if np.ptp(pixels) == 0:
        kind = "preview" if isinstance(output, PreviewReady) else "picture"
        raise WarmUpError(f"{spec.name}: the {kind} is one constant colour; an fp16 VAE that overflows does that")


def _try_loras(runner: ModelRunner, report: Progress) -> Turns[None]:
    """Reads and merges as many as stay in memory, each twice: the first merge makes room for the layers that it
    touches, the second one tells what a switch costs. Without one that can't be read the model still serves."""
    for choice in runner.pipeline.loras.fetch_first():
        report(f"LoRA {choice.name}")
        while not choice.is_read:
            time.sleep(POLL_S)
            yield
        try:
            for loras in ((choice,), (), (choice,), ()):
                runner.use_loras(loras)
                yield
        except LoadError as error:
            logger.error("requests for this LoRA will fail: %s", error)


def _text_ms(pipeline: FewStepPipeline) -> float:
    """One prompt that no cache holds."""
    pipeline.expect_rows(1)
    started_s = time.perf_counter()
    with torch.inference_mode():
        (conditioning,) = pipeline.encode_prompts([pipeline.sample_prompt(0)])
        conditioning.encoded.cpu()  # waits for the device
    return round((time.perf_counter() - started_s) * 1000, 3)


def _job(spec: ModelSpec, size: Size, index: int, prompt: str, *, previews: bool, num_steps: int) -> Job:
    width, height = size
    return make_job(
        spec,
        f"warm-up-{index}",
        prompt,
        width=width,
        height=height,
        num_inference_steps=min(num_steps, spec.num_inference_steps.max),
        guidance_scale=spec.guidance_scale.default if spec.guidance_embedded else 0.0,
        seed=index,
        previews=previews,
    )
