"""The one place that computes: gathers rows, runs one forward, scatters the results."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from broker.messages import LoraWeight, WarmModel
from models.catalog import ModelSpec, Size
from models.loras import ChosenLora
from models.pipeline import Conditioning, FewStepPipeline, to_device
from models.schedules import predict_x0
from workers.engine.decoding import PendingPixels, decoder_for
from workers.engine.outputs import Finished, Pixels, PreviewReady
from workers.engine.previews import PreviewBudget
from workers.engine.request import Denoising, RequestState

MAX_CACHED_PROMPTS = 1024

PromptKey = tuple[str | None, Hashable]  # a text, and the LoRAs that it was encoded with


@dataclass(frozen=True, slots=True, eq=False)
class Decoding:
    """Pictures of one request on their way: those after step `preview_step`, or its final ones."""

    request: RequestState
    pixels: PendingPixels
    preview_step: int | None = None

    def is_ready(self) -> bool:
        return self.pixels.is_ready()

    def output(self) -> PreviewReady | Finished:
        """Waits where the pixels aren't ready."""
        pixels, decode_ms = self.pixels.collect()
        if self.preview_step is not None:
            return PreviewReady(self.request, self.preview_step, pixels)
        self.request.decode_ms = decode_ms
        return Finished(self.request, pixels)


