"""Export: what the stages wrote, as the folders that ship: diffusers' layouts, fp16, with cards."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from safetensors.torch import load_file, save_file

from models.training.exporting import save_pipeline

BUNDLED = Path(__file__).parents[2] / "bundled"
CARDS = Path(__file__).with_name("cards")
MAX_BYTES = 40_000_000


def export_pipeline(model: Path, folder: Path) -> None:
    """Write a diffusers folder in fp16."""
    save_pipeline(DiffusionPipeline.from_pretrained(model).to(dtype=torch.float16), folder, variant="fp16")


def export_unet(unet: Path, folder: Path) -> None:
    """Write a UNet alone in fp16, and the config of its scheduler."""
    UNet2DConditionModel.from_pretrained(unet, dtype=torch.float16).save_pretrained(folder, variant="fp16")
    shutil.copyfile(unet / SCHEDULER_CONFIG_NAME, folder / SCHEDULER_CONFIG_NAME)


def export_tiny(taesd: Path, folder: Path) -> None:
    """Write the tiny autoencoder in fp16."""
    AutoencoderTiny.from_pretrained(taesd, dtype=torch.float16).save_pretrained(folder, variant="fp16")
    _drop_key(folder / "config.json", "block_out_channels")  # which diffusers writes, and warns of when it reads it


def _drop_key(config: Path, key: str) -> None:
    table = json.loads(config.read_text())
    table.pop(key, None)
    config.write_text(json.dumps(table, indent=2) + "\n")


def export_lora(lora: Path, folder: Path) -> None:
    """Write a LoRA in fp16, and the config of its scheduler, if it has one."""
    weights = {name: weight.half() for name, weight in load_file(lora / LORA_WEIGHT_NAME_SAFE).items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / LORA_WEIGHT_NAME_SAFE, metadata={"format": "pt"})
    if (lora / SCHEDULER_CONFIG_NAME).exists():
        shutil.copyfile(lora / SCHEDULER_CONFIG_NAME, folder / SCHEDULER_CONFIG_NAME)


@contextmanager
def shipment(out: Path) -> Iterator[Path]:
    """A folder to export models into; at the end they get their cards and go to `out`, unless they are too large."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as name:
        made = Path(name)
        yield made
        add_cards(made)
        for config in (*made.rglob("config.json"), *made.rglob("model_index.json")):
            _drop_key(config, "_name_or_path")  # of the machine that it was made on
        _make_readable(made)
        if folder_bytes(made) > MAX_BYTES:
            raise SystemExit(f"{folder_bytes(made):,} bytes are more than the {MAX_BYTES:,} that may ship")
        put_in_place(made, out)


def add_cards(made: Path) -> None:
    """Put the model cards beside the weights."""
    for folder in made.iterdir():
        shutil.copyfile(CARDS / f"{folder.name}.md", folder / "README.md")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def put_in_place(made: Path, target: Path) -> None:
    """Swap each finished model folder in by renaming, so that a reader finds the old one or the new one."""
    for folder in sorted(path for path in made.iterdir() if path.is_dir()):
        old = target / f".{folder.name}.old"
        if (target / folder.name).exists():
            (target / folder.name).replace(old)
        folder.replace(target / folder.name)
        shutil.rmtree(old, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
