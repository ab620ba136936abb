"""UNets of three sizes to measure, and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.shared.architectures import MAX_TOKENS, SDXL_UNET
from benchmarks.shared.machine import REPOSITORY
from models.networks import settle

NAMES = ("mini", "mid", "full")
NUM_TIME_IDS = 6
MID_UNET = SDXL_UNET | {
    "block_out_channels": (128, 256, 512),
    "attention_head_dim": (2, 4, 8),
    "cross_attention_dim": 512,
    "transformer_layers_per_block": (1, 1, 2),
    "projection_class_embeddings_input_dim": NUM_TIME_IDS * 256 + 256,
}


@dataclass(frozen=True)
class Subject:
    """A UNet and how large its latents are."""

    name: str
    unet: Any
    side: int

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.unet.parameters())

    @property
    def added_names(self) -> tuple[str, ...]:
        """diffusers' names of the inputs that SDXL's layout has besides."""
        return ("text_embeds", "time_ids") if self.unet.config.addition_embed_type == "text_time" else ()

    def make_inputs(self, num_rows: int) -> tuple[Tensor, ...]:
        """Latents, timesteps, prompt, and what `added_names` says."""
        config, device = self.unet.config, self.unet.device
        shapes: list[tuple[int, ...]] = [
            (config.in_channels, self.side, self.side),
            (),
            (MAX_TOKENS, config.cross_attention_dim),
        ]
        if self.added_names:
            ids_width = NUM_TIME_IDS * config.addition_time_embed_dim
            shapes += [(config.projection_class_embeddings_input_dim - ids_width,), (NUM_TIME_IDS,)]
        inputs = [torch.randn(num_rows, *shape, device=device).to(self.unet.dtype) for shape in shapes]
        inputs[1] = torch.full((num_rows,), 999.0, device=device)
        return tuple(inputs)


def make_subject(name: str, device: torch.device, dtype: torch.dtype) -> Subject:
    """The bundled UNet, one of SDXL's layout in between (latents of 256x256), SDXL's own size (512x512)."""
    torch.manual_seed(0)
    if name == "mini":
        unet = UNet2DConditionModel.from_pretrained(
            REPOSITORY / "models" / "bundled" / "mini-sd" / "unet", variant="fp16", dtype=dtype
        )
        return Subject(name, settle(unet, device), unet.config.sample_size)
    with device:
        unet = UNet2DConditionModel(**(MID_UNET if name == "mid" else SDXL_UNET)).to(dtype)
    return Subject(name, settle(unet, device), 32 if name == "mid" else 64)
