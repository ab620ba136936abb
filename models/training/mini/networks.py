"""The miniatures' networks, in Stable Diffusion's layout and in SDXL's, small enough for a laptop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.families import sd, sdxl
from models.training.diffusion import build_scheduler
from models.training.mini.dataset import IMAGE_SIZE
from models.training.mini.tokenizer import MAX_TOKENS
from models.training.teachers import Conditions, Layout

HIDDEN = 192  # of the text encoder that both layouts have
HIDDEN_SECOND = 64  # of SDXL's second one; its cross-attention sees both, side by side
LATENT_SIZE = 16
TIME_ID_WIDTH = 32  # of each of SDXL's six numbers

CHANNELS: dict[Layout, tuple[int, int, int]] = {"sd": (64, 96, 144), "sdxl": (48, 64, 80)}


@dataclass(frozen=True)
class Networks:
    """What a teacher is made of, by diffusers' names, and its schedule."""

    layout: Layout
    unet: UNet2DConditionModel
    text_encoders: dict[str, Any]
    scheduler: DDIMScheduler

    def module(self) -> nn.ModuleDict:
        """All of them, for one optimizer and one checkpoint."""
        return nn.ModuleDict({"unet": self.unet, **self.text_encoders})

    def encode(self, tokens: Tensor) -> Conditions:
        """Token ids `"b t"` to what the UNet sees, as the service computes it, with gradients."""
        if self.layout == "sd":
            return Conditions(sd.text_network(self.text_encoders["text_encoder"])(tokens))
        states, pooled = sdxl.text_network(*self.text_encoders.values())(tokens, tokens)
        time_ids = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]])
        return Conditions(states, pooled, time_ids.expand(len(tokens), -1))

    def pipeline(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> Any:
        """diffusers' pipeline of these networks. No caption means the empty one, as in training."""
        parts = {
            "vae": vae,
            "unet": self.unet,
            "scheduler": self.scheduler,
            "tokenizer": tokenizer,
            **self.text_encoders,
        }
        if self.layout == "sd":
            unsafe: dict[str, Any] = {
                "safety_checker": None,
                "feature_extractor": None,
                "requires_safety_checker": False,
            }
            return StableDiffusionPipeline(**parts, **unsafe)
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, force_zeros_for_empty_prompt=False)


def build_networks(layout: Layout, tokenizer: CLIPTokenizer, hidden: int = HIDDEN) -> Networks:
    """New ones, which predict v from pure noise on: flat backgrounds would show through SDXL's own schedule. The first
    text encoder has one shape in both layouts, as SDXL's first is Stable Diffusion's.
    """
    if layout == "sd":
        encoders = {"text_encoder": build_text_encoder(tokenizer, hidden)}
        return Networks(layout, build_unet(hidden=hidden), encoders, build_scheduler())
    second = hidden * HIDDEN_SECOND // HIDDEN
    encoders = {
        "text_encoder": build_text_encoder(tokenizer, hidden),
        "text_encoder_2": build_text_encoder(tokenizer, second, layers=3, kind=CLIPTextModelWithProjection),
    }
    unet = build_unet_xl(hidden=hidden + second, pooled=second)
    return Networks(layout, unet, encoders, build_scheduler())


def build_text_encoder(
    tokenizer: CLIPTokenizer, hidden: int = HIDDEN, layers: int = 2, kind: Any = CLIPTextModel
) -> Any:
    """A small one of CLIP: `"b t"` tokens to `"b t hidden"`."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3,
            projection_dim=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(channels: tuple[int, int, int] = CHANNELS["sd"], hidden: int = HIDDEN) -> UNet2DConditionModel:
    """A small UNet with Stable Diffusion's plain conditioning, cross-attention at two levels."""
    return UNet2DConditionModel(**_plain(channels, hidden))


def build_unet_xl(
    channels: tuple[int, int, int] = CHANNELS["sdxl"], hidden: int = HIDDEN, pooled: int = HIDDEN_SECOND
) -> UNet2DConditionModel:
    """A small UNet with SDXL's conditioning: pooled text and time ids beside the timestep, linear projections, and more
    transformer layers the lower the level.
    """
    return UNet2DConditionModel(
        **_plain(channels, hidden),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=pooled + 6 * TIME_ID_WIDTH,
    )


def _plain(channels: tuple[int, int, int], hidden: int) -> dict[str, Any]:
    return {
        "sample_size": LATENT_SIZE,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": channels,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": hidden,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    }
