"""Who gets in: a body becomes complete sampling parameters, and a job a place in the queue.

Keys, rates and deadlines of owners belong here too.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from app.callers import Caller
from app.errors import ModelNotReady, Overloaded, invalid, raises
from app.metrics import Metrics
from app.schemas import GenerationFields, LoraChoice
from broker.errors import BrokerError, BrokerUnavailable, QueueFull, ResultStoreFull
from broker.messages import (
    MAX_SEED,
    Decoder,
    ImageFormat,
    Job,
    LoraWeight,
    SamplingParams,
    WarmModel,
    WorkerInfo,
    cost_at,
)
from broker.redis_broker import Limits, RedisBroker, Submitted
from models.catalog import ModelSpec, Size, UnknownModelError, get_spec

DEFAULT_QUALITY = 85
WORKERS_CACHE_S = 1.0
NOT_READY_RETRY_MS = 5_000
MIN_RETRY_MS, MAX_RETRY_MS = 100, 60_000
# A refused caller comes back when this part of the full queue has been worked off.
RETRY_SHARE = 0.25


def new_request_id() -> str:
    """Unguessable: whoever knows it may read the generation."""
    return uuid.uuid4().hex


def draw_seed(num_images: int = 1) -> int:
    return secrets.randbelow(MAX_SEED - num_images + 2)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a route fills in where neither the request nor the model says anything.

    `seed` None draws one per request. `decoder` is what "auto" means; a model without a tiny decoder has only "full".
    """

    output_format: ImageFormat
    output_quality: int = DEFAULT_QUALITY
    previews: bool = False
    decoder: Decoder = "full"
    seed: int | None = None


def complete(fields: GenerationFields, spec: ModelSpec, defaults: Defaults) -> SamplingParams:
    """Every field filled in and checked against the model. Raises InvalidRequest that names the field."""
    num_images = _check_num_images(fields.num_images or 1, spec)
    width, height = _choose_size(fields.width, fields.height, spec)
    return SamplingParams(
        prompt=_check_prompt(fields.prompt, spec),
        negative_prompt=_check_length("negative_prompt", fields.negative_prompt, spec),
        width=width,
        height=height,
        num_inference_steps=check_steps("num_inference_steps", fields.num_inference_steps, spec),
        guidance_scale=_check_guidance(fields.guidance_scale, spec),
        seed=_choose_seed(fields.seed, num_images, defaults),
        scheduler=_check_scheduler(fields.scheduler, spec),
        num_images=num_images,
        decoder=choose_decoder("decoder", fields.decoder, spec, defaults.decoder),
        output_format=fields.output_format or defaults.output_format,
        output_quality=fields.output_quality or defaults.output_quality,
        previews=defaults.previews if fields.previews is None else fields.previews,
        metadata=fields.metadata is not False,
        loras=_check_loras(fields.loras or [], spec),
    )


def find_warnings(params: SamplingParams, spec: ModelSpec) -> tuple[str, ...]:
    """What is accepted but has no effect."""
    if not params.negative_prompt or spec.is_guided(params.guidance_scale):
        return ()
    if spec.guidance_embedded:
        return (f"negative_prompt has no effect: {spec.name} reads the guidance scale itself",)
    return (f"negative_prompt has no effect: guidance_scale is {params.guidance_scale:g} and must be above 1",)


def _check_prompt(prompt: str, spec: ModelSpec) -> str:
    if not prompt.strip():
        raise invalid("prompt", prompt, "it must say something")
    _check_length("prompt", prompt, spec)
    return prompt


def _check_length(param: str, text: str | None, spec: ModelSpec) -> str | None:
    if text is not None and len(text) > spec.max_prompt_chars:
        allowed = f"{spec.name} takes at most {spec.max_prompt_chars} characters, it has {len(text)}"
        raise invalid(param, text, allowed, code="text_too_long")
    return text


