"""Consistency models (Song et al. 2023): class-conditional, in pixel space, from noise to picture in one or two steps.

diffusers' ConsistencyModelPipeline is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.catalog import ClassNames
from models.families.base import DiffusersFamily
from models.pipeline import Conditioning, to_device, to_pixels


class ConsistencyModel(DiffusersFamily):
    """What the engine calls latents are pixels here: there is no decoder, and a preview costs nothing."""

    def __init__(self, *arguments: Any, pipe: Any, tiny_vae: None, **named: Any) -> None:
        assert tiny_vae is None, "there are no latents to decode"
        super().__init__(*arguments, **named)
        self._channels: int = pipe.unet.config.in_channels
        self._predict = self.compiled(unet_network, pipe.unet)

    @property
    def _classes(self) -> ClassNames:
        classes = self.spec.class_names
        assert classes is not None, f"{self.spec.name}: the catalog gives this family its classes"
        return classes

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return self._channels, height, width

    def sample_prompt(self, number: int) -> str:
        return f"class {number % len(self._classes)}"

    def encode_prompts(self, prompts: Sequence[str | None]) -> list[Conditioning]:
        """Each prompt names a class. Raises UnknownClassError."""
        numbers = torch.tensor([self._classes.find(prompt or "") for prompt in prompts])
        return [Conditioning(number) for number in to_device(numbers, self.device)]

    def predict(
        self, latents: Tensor, timesteps: Tensor, conditionings: Sequence[Conditioning], _guidance_scales: Tensor
    ) -> Tensor:
        classes = torch.stack([conditioning.encoded for conditioning in conditionings])
        return self._predict(latents.to(self.dtype), timesteps, classes).float()

    def decode(self, latents: Tensor) -> Tensor:
        return to_pixels(latents)

    def preview(self, latents: Tensor) -> Tensor:
        return to_pixels(latents)


def unet_network(unet: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def network(pixels: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
        output: Tensor = unet(pixels, timesteps, class_labels=classes, return_dict=False)[0]
        return output

    return network
