"""Stable Diffusion 1.x and 2.x: one CLIP text encoder. diffusers' StableDiffusionPipeline is the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from models.families.latent_diffusion import LatentDiffusion, padded_ids, truncated_text
from models.pipeline import Conditioning


class StableDiffusion(LatentDiffusion):
    def __init__(self, *arguments: Any, pipe: Any, **named: Any) -> None:
        super().__init__(*arguments, pipe=pipe, **named)
        self._tokenizer = pipe.tokenizer
        self._reads_mask: bool = getattr(pipe.text_encoder.config, "use_attention_mask", False)
        self._encode = self.fast(text_network(pipe.text_encoder))

    def encode_prompts(self, prompts: Sequence[str | None]) -> list[Conditioning]:
        texts = [prompt or "" for prompt in prompts]
        tokens = padded_ids(self._tokenizer, texts)
        inputs = [tokens.input_ids, tokens.attention_mask] if self._reads_mask else [tokens.input_ids]
        embeds = self._encode(*(tensor.to(self.device) for tensor in inputs))
        return [
            Conditioning(embed.clone(), truncated=truncated_text(self._tokenizer, text))
            for embed, text in zip(embeds, texts, strict=True)
        ]

    def added_inputs(self, _latents: Tensor, _conditionings: Sequence[Conditioning]) -> list[Tensor]:
        return []


def text_network(text_encoder: Any) -> Callable[..., Tensor]:
    def network(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        embeds: Tensor = text_encoder(input_ids, attention_mask=attention_mask)[0]
        return embeds

    return network
