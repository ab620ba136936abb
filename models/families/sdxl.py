"""Stable Diffusion XL: two text encoders, a pooled embedding and the picture's size as further conditions.

diffusers' StableDiffusionXLPipeline is the oracle (Podell et al. 2023, section 2.2: micro-conditioning).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.families.latent_diffusion import LatentDiffusion, padded_ids, truncated_text
from models.pipeline import Conditioning


class StableDiffusionXL(LatentDiffusion):
    """Pictures are asked for uncropped and at their own size: original and target size are (height, width)."""

    added_names: ClassVar[tuple[str, ...]] = ("text_embeds", "time_ids")

    def __init__(self, *arguments: Any, pipe: Any, **named: Any) -> None:
        super().__init__(*arguments, pipe=pipe, **named)
        self._tokenizers = (pipe.tokenizer, pipe.tokenizer_2)
        self._encode = self.fast(text_network(pipe.text_encoder, pipe.text_encoder_2))
        self._known_time_ids: dict[tuple[int, int], Tensor] = {}
        self._has_zeros_for_none: bool = pipe.config.force_zeros_for_empty_prompt

    def encode_prompts(self, prompts: Sequence[str | None]) -> list[Conditioning]:
        texts = [prompt or "" for prompt in prompts]
        ids = [padded_ids(tokenizer, texts).input_ids.to(self.device) for tokenizer in self._tokenizers]
        embeds, pooled = self._encode(*ids)
        rows = zip(prompts, texts, embeds, pooled, strict=True)
        return [self._condition(prompt, text, embed.clone(), pool.clone()) for prompt, text, embed, pool in rows]

    def _condition(self, prompt: str | None, text: str, embeds: Tensor, pooled: Tensor) -> Conditioning:
        """A negative prompt that was not given is all zeros where the model says so; an empty one is not."""
        if prompt is None and self._has_zeros_for_none:
            return Conditioning(torch.zeros_like(embeds), torch.zeros_like(pooled))
        return Conditioning(embeds, pooled, truncated_text(self._tokenizers[0], text))

    def added_inputs(self, latents: Tensor, conditionings: Sequence[Conditioning]) -> list[Tensor]:
        pooled = [_pooled(conditioning) for conditioning in conditionings]
        return [torch.stack(pooled), self._time_ids(latents).expand(len(latents), -1)]

    def _time_ids(self, latents: Tensor) -> Tensor:
        """Original size, crop and target size; made once per size, since making it makes a GPU wait."""
        height, width = (side * self.vae_scale_factor for side in latents.shape[-2:])
        if (height, width) not in self._known_time_ids:
            ids = torch.tensor([height, width, 0, 0, height, width], dtype=self.dtype, device=self.device)
            self._known_time_ids[height, width] = ids
        return self._known_time_ids[height, width]


def _pooled(conditioning: Conditioning) -> Tensor:
    assert conditioning.pooled is not None, "a conditioning of another family"
    return conditioning.pooled


def text_network(text_encoder: Any, text_encoder_2: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Both encoders' last hidden states but one, side by side, and the second one's projected text embedding."""

    def network(input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        one = text_encoder(input_ids, output_hidden_states=True)
        two = text_encoder_2(input_ids_2, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two[0]

    return network
