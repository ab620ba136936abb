"""What the families of latent diffusion share: a UNet with cross-attention, AutoencoderKL, a tiny decoder.

The arithmetic follows diffusers' own pipelines, which are the oracle of the engine's tests.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.families.base import DiffusersFamily
from models.families.latent_rgb import LatentRgb
from models.pipeline import Conditioning, to_device, to_pixels


class LatentDiffusion(DiffusersFamily):
    """`pipe` is a loaded diffusers pipeline of the family, `tiny_vae` an AutoencoderTiny for the same latents."""

    added_names: ClassVar[tuple[str, ...]] = ()  # what this family's UNet is told beside timestep and prompt

    def __init__(self, *arguments: Any, pipe: Any, tiny_vae: Any | None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.vae_scale_factor: int = pipe.vae_scale_factor
        self._latent_channels: int = pipe.unet.config.in_channels
        self._guidance_width: int | None = pipe.unet.config.time_cond_proj_dim
        self._embed_guidance = pipe.get_guidance_scale_embedding
        embedded = () if self._guidance_width is None else ("timestep_cond",)
        self._predict = self.compiled(unet_network, pipe.unet, (*self.added_names, *embedded))
        self._decode_full = self.fast(_decoder_network(pipe.vae))
        self._decode_tiny: Callable[[Tensor], Tensor] = (
            LatentRgb(_decoder_network(pipe.vae), self._latent_channels, self.vae_scale_factor, self.device)
            if tiny_vae is None
            else self.fast(_decoder_network(tiny_vae))
        )

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return self._latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def predict(
        self, latents: Tensor, timesteps: Tensor, conditionings: Sequence[Conditioning], guidance_scales: Tensor
    ) -> Tensor:
        inputs = [torch.stack([conditioning.encoded for conditioning in conditionings])]
        inputs += self.added_inputs(latents, conditionings)
        if self._guidance_width is not None:
            inputs.append(self._embed(guidance_scales))
        return self._predict(latents.to(self.dtype), timesteps, *(tensor.to(self.dtype) for tensor in inputs)).float()

    @abstractmethod
    def added_inputs(self, latents: Tensor, conditionings: Sequence[Conditioning]) -> list[Tensor]:
        """One tensor per name of `added_names`, rows first."""

    def _embed(self, guidance_scales: Tensor) -> Tensor:
        """A full LCM reads w = guidance - 1 as an embedding (Luo et al. 2023, section 4.2)."""
        embedding: Tensor = self._embed_guidance(guidance_scales - 1, embedding_dim=self._guidance_width)
        return to_device(embedding, self.device)

    def decode(self, latents: Tensor) -> Tensor:
        return to_pixels(self._decode_full(latents))

    def preview(self, latents: Tensor) -> Tensor:
        return to_pixels(self._decode_tiny(latents))


def truncated_text(tokenizer: Any, text: str) -> str:
    """What the tokenizer's length cuts off."""
    ids = tokenizer(text, truncation=False, verbose=False).input_ids
    max_length = tokenizer.model_max_length
    return "" if len(ids) <= max_length else str(tokenizer.decode(ids[max_length - 1 : -1])).strip()


def padded_ids(tokenizer: Any, texts: Sequence[str]) -> Any:
    """The tokenizer's output for all texts, cut and padded to the encoder's length."""
    max_length = tokenizer.model_max_length
    return tokenizer(list(texts), padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")


def unet_network(unet: Any, names: Sequence[str]) -> Callable[..., Tensor]:
    """`names` are diffusers' names of the inputs after latents, timesteps and prompt."""

    def network(latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor, *more: Tensor) -> Tensor:
        added = dict(zip(names, more, strict=True))
        timestep_cond = added.pop("timestep_cond", None)
        output: Tensor = unet(
            latents,
            timesteps,
            encoder_hidden_states=prompt_embeds,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added or None,
            return_dict=False,
        )[0]
        return output

    return network


def _decoder_network(vae: Any) -> Callable[..., Tensor]:
    def network(latents: Tensor) -> Tensor:
        image: Tensor = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return image

    return network