def _check_num_images(num_images: int, spec: ModelSpec) -> int:
    if num_images > spec.max_num_images:
        raise invalid("num_images", num_images, f"{spec.name} allows 1 to {spec.max_num_images}")
    return num_images


def _choose_size(width: int | None, height: int | None, spec: ModelSpec) -> Size:
    """The first listed size that fits what is given: the model's default where nothing is."""
    fitting = [size for size in spec.sizes if width in (None, size[0]) and height in (None, size[1])]
    if fitting:
        return fitting[0]
    param = "width" if width is not None and all(width != size[0] for size in spec.sizes) else "height"
    asked = f"{width}x{height}" if width is not None and height is not None else width or height
    raise invalid(param, asked, f"sizes of {spec.name}: {list_sizes(spec)}", code="unsupported_size")


def list_sizes(spec: ModelSpec) -> str:
    return ", ".join(f"{width}x{height}" for width, height in spec.sizes)


def check_steps(param: str, steps: int | None, spec: ModelSpec) -> int:
    allowed = spec.num_inference_steps
    if steps is not None and not allowed.min <= steps <= allowed.max:
        raise invalid(param, steps, f"{spec.name} allows {allowed.min} to {allowed.max}")
    return allowed.default if steps is None else steps


def _check_guidance(guidance_scale: float | None, spec: ModelSpec) -> float:
    allowed = spec.guidance_scale
    if guidance_scale is not None and not allowed.min <= guidance_scale <= allowed.max:
        raise invalid("guidance_scale", guidance_scale, f"{spec.name} allows {allowed.min:g} to {allowed.max:g}")
    return allowed.default if guidance_scale is None else float(guidance_scale)


def _check_scheduler(scheduler: str | None, spec: ModelSpec) -> str:
    if scheduler is not None and scheduler not in spec.schedulers:
        raise invalid("scheduler", scheduler, f"{spec.name} has {', '.join(spec.schedulers)}")
    return scheduler or spec.default_scheduler


def choose_decoder(param: str, choice: str | None, spec: ModelSpec, auto: Decoder) -> Decoder:
    match choice:
        case "full":
            return "full"
        case "tiny":
            if not spec.tiny_vae:
                raise invalid(param, choice, f"{spec.name} has only the full decoder")
            return "tiny"
        case _:
            return auto if spec.tiny_vae else "full"


def _choose_seed(seed: int | None, num_images: int, defaults: Defaults) -> int:
    if seed is None:
        seed = defaults.seed
    if seed is None:
        return draw_seed(num_images)
    if seed + num_images - 1 > MAX_SEED:
        raise invalid("seed", seed, f"image i is drawn from seed + i, which must stay within {MAX_SEED}")
    return seed


def _check_loras(loras: list[LoraChoice], spec: ModelSpec) -> tuple[LoraWeight, ...]:
    if loras:
        raise invalid("loras", loras[0].name, f"{spec.name} offers no style LoRAs", code="lora_not_found")
    return ()


class Fleet:
    """The live workers, asked for at most once a second however many requests come."""

    def __init__(self, broker: RedisBroker) -> None:
        self._broker = broker
        self._lock = asyncio.Lock()
        self._workers: list[WorkerInfo] = []
        self._fresh_until = 0.0

    async def workers(self) -> list[WorkerInfo]:
        async with self._lock:
            if time.monotonic() >= self._fresh_until:
                self._workers = await self._broker.workers()
                self._fresh_until = time.monotonic() + WORKERS_CACHE_S
            return self._workers


def find_warm(workers: Iterable[WorkerInfo], model: str) -> list[tuple[WorkerInfo, WarmModel]]:
    """The ready workers that hold `model` warm."""
    return [
        (worker, warm)
        for worker in workers
        if worker.state == "ready"
        for warm in worker.warm_models
        if warm.model == model
    ]


