"""LoRA files in the formats that people have, with random factors large enough to change every picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from models.catalog import Range, StyleLora

Format = Literal["peft", "diffusers", "kohya"]

ATTENTION = r".*\.attn\d\.to_(q|k|v|out\.0)"
WITH_CONVOLUTIONS = rf"{ATTENTION}|.*\.conv\d|.*\.conv|.*proj_in|.*ff\.net\.0\.proj|.*time_emb_proj"
TEXT = r".*\.(q_proj|out_proj|fc1)"
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def write_lora(
    path: Path,
    base: Path,
    targets: dict[str, str],
    form: Format = "peft",
    *,
    rank: int = 4,
    alpha: float | None = None,
    seed: int = 0,
) -> Path:
    """`base` is a diffusers folder, `targets` has a pattern of layer names for each network of it that is touched.

    `alpha` is kohya's.
    """
    tensors: dict[str, Tensor] = {}
    torch.manual_seed(seed)
    for network, pattern in targets.items():
        layers = _layers(base, network, pattern)
        assert layers, f"no layer of {network} is like {pattern}"
        for layer, weight in layers.items():
            down = torch.randn(rank, *weight.shape[1:]) * 0.2
            up = torch.randn(len(weight), rank, *[1] * (weight.dim() - 2)) * (0.5 if network == "unet" else 1.5)
            tensors |= _named(form, network, layer, up, down, alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def style(path: Path, name: str | None = None, **changes: Any) -> StyleLora:
    """The catalog entry of a file."""
    values: dict[str, Any] = {
        "name": name or path.stem,
        "description": "random weights",
        "source": str(path.parent),
        "weight_name": path.name,
        "models": ["small"],
        "weight": Range(default=1.0, min=-2.0, max=2.0),
        "license": "Apache-2.0",
    }
    return StyleLora(**(values | changes))


def by_name(*entries: StyleLora) -> dict[str, StyleLora]:
    return {entry.name: entry for entry in entries}


def _layers(base: Path, network: str, pattern: str) -> dict[str, Tensor]:
    is_half = any((base / network).glob("*.fp16.safetensors"))
    module = CLASSES[network].from_pretrained(base / network, variant="fp16" if is_half else None)
    return {
        name: layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and re.fullmatch(pattern, name)
    }


def _named(form: Format, network: str, layer: str, up: Tensor, down: Tensor, alpha: float | None) -> dict[str, Tensor]:
    match form:
        case "peft":
            return {f"{network}.{layer}.lora_A.weight": down, f"{network}.{layer}.lora_B.weight": up}
        case "diffusers":
            kind = "lora" if network == "unet" else "lora_linear_layer"
            return {f"{network}.{layer}.{kind}.down.weight": down, f"{network}.{layer}.{kind}.up.weight": up}
        case "kohya":
            if network != "unet":  # as in the transformers of those days
                layer = f"text_model.{layer.removeprefix('text_model.')}"
            name = f"{KOHYA[network]}_{layer.replace('.', '_')}"
            factors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            return factors if alpha is None else factors | {f"{name}.alpha": torch.tensor(alpha)}
