"""Which files of a network's folder are its weights, and which networks a LoRA's file changes. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

SUFFIX = ".safetensors"
LORA_NETWORKS = ("unet", "text_encoder", "text_encoder_2")  # what LoRAs may change, by diffusers' names
TEXT_PREFIXES = ("text_encoder", "lora_te")  # of the keys of a LoRA that changes text encoders, in all formats


def find_weights(folder: Path, variant: str | None) -> list[Path]:
    """The weight files of one network: those of the variant where there are any, else the plain ones."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    return [file for file in files if is_of_variant(file, variant)] or [file for file in files if "." not in file.stem]


def has_variant(folder: Path, variant: str | None) -> bool:
    return any(is_of_variant(file, variant) for file in folder.glob(f"*{SUFFIX}"))


def is_of_variant(file: Path, variant: str | None) -> bool:
    """model.fp16.safetensors, or model.fp16-00001-of-00002.safetensors."""
    return variant is not None and f".{variant}" in file.stem


def changed_networks(lora_keys: Iterable[str]) -> tuple[str, ...]:
    """What a LoRA with these keys changes at most."""
    return LORA_NETWORKS if any(key.startswith(TEXT_PREFIXES) for key in lora_keys) else LORA_NETWORKS[:1]
