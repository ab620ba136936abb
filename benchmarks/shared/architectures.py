"""The published architectures, by the configs of the repositories' own folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from models.catalog import SchedulerSpec, Size

MAX_TOKENS = 77

SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
LCM = SchedulerSpec(class_name="LCMScheduler")
TURBO = SchedulerSpec(class_name="EulerAncestralDiscreteScheduler", config={"timestep_spacing": "trailing"})
CM = SchedulerSpec(class_name="CMStochasticIterativeScheduler")


@dataclass(frozen=True)
class Architecture:
    """What the folder of one model says, by the name of its catalog entry.

    The first text encoder has no projection, a second one has. A consistency model has a UNet alone.
    """

    name: str
    family: Literal["sd", "sdxl", "consistency"]
    unet: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]
    scheduler: SchedulerSpec
    steps: int
    sizes: tuple[Size, ...]
    vae: dict[str, Any] | None
    tiny_vae: dict[str, Any] | None


SD_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "norm_num_groups": 32,
}
SDXL_UNET = SD_UNET | {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15_UNET = SD_UNET | {"attention_head_dim": 8, "cross_attention_dim": 768}
SD21_UNET = SD_UNET | {
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
SSD_1B_UNET = SDXL_UNET | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (1, (2, 2), (4, 4)),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
}
EMBEDS_GUIDANCE = {"time_cond_proj_dim": 256}
CM_UNET = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 3,
    "block_out_channels": (192, 384, 576, 768),
    "down_block_types": ("ResnetDownsampleBlock2D",) + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 64,
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 1000,
}

CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": MAX_TOKENS,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,  # as published; transformers then looks for the highest id
    "pad_token_id": 1,
}
OPENCLIP_BIG_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
OPENCLIP_H = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}

VAE = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
SDXL_VAE = VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": False}
TAESD = {
    "encoder_block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
    "latent_channels": 4,
    "scaling_factor": 1.0,
}

SD15 = Architecture(
    name="sd15-lcm",
    family="sd",
    unet=SD15_UNET,
    text_encoders=(CLIP_L,),
    scheduler=LCM,
    steps=4,
    sizes=((512, 512),),
    vae=VAE,
    tiny_vae=TAESD,
)
SDXL_TURBO = Architecture(
    name="sdxl-turbo",
    family="sdxl",
    unet=SDXL_UNET,
    text_encoders=(CLIP_L, OPENCLIP_BIG_G),
    scheduler=TURBO,
    steps=1,
    sizes=((512, 512), (1024, 1024)),
    vae=SDXL_VAE,
    tiny_vae=TAESD,
)
SDXL = replace(SDXL_TURBO, name="sdxl-lcm", scheduler=LCM, steps=4, sizes=((1024, 1024),))

ARCHITECTURES = (
    SDXL_TURBO,
    SD15,
    replace(SD15, name="sd-turbo", unet=SD21_UNET, text_encoders=(OPENCLIP_H,), scheduler=TURBO, steps=1),
    replace(SD15, name="dreamshaper-lcm-lora"),
    replace(SD15, name="lcm-dreamshaper-v7", unet=SD15_UNET | EMBEDS_GUIDANCE, sizes=((768, 768),)),
    SDXL,
    replace(SDXL, name="ssd-1b-lcm", unet=SSD_1B_UNET),
    replace(SDXL, name="lcm-sdxl", unet=SDXL_UNET | EMBEDS_GUIDANCE),
    replace(SDXL, name="sdxl-turbo-lora", scheduler=TURBO),
    Architecture(
        name="cm-imagenet64",
        family="consistency",
        unet=CM_UNET,
        text_encoders=(),
        scheduler=CM,
        steps=2,
        sizes=((64, 64),),
        vae=None,
        tiny_vae=None,
    ),
)


def find_architecture(name: str) -> Architecture:
    """Of a catalog entry."""
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


def shrink(architecture: Architecture) -> Architecture:
    """The same layers, narrow and fewer, for pictures of an eighth of the side: to try a program on a CPU."""
    if architecture.vae is None or architecture.tiny_vae is None:
        return replace(architecture, unet=_shrink_class_unet(architecture.unet))
    text_encoders = tuple(_shrink_text_encoder(config) for config in architecture.text_encoders)
    return replace(
        architecture,
        unet=_shrink_text_unet(architecture.unet, text_encoders[-1]["projection_dim"]),
        text_encoders=text_encoders,
        sizes=tuple((width // 8, height // 8) for width, height in architecture.sizes),
        vae=architecture.vae | {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8},
        tiny_vae=architecture.tiny_vae
        | {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4},
    )


def _shrink_text_unet(unet: dict[str, Any], pooled_width: int) -> dict[str, Any]:
    heads = unet["attention_head_dim"]
    small = {
        "block_out_channels": tuple(width // 10 for width in unet["block_out_channels"]),
        "attention_head_dim": heads if isinstance(heads, int) else tuple(count // 5 for count in heads),
        "cross_attention_dim": unet["cross_attention_dim"] // 16,
        "norm_num_groups": 8,
    }
    if "addition_time_embed_dim" in unet:
        small["projection_class_embeddings_input_dim"] = 6 * unet["addition_time_embed_dim"] + pooled_width
    return unet | small


def _shrink_class_unet(unet: dict[str, Any]) -> dict[str, Any]:
    """Of a consistency model, whose pictures are small already."""
    widths = tuple(width // 12 for width in unet["block_out_channels"])
    return unet | {
        "block_out_channels": widths,
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "attn_norm_num_groups": 8,
    }


def _shrink_text_encoder(config: dict[str, Any]) -> dict[str, Any]:
    widths = ("hidden_size", "intermediate_size", "projection_dim")
    return config | {key: config[key] // 16 for key in widths} | {"num_hidden_layers": 2}
