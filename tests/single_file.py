"""Pipelines as one file in the layout of the original repositories: the way back from diffusers' names.

diffusers converts such files when it reads them (`diffusers/loaders/single_file_utils.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]
Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]

UNET_TOP: Rules = [
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.(\d)", lambda match: f"middle_block.{2 * int(match[1])}"),
]
UNET_RESNET: Rules = [
    (r"\.norm1\.(?=weight|bias)", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.(?=weight|bias)", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
]
VAE: Rules = [
    (r"conv_norm_out", "norm_out"),
    (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"conv_shortcut", "nin_shortcut"),
]
OPEN_CLIP: Rules = [
    (r"^text_model\.encoder\.layers", "transformer.resblocks"),
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_projection\.weight", "text_projection"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.", "attn."),
]


def write_single_file(folder: Path, path: Path) -> None:
    """The networks of a Stable Diffusion or SDXL folder as one file."""
    is_xl = (folder / "text_encoder_2").is_dir()
    pipe: Any = (StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline).from_pretrained(folder)
    weights = dict(_prefixed("model.diffusion_model.", _unet(pipe.unet)))
    weights |= _prefixed("first_stage_model.", _vae(pipe.vae))
    first = "conditioner.embedders.0.transformer." if is_xl else "cond_stage_model.transformer."
    weights |= _prefixed(f"{first}text_model.", pipe.text_encoder.state_dict())
    if is_xl:
        weights |= _prefixed("conditioner.embedders.1.model.", _open_clip(pipe.text_encoder_2))
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, path)


def _prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _unet(unet: Any) -> Weights:
    num_layers: int = unet.config.layers_per_block
    rules = [*UNET_TOP, *_unet_blocks(unet, num_layers)]
    return {
        _rename(name, [*rules, *(UNET_RESNET if ".resnets." in name else [])]): tensor
        for name, tensor in unet.state_dict().items()
    }


def _unet_blocks(unet: nn.Module, num_layers: int) -> Iterator[tuple[str, Callable[[re.Match[str]], str]]]:
    """A resnet and its attention are parts 0 and 1 of one block there, counted through all levels."""
    period = num_layers + 1
    names = list(unet.state_dict())

    def upsampler(match: re.Match[str]) -> str:
        part = 2 if any(name.startswith(f"up_blocks.{match[1]}.attentions") for name in names) else 1
        return f"output_blocks.{int(match[1]) * period + num_layers}.{part}.conv"

    yield (
        r"^down_blocks\.(\d)\.downsamplers\.0\.conv",
        lambda match: f"input_blocks.{1 + int(match[1]) * period + num_layers}.0.op",
    )
    yield r"^up_blocks\.(\d)\.upsamplers\.0\.conv", upsampler
    for kind, part in (("resnets", 0), ("attentions", 1)):
        yield rf"^down_blocks\.(\d)\.{kind}\.(\d)", _block("input_blocks", 1, period, part)
        yield rf"^up_blocks\.(\d)\.{kind}\.(\d)", _block("output_blocks", 0, period, part)


def _block(name: str, first: int, period: int, part: int) -> Callable[[re.Match[str]], str]:
    return lambda match: f"{name}.{first + int(match[1]) * period + int(match[2])}.{part}"


def _vae(vae: Any) -> Weights:
    """Its decoder counts levels from the finest one; its attention has convolutions where diffusers has linear maps."""
    last = len(vae.config.up_block_types) - 1
    rules: Rules = [
        *VAE,
        (r"up_blocks\.(\d)\.resnets", lambda match: f"up.{last - int(match[1])}.block"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda match: f"up.{last - int(match[1])}.upsample"),
    ]
    weights = {_rename(name, rules): tensor for name, tensor in vae.state_dict().items()}
    return {
        name: tensor[..., None, None] if "attn_1" in name and tensor.dim() == 2 else tensor
        for name, tensor in weights.items()
    }


def _open_clip(encoder: Any) -> Weights:
    """Query, key and value in one matrix; the projection the other way round."""
    weights = {_rename(name, OPEN_CLIP): tensor for name, tensor in encoder.state_dict().items()}
    weights["text_projection"] = weights["text_projection"].T
    for name in [name for name in weights if "attn.q_proj" in name]:
        kind = name.rpartition(".")[2]
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace(f"q_proj.{kind}", f"in_proj_{kind}")] = torch.cat(parts)
    return weights