class ModelRunner:
    """One warm model. `padded_sizes` are the row counts its network runs at (None: any); others are padded up to one.

    `warm_model` is what warm-up measured; until then every step is waited for. `observe_prompts(hits, misses)` hears
    how many prompts of each new batch were already encoded, `observe_check(num_pictures, seconds)` of each batch of the
    safety checker, `observe_switch(seconds)` of each change of LoRAs. `switch_s` is what the last change took.
    """

    def __init__(self, pipeline: FewStepPipeline, padded_sizes: Sequence[int] | None = None) -> None:
        self.pipeline = pipeline
        self.warm_model: WarmModel | None = None
        self.observe_prompts: Callable[[int, int], None] = lambda *_: None
        self.observe_check: Callable[[int, float], None] = lambda *_: None
        self.observe_switch: Callable[[float], None] = lambda _: None
        self.switch_s = 0.0
        self._padded_sizes = padded_sizes
        self._prompts: OrderedDict[PromptKey, Conditioning] = OrderedDict()
        self._decoder = decoder_for(pipeline.device)
        self._previews = PreviewBudget()
        self._used_loras: tuple[ChosenLora, ...] = ()
        self._last_step: Any = None  # a torch.cuda.Event

    def max_rows(self, size: Size) -> int:
        """How far a batch of this size may grow."""
        if self.warm_model is None:
            return self.pipeline.spec.max_batch_size
        return self.warm_model.find_costs(*size).max_rows

    def expect(self, requests: Sequence[RequestState]) -> None:
        """Which requests the coming calls are for: new ones and those that are under way."""
        self.pipeline.expect_rows(sum(request.num_rows for request in requests))

    def fetch_loras(self, loras: Iterable[LoraWeight]) -> tuple[ChosenLora, ...]:
        """What a request asked for; files that aren't in memory are read meanwhile."""
        return self.pipeline.loras.fetch((lora.name, lora.weight) for lora in loras)

    def use_loras(self, loras: tuple[ChosenLora, ...]) -> None:
        """All that follows is computed with these. Raises LoadError for one that can't be read."""
        if loras != self._used_loras:
            self._finish_launched()  # else the step under way would count as part of the switch
        started_s, self._used_loras = time.perf_counter(), loras
        if self.pipeline.loras.use(loras):
            self._finish_launched()
            self.switch_s = time.perf_counter() - started_s
            self.observe_switch(self.switch_s)

    def _finish_launched(self) -> None:
        if self.pipeline.device.type == "cuda":
            torch.cuda.current_stream(self.pipeline.device).synchronize()

    def prepare(self, requests: Sequence[RequestState]) -> None:
        """Encodes the prompts of new requests in one batch and draws the noise of each. All have the same LoRAs."""
        started_s = time.perf_counter()
        self._encode({key for request in requests for key in self._prompt_keys(request)})
        text_ms = _ms_since(started_s)
        for request in requests:
            request.joined_s, request.text_ms = started_s, text_ms
            request.denoising = self._start(request)
        while len(self._prompts) > MAX_CACHED_PROMPTS:
            self._prompts.popitem(last=False)

    def update(self, spec: ModelSpec) -> None:
        """Takes over what a new reading of the catalog says; what must stay as it was loaded is already kept in it.
        Requests under way keep the LoRAs that they have."""
        self.pipeline.update(spec)
        self.forget_prompts()
        if self.warm_model is not None:
            self.set_warm(self.warm_model)

    def set_warm(self, measured: WarmModel) -> WarmModel:
        """What was measured, and by which entry it draws now."""
        spec = self.pipeline.spec
        self.warm_model = replace(measured, fingerprint=spec.fingerprint, loras=tuple(spec.loras))
        return self.warm_model

    def forget_prompts(self) -> None:
        self._prompts.clear()

    def step(self, requests: Sequence[RequestState]) -> list[Decoding]:
        """One denoising step of every request, in one forward pass. Returns the previews that it started."""
        started_s = time.perf_counter()
        states = [_denoising(request) for request in requests]
        inputs = [state.model_input() for state in states]
        outputs = self._predict(states, inputs)
        previewed = set(self._choose_previews(requests))
        x0s: dict[RequestState, Tensor] = {}
        for request, state, model_input, output in zip(requests, states, inputs, outputs, strict=True):
            model_output, timestep = state.guide(output), state.timestep
            state.advance(model_output)
            if request in previewed:
                x0s[request] = predict_x0(state.schedule, model_output, timestep, model_input)
        self._keep_pace()
        for request in requests:
            request.steps_ms.append(_ms_since(started_s))
            request.denoised_s = time.perf_counter()
        return self._preview(x0s)

    def decode(self, requests: Sequence[RequestState]) -> list[Decoding]:
        """Starts to decode finished requests, each by the decoder that it asked for."""
        decodings: list[Decoding] = []
        for name, decode in (("full", self.pipeline.decode), ("tiny", self.pipeline.preview)):
            chosen = [request for request in requests if request.params.decoder == name]
            if chosen:
                pending = self._decoder.start(decode, [_denoising(request).latents for request in chosen])
                decodings += [Decoding(*pair) for pair in zip(chosen, pending, strict=True)]
        return decodings

    def check(self, images: Sequence[Pixels]) -> list[bool]:
        """Which pictures "height width 3" the safety checker blocks, in batches no larger than warm-up has seen."""
        largest = self.pipeline.spec.max_batch_size
        batches = (images[start : start + largest] for start in range(0, len(images), largest))
        return [is_blocked for batch in batches for is_blocked in self._check(batch)]

    def _check(self, images: Sequence[Pixels]) -> list[bool]:
        started_s = time.perf_counter()
        self.pipeline.expect_rows(len(images))
        padded = [*images, *[images[-1]] * self._padding(len(images))]
        verdicts = self.pipeline.check(padded)[: len(images)]
        self.observe_check(len(images), time.perf_counter() - started_s)
        return verdicts

    def ensure_device(self) -> None:
        """Raises again where the device itself is lost: then nothing can run in this process any more."""
        if self.pipeline.device.type == "cuda":
            torch.cuda.synchronize(self.pipeline.device)

    def _encode(self, keys: Collection[PromptKey]) -> None:
        missing = [key for key in keys if key not in self._prompts]
        self.observe_prompts(len(keys) - len(missing), len(missing))
        if missing:
            padded = missing + missing[-1:] * self._padding(len(missing))
            conditionings = self.pipeline.encode_prompts([text for text, _ in padded])
            self._prompts.update(zip(missing, conditionings, strict=False))
        for key in keys:
            self._prompts.move_to_end(key)

    def _prompt_keys(self, request: RequestState) -> list[PromptKey]:
        """The prompt's, and with guidance the negative one's."""
        loras = self.pipeline.loras.of_text(request.loras)
        params = request.params
        texts = [params.prompt, params.negative_prompt] if request.is_guided else [params.prompt]
        return [(text, loras) for text in texts]

    def _start(self, request: RequestState) -> Denoising:
        params = request.params
        factory = self.pipeline.schedules[params.scheduler]
        schedule = factory.new(params.num_inference_steps)
        # A generator per image, on the CPU: the same noise on every device and whoever shares the batch.
        generators = [torch.Generator("cpu").manual_seed(params.seed + i) for i in range(params.num_images)]
        shape = self.pipeline.latent_shape(params.width, params.height)
        conditionings = [self._prompts[key] for key in self._prompt_keys(request)]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return Denoising(
            latents=to_device(noise, self.pipeline.device) * schedule.init_noise_sigma,
            schedule=schedule,
            step_arguments=factory.step_arguments | ({"generator": generators} if factory.takes_generator else {}),
            conditioning=conditionings[0],
            negative=conditionings[1] if request.is_guided else None,
            guidance_scale=params.guidance_scale,
        )

    def _predict(self, states: Sequence[Denoising], inputs: Sequence[Tensor]) -> list[Tensor]:
        rows = [state.repeat_for_guidance(model_input) for state, model_input in zip(states, inputs, strict=True)]
        conditionings = [conditioning for state in states for conditioning in state.conditionings]
        numbers = [
            torch.tensor([[float(state.timestep)], [state.guidance_scale]]).expand(2, len(row))
            for state, row in zip(states, rows, strict=True)
        ]
        latents, timesteps_and_scales = torch.cat(rows), torch.cat(numbers, dim=1)
        padding = self._padding(len(latents))
        if padding:
            latents = torch.cat([latents, latents[-1:].expand(padding, -1, -1, -1)])
            timesteps_and_scales = torch.nn.functional.pad(timesteps_and_scales, (0, padding), mode="replicate")
            conditionings += conditionings[-1:] * padding
        timesteps, guidance_scales = timesteps_and_scales
        timesteps = to_device(timesteps, self.pipeline.device)
        output = self.pipeline.predict(latents, timesteps, conditionings, guidance_scales)
        return list(torch.split(output[: len(output) - padding], [len(row) for row in rows]))

    def _padding(self, num_rows: int) -> int:
        if self._padded_sizes is None:
            return 0
        return min((size for size in self._padded_sizes if size >= num_rows), default=num_rows) - num_rows

    def _keep_pace(self) -> None:
        """Lets the host prepare the next step while a GPU computes this one, but run no further ahead: a stop would
        come late, and the measured time of a step would be that of its launch."""
        if self.pipeline.device.type != "cuda":
            return
        before, self._last_step = self._last_step, cast(Any, torch.cuda.Event)()
        self._last_step.record(torch.cuda.current_stream(self.pipeline.device))
        awaited = self._last_step if self.warm_model is None else before
        if awaited is not None:
            awaited.synchronize()

    def _choose_previews(self, requests: Sequence[RequestState]) -> list[RequestState]:
        wanted = [request for request in requests if request.wants_preview]
        if not wanted or self.warm_model is None:
            return wanted
        costs = self.warm_model.find_costs(*requests[0].size)
        return self._previews.choose(wanted, costs, sum(request.num_rows for request in requests))

    def _preview(self, x0s: Mapping[RequestState, Tensor]) -> list[Decoding]:
        if not x0s:
            return []
        pending = self._decoder.start(self.pipeline.preview, list(x0s.values()))
        return [Decoding(request, pixels, request.step_index) for request, pixels in zip(x0s, pending, strict=True)]


def _denoising(request: RequestState) -> Denoising:
    assert request.denoising is not None, f"{request.request_id} was not prepared"
    return request.denoising


def _ms_since(started_s: float) -> float:
    return (time.perf_counter() - started_s) * 1000
