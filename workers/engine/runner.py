"""The one place that computes: gathers rows, runs one forward, scatters the results."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from models.pipeline import Conditioning, FewStepPipeline
from models.schedules import predict_x0
from workers.engine.outputs import Pixels, PreviewReady
from workers.engine.request import Denoising, RequestState

MAX_CACHED_PROMPTS = 1024


class ModelRunner:
    """One warm model. `batch_sizes` are the row counts its network runs at (None: any); others are padded up to one.

    `observe_prompts(hits, misses)` hears how many prompts of each new batch were already encoded.
    """

    def __init__(
        self,
        pipeline: FewStepPipeline,
        batch_sizes: Sequence[int] | None = None,
        observe_prompts: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        self.pipeline = pipeline
        self._batch_sizes = batch_sizes
        self._observe_prompts = observe_prompts
        self._prompts: OrderedDict[str | None, Conditioning] = OrderedDict()

    def prepare(self, requests: Sequence[RequestState]) -> None:
        """Encodes the prompts of new requests in one batch and draws the noise of each."""
        started_s = time.perf_counter()
        self._encode({text for request in requests for text in _texts(request)})
        text_ms = _ms_since(started_s)
        for request in requests:
            request.joined_s, request.text_ms = started_s, text_ms
            request.denoising = self._start(request)
        while len(self._prompts) > MAX_CACHED_PROMPTS:
            self._prompts.popitem(last=False)

    def step(self, requests: Sequence[RequestState]) -> list[PreviewReady]:
        """One denoising step of every request, in one forward pass."""
        started_s = time.perf_counter()
        states = [_denoising(request) for request in requests]
        inputs = [state.model_input() for state in states]
        outputs = self._predict(states, inputs)
        wanted: list[tuple[RequestState, Tensor]] = []
        for request, state, model_input, output in zip(requests, states, inputs, outputs, strict=True):
            model_output, timestep = state.guide(output), state.timestep
            state.advance(model_output)
            if request.wants_preview:
                wanted.append((request, predict_x0(state.schedule, model_output, timestep, model_input)))
        for request in requests:
            request.steps_ms.append(_ms_since(started_s))
            request.denoised_s = time.perf_counter()
        return self._preview(wanted)

    def decode(self, requests: Sequence[RequestState]) -> list[Pixels]:
        """The pixels of finished requests, by the decoder each one asked for."""
        decoders = {"full": self.pipeline.decode, "tiny": self.pipeline.preview}
        pixels: dict[str, Pixels] = {}
        for name, decode in decoders.items():
            chosen = [request for request in requests if request.params.decoder == name]
            if not chosen:
                continue
            started_s = time.perf_counter()
            decoded = decode(torch.cat([_denoising(request).latents for request in chosen])).cpu()
            for request, part in zip(chosen, _split(decoded, chosen), strict=True):
                request.decode_ms = _ms_since(started_s)
                pixels[request.request_id] = part.numpy()
        return [pixels[request.request_id] for request in requests]

    def _encode(self, texts: Collection[str | None]) -> None:
        missing = [text for text in texts if text not in self._prompts]
        self._observe_prompts(len(texts) - len(missing), len(missing))
        if missing:
            self._prompts.update(zip(missing, self.pipeline.encode_prompts(missing), strict=True))
        for text in texts:
            self._prompts.move_to_end(text)

    def _start(self, request: RequestState) -> Denoising:
        params = request.params
        factory = self.pipeline.schedules[params.scheduler]
        schedule = factory.new(params.num_inference_steps)
        # A generator per image, on the CPU: the same noise on every device and whoever shares the batch.
        generators = [torch.Generator("cpu").manual_seed(params.seed + i) for i in range(params.num_images)]
        shape = self.pipeline.latent_shape(params.width, params.height)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return Denoising(
            latents=noise.to(self.pipeline.device) * schedule.init_noise_sigma,
            schedule=schedule,
            step_arguments=factory.step_arguments | ({"generator": generators} if factory.takes_generator else {}),
            conditioning=self._prompts[params.prompt],
            negative=self._prompts[params.negative_prompt] if request.is_guided else None,
            guidance_scale=params.guidance_scale,
        )

    def _predict(self, states: Sequence[Denoising], inputs: Sequence[Tensor]) -> list[Tensor]:
        rows = [state.repeat_for_guidance(model_input) for state, model_input in zip(states, inputs, strict=True)]
        conditionings = [conditioning for state in states for conditioning in state.conditionings]
        timesteps = torch.cat(
            [state.timestep.float().expand(len(row)) for state, row in zip(states, rows, strict=True)]
        )
        latents = torch.cat(rows)
        padding = self._padding(len(latents))
        if padding:
            latents = torch.cat([latents, latents[-1:].expand(padding, -1, -1, -1)])
            timesteps = torch.cat([timesteps, timesteps[-1:].expand(padding)])
            conditionings += conditionings[-1:] * padding
        output = self.pipeline.predict(latents, timesteps.to(latents.device), conditionings)
        return list(torch.split(output[: len(output) - padding], [len(row) for row in rows]))

    def _padding(self, num_rows: int) -> int:
        if self._batch_sizes is None:
            return 0
        return min((size for size in self._batch_sizes if size >= num_rows), default=num_rows) - num_rows

    def _preview(self, wanted: Sequence[tuple[RequestState, Tensor]]) -> list[PreviewReady]:
        if not wanted:
            return []
        requests = [request for request, _ in wanted]
        pixels = self.pipeline.preview(torch.cat([x0 for _, x0 in wanted])).cpu()
        return [
            PreviewReady(request, request.step_index, part.numpy())
            for request, part in zip(requests, _split(pixels, requests), strict=True)
        ]


def _texts(request: RequestState) -> list[str | None]:
    return [request.params.prompt, request.params.negative_prompt] if request.is_guided else [request.params.prompt]


def _denoising(request: RequestState) -> Denoising:
    assert request.denoising is not None, f"{request.request_id} was not prepared"
    return request.denoising


def _split(pixels: Tensor, requests: Sequence[RequestState]) -> tuple[Tensor, ...]:
    sizes = [request.params.num_images for request in requests]
    return torch.split(pixels, sizes)


def _ms_since(started_s: float) -> float:
    return (time.perf_counter() - started_s) * 1000
