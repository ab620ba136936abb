"""One meaning for every model family: what the engine may ask of a model, and nothing else.

Shapes are einops strings: b rows, c latent channels, h w latent pixels, t tokens, d embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.catalog import ModelSpec
from models.loras import StyleLoras
from models.schedules import ScheduleFactory


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the network is told about one prompt: `encoded` "t d", and `pooled` "p" where the family has one. To a
    class-conditional network a prompt is a class, and `encoded` "" its number.

    `truncated` is the text that the tokenizer's length cut off.
    """

    encoded: Tensor
    pooled: Tensor | None = None
    truncated: str = ""


class FewStepPipeline(ABC):
    """The parts of one loaded model behind one meaning.

    All latents that go in or come out are float32 on `device`, whatever `dtype` the networks compute in, so that noise
    and schedule arithmetic are the same everywhere. `loras` are the model's style LoRAs; not every family has
    them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        dtype: torch.dtype,
        scheduler_config: dict[str, Any],
        revision: str,
        loras: StyleLoras,
    ) -> None:
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self.revision = revision
        self._scheduler_config = scheduler_config
        self.schedules = self._make_schedules(spec)
        self.loras = loras

    def update(self, spec: ModelSpec) -> None:
        """Goes by another reading of its entry from now on. Schedulers that are gone still serve who asked for them."""
        self.schedules |= self._make_schedules(spec)
        self.loras.know(spec.loras)
        self.spec = spec

    def _make_schedules(self, spec: ModelSpec) -> dict[str, ScheduleFactory]:
        return {name: ScheduleFactory(scheduler, self._scheduler_config) for name, scheduler in spec.schedulers.items()}

    @abstractmethod
    def expect_rows(self, num_rows: int) -> None:
        """How many rows the batch has that the coming calls belong to: a device may share its cores by that."""

    @abstractmethod
    def row_counts(self, max_rows: int) -> list[int]:
        """The row counts up to `max_rows` that a device must have seen to have all its kernels ready."""

    @abstractmethod
    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of a picture of `width` by `height` pixels."""

    def sample_prompt(self, number: int) -> str:
        """A prompt that this model takes, for a warm-up: another one for another number, as far as there are more."""
        return f"sample {number}"

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str | None]) -> list[Conditioning]:
        """One conditioning per prompt; None stands for a negative prompt that was not given."""

    @abstractmethod
    def predict(
        self, latents: Tensor, timesteps: Tensor, conditionings: Sequence[Conditioning], guidance_scales: Tensor
    ) -> Tensor:
        """The network's output "b c h w" for latents "b c h w" at timesteps "b", one conditioning per row.

        `guidance_scales` "b", on the CPU, is read by networks that embed it (`spec.guidance` "embedded") alone.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures as uint8 "b height width 3", on `device`, by the full decoder where the family has decoders."""

    @abstractmethod
    def check(self, images: Sequence[NDArray[np.uint8]]) -> list[bool]:
        """Which pictures "height width 3", of any sizes, the safety checker blocks. Only where the entry has one."""

    @abstractmethod
    def preview(self, latents: Tensor) -> Tensor:
        """As `decode`, by the tiny decoder; where the model has none, by a linear map from latents to colours."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From the CPU, without making the host wait for what a GPU still computes."""
    return tensor.contiguous().pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def to_pixels(images: Tensor) -> Tensor:
    """Decoder output "b 3 height width" in [-1, 1] to uint8 "b height width 3", rounded as diffusers does."""
    pixels = (images.float() / 2 + 0.5).clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
