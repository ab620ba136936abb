"""What the engine remembers of one request."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from broker.messages import Abort, Delivery, Lane, SamplingParams
from models.catalog import ModelSpec, Size
from models.loras import ChosenLora
from models.pipeline import Conditioning
from models.schedules import Schedule

# How long a request of each lane may take before the scheduler calls it late.
PATIENCE_S: dict[Lane, float] = {"live": 0.2, "api": 1.0}


@dataclass(slots=True)
class Denoising:
    """The computation of one request, from any latents "n c h w" and any step of its private schedule on.

    `negative` is set where classifier-free guidance runs, which doubles the rows. All n images step together.
    """

    latents: Tensor
    schedule: Schedule
    step_arguments: dict[str, Any]
    conditioning: Conditioning
    negative: Conditioning | None
    guidance_scale: float
    step_index: int = 0

    @property
    def timestep(self) -> Tensor:
        timestep: Tensor = self.schedule.timesteps[self.step_index]
        return timestep

    @property
    def num_steps(self) -> int:
        return len(self.schedule.timesteps)

    @property
    def is_at_last_step(self) -> bool:
        return self.step_index == self.num_steps - 1

    @property
    def conditionings(self) -> list[Conditioning]:
        """One per row: all negative ones first, as diffusers orders them."""
        num_images = len(self.latents)
        negatives = [] if self.negative is None else [self.negative] * num_images
        return negatives + [self.conditioning] * num_images

    def model_input(self) -> Tensor:
        """What the network sees of each image now, "n c h w"."""
        return self.schedule.scale_model_input(self.latents, self.timestep)

    def repeat_for_guidance(self, model_input: Tensor) -> Tensor:
        return model_input if self.negative is None else torch.cat([model_input, model_input])

    def guide(self, output: Tensor) -> Tensor:
        """Classifier-free guidance (Ho and Salimans 2022) over the network's rows of this request."""
        if self.negative is None:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def advance(self, model_output: Tensor) -> None:
        self.latents = self.schedule.step(
            model_output, self.timestep, self.latents, **self.step_arguments, return_dict=False
        )[0]
        self.step_index += 1


@dataclass(slots=True, eq=False)
class RequestState:
    """One request from its arrival in the engine to its pixels. Times are `time.perf_counter()` seconds.

    `loras` are the style LoRAs that it asked for, whose files may still be being read.
    `asked_to_stop_s` is when its abort arrived, which may be in the middle of a step.
    """

    delivery: Delivery
    spec: ModelSpec
    loras: tuple[ChosenLora, ...] = ()
    is_alone: bool = False
    abort: Abort | None = None
    asked_to_stop_s: float = 0.0
    denoising: Denoising | None = None
    arrived_s: float = field(default_factory=time.perf_counter)
    joined_s: float = 0.0
    text_ms: float = 0.0
    decode_ms: float = 0.0
    check_ms: float = 0.0
    denoised_s: float = 0.0
    num_previews: int = 0
    steps_ms: list[float] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        return self.delivery.job.request_id

    @property
    def model(self) -> str:
        return self.delivery.job.model

    @property
    def params(self) -> SamplingParams:
        return self.delivery.job.params

    @property
    def size(self) -> Size:
        return self.params.width, self.params.height

    @property
    def is_guided(self) -> bool:
        return self.spec.is_guided(self.params.guidance_scale)

    @property
    def num_rows(self) -> int:
        return self.spec.num_rows(self.params.num_images, self.params.guidance_scale)

    @property
    def group(self) -> Hashable:
        """Requests of one group can share a forward pass."""
        alone = self.request_id if self.is_alone else None
        return self.model, self.size, self.loras, alone

    @property
    def is_ready(self) -> bool:
        """Whether it waits for nothing but its turn."""
        return all(choice.is_read for choice in self.loras)

    @property
    def submitted_s(self) -> float:
        return self.arrived_s - self.delivery.waited_ms / 1000

    @property
    def expires_s(self) -> float:
        """When its caller has no use for it any more; never, where no deadline was given."""
        deadline_ms = self.delivery.job.deadline_ms
        return math.inf if deadline_ms is None else self.submitted_s + deadline_ms / 1000

    @property
    def due_s(self) -> float:
        """What the scheduler goes by. It never moves: one day this request is the most urgent."""
        return min(self.expires_s, self.submitted_s + PATIENCE_S[self.delivery.job.lane])

    @property
    def step_index(self) -> int:
        return 0 if self.denoising is None else self.denoising.step_index

    @property
    def is_finished(self) -> bool:
        return self.denoising is not None and self.denoising.step_index == self.denoising.num_steps

    @property
    def wants_preview(self) -> bool:
        """After the coming step. The last one needs none: the picture itself is on the way. Nothing judges previews, so
        there are none where pictures are judged."""
        is_off = self.spec.safety_checker is not None
        return self.params.previews and not is_off and self.denoising is not None and not self.denoising.is_at_last_step

    def stop(self, abort: Abort, asked_s: float) -> None:
        """At the next step boundary. The first wish counts as the moment from which work is in vain."""
        if self.abort is None:
            self.asked_to_stop_s = asked_s
        self.abort = abort

    def restart(self) -> None:
        """Forget everything computed so far: the same seed will draw the same noise again."""
        self.denoising = None
        self.num_previews = 0
        self.steps_ms.clear()
