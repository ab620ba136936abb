"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention, AutoencoderKL.

The arithmetic follows diffusers' StableDiffusionPipeline, which is the oracle of the engine's tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.catalog import ModelSpec
from models.pipeline import Conditioning, FewStepPipeline, to_pixels
from models.tracing import Network, Traced


class StableDiffusion(FewStepPipeline):
    """`pipe` is a loaded diffusers StableDiffusionPipeline, `tiny_vae` an AutoencoderTiny for the same latents.

    `scheduler_config` is the model folder's own, which every scheduler of the catalog entry starts from.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        dtype: torch.dtype,
        *,
        pipe: Any,
        tiny_vae: Any | None,
        scheduler_config: dict[str, Any],
    ) -> None:
        super().__init__(spec, device, dtype, scheduler_config)
        self._tokenizer = pipe.tokenizer
        self._text_encoder = pipe.text_encoder
        self._latent_channels: int = pipe.unet.config.in_channels
        self._vae_scale_factor: int = pipe.vae_scale_factor
        self._predict = self._fast(_unet_network(pipe.unet))
        self._decode_full = self._fast(_decoder_network(pipe.vae))
        self._decode_tiny = self._decode_full if tiny_vae is None else self._fast(_decoder_network(tiny_vae))

    def _fast(self, network: Network) -> Network:
        """On a CPU the interpreter is a third of a small step, so the network is recorded there."""
        return Traced(network) if self.device.type == "cpu" else network

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return self._latent_channels, height // self._vae_scale_factor, width // self._vae_scale_factor

    def encode_prompts(self, prompts: Sequence[str | None]) -> list[Conditioning]:
        texts = [prompt or "" for prompt in prompts]
        max_length = self._tokenizer.model_max_length
        tokens = self._tokenizer(
            texts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
        )
        use_mask = getattr(self._text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if use_mask else None
        embeds = self._text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
        return [Conditioning(embed.clone(), self._truncated(text)) for embed, text in zip(embeds, texts, strict=True)]

    def _truncated(self, text: str) -> str:
        ids = self._tokenizer(text, truncation=False, verbose=False).input_ids
        max_length = self._tokenizer.model_max_length
        if len(ids) <= max_length:
            return ""
        decoded: str = self._tokenizer.decode(ids[max_length - 1 : -1])
        return decoded.strip()

    def predict(self, latents: Tensor, timesteps: Tensor, conditionings: Sequence[Conditioning]) -> Tensor:
        prompt_embeds = torch.stack([conditioning.prompt_embeds for conditioning in conditionings])
        return self._predict(latents.to(self.dtype), timesteps, prompt_embeds.to(self.dtype)).float()

    def decode(self, latents: Tensor) -> Tensor:
        return to_pixels(self._decode_full(latents))

    def preview(self, latents: Tensor) -> Tensor:
        return to_pixels(self._decode_tiny(latents))


def _unet_network(unet: Any) -> Network:
    def network(latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        output: Tensor = unet(latents, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        return output

    return network


def _decoder_network(vae: Any) -> Network:
    def network(latents: Tensor) -> Tensor:
        image: Tensor = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return image

    return network