def cost_per_request_ms(warm: WarmModel, num_steps: int) -> float:
    """What one request of the default size costs a worker whose batch is as large as it should be."""
    costs = warm.sizes[0]
    batch_ms = num_steps * cost_at(costs.step_ms, costs.max_rows) + cost_at(costs.decode_ms, costs.max_rows)
    return warm.text_ms + batch_ms / costs.max_rows


def predict_wait_ms(workers: Iterable[WorkerInfo], spec: ModelSpec, position: int) -> int | None:
    """How long until a request with `position` others before it starts; None while no worker holds the model.

    From the workers' measured costs, at the model's default step count. Requests join a running batch at the next
    step, so those that find a free row hardly wait.
    """
    warm = find_warm(workers, spec.name)
    if not warm:
        return None
    free = sum(max(0, model.sizes[0].max_rows - worker.num_running) for worker, model in warm)
    costs = [cost_per_request_ms(model, spec.num_inference_steps.default) for _, model in warm]
    per_ms = sum(1 / max(cost, 0.01) for cost in costs)
    return math.ceil(max(0, position + 1 - free) / per_ms)


class Admission:
    """Puts jobs into the queue, or says why not and when to come back."""

    def __init__(
        self, broker: RedisBroker, fleet: Fleet, catalog: Mapping[str, ModelSpec], limits: Limits, metrics: Metrics
    ) -> None:
        self._broker, self._fleet, self._catalog = broker, fleet, catalog
        self._limits, self._metrics = limits, metrics

    @raises(UnknownModelError)
    def find_model(self, name: str, caller: Caller) -> ModelSpec:
        """Raises UnknownModelError that lists the models there are."""
        if name not in self._catalog:
            return get_spec(dict(self._catalog), name[:100])
        return self._catalog[name]

    @raises(ModelNotReady, Overloaded, BrokerUnavailable, BrokerError)
    async def submit(self, job: Job, caller: Caller) -> Submitted:
        """Raises ModelNotReady, Overloaded or BrokerUnavailable."""
        await self._check_ready(job.model)
        self._metrics.submitted(job)
        is_in = False
        try:
            submitted = await self._broker.submit(job, self._limits)
            is_in = True
        except (QueueFull, ResultStoreFull) as error:
            raise await self._overloaded(job, error) from error
        finally:
            if not is_in:
                self._metrics.forget(job.request_id)
        return submitted

    async def predict_start_ms(self, model: str, position: int) -> int | None:
        """When a request with `position` others before it starts."""
        return predict_wait_ms(await self._fleet.workers(), self._catalog[model], position)

    async def _check_ready(self, model: str) -> None:
        workers = await self._fleet.workers()
        if find_warm(workers, model):
            return
        doing = [f"{worker.worker_id} is {worker.state} {worker.detail}".rstrip() for worker in workers]
        state = f" ({'; '.join(doing)})" if doing else " (no worker is running)"
        message = f"no worker holds {model} ready yet{state}"
        raise ModelNotReady(message, param="model", retry_after_ms=NOT_READY_RETRY_MS)

    async def _overloaded(self, job: Job, error: QueueFull | ResultStoreFull) -> Overloaded:
        depth = error.depth if isinstance(error, QueueFull) else self._limits.max_depth
        wait_ms = await self.predict_start_ms(job.model, depth) or NOT_READY_RETRY_MS
        retry_ms = min(MAX_RETRY_MS, max(MIN_RETRY_MS, math.ceil(wait_ms * RETRY_SHARE)))
        code = "queue_full" if isinstance(error, QueueFull) else "result_store_full"
        return Overloaded(str(error), code=code, retry_after_ms=retry_ms)


def check_size_text(size: str | None, spec: ModelSpec) -> Size:
    """OpenAI's `size`: "WIDTHxHEIGHT", or "auto" for the model's default."""
    if size in (None, "auto"):
        return spec.default_size
    for width, height in spec.sizes:
        if size == f"{width}x{height}":
            return width, height
    message = f"sizes of {spec.name}: auto, {list_sizes(spec)}"
    raise invalid("size", size, message, code="unsupported_size")
