"""Stage 4: export. Gathers what the stages wrote into the folders that ship: Stable Diffusion's layout, fp16.

python -m models.training.mini.export --autoencoder runs/autoencoder --teacher runs/teacher --lcm runs/lcm
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, AutoencoderTiny, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from models.training.diffusion import build_scheduler
from models.training.mini.reference import save_reference
from models.training.mini.sprites import draw_sprites
from models.training.mini.vocabulary import load_vocabulary

BUNDLED = Path(__file__).parents[2] / "bundled"
CARDS = Path(__file__).with_name("cards")
MAX_BYTES = 20_000_000
SOLVER_TIMESTEPS = 20


def build_pipeline(vae: Path, teacher: Path) -> StableDiffusionPipeline:
    """The teacher as a plain Stable Diffusion pipeline."""
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae),
        text_encoder=CLIPTextModel.from_pretrained(teacher / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(teacher / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(teacher / "unet"),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def lcm_scheduler(pipeline: StableDiffusionPipeline, solver_timesteps: int = SOLVER_TIMESTEPS) -> LCMScheduler:
    """The scheduler that the LoRA was distilled for: the pipeline's own schedule, LCM's steps."""
    scheduler: LCMScheduler = LCMScheduler.from_config(
        pipeline.scheduler.config, original_inference_steps=solver_timesteps
    )
    return scheduler


def export_sd(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in fp16. Its text encoder's config keeps saying float32, so that no load mixes types."""
    config = pipeline.text_encoder.config
    pipeline.to(dtype=torch.float16).save_pretrained(folder, variant="fp16")
    config.dtype = torch.float32
    config.save_pretrained(folder / "text_encoder")
    pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))


def export_tiny(taesd: Path, folder: Path) -> None:
    """Write the tiny autoencoder in fp16."""
    AutoencoderTiny.from_pretrained(taesd, dtype=torch.float16).save_pretrained(folder, variant="fp16")
    _drop_key(folder / "config.json", "block_out_channels")


def _drop_key(config: Path, key: str) -> None:
    """diffusers writes this key, and warns of it when it reads it back."""
    table = json.loads(config.read_text())
    table.pop(key, None)
    config.write_text(json.dumps(table, indent=2) + "\n")


def export_lora(lora: Path, folder: Path) -> None:
    """Write a LoRA in fp16."""
    weights = {name: weight.half() for name, weight in load_file(lora / LORA_WEIGHT_NAME_SAFE).items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / LORA_WEIGHT_NAME_SAFE, metadata={"format": "pt"})


@contextmanager
def shipment(out: Path) -> Iterator[Path]:
    """A folder to export models into; at the end they get their cards and go to `out`, unless they are too large."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as name:
        made = Path(name)
        yield made
        add_cards(made)
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


def main(
    autoencoder: Annotated[Path, typer.Option(help="Folder that the autoencoder stage wrote.")],
    teacher: Annotated[Path, typer.Option(help="Folder that the teacher stage wrote.")],
    lcm: Annotated[Path, typer.Option(help="Folder that the distillation wrote.")],
    out: Annotated[Path, typer.Option(help="Where the three model folders go.")] = BUNDLED,
) -> None:
    """Write mini-sd, mini-taesd and mini-lcm-lora."""
    vocabulary = load_vocabulary()
    pipeline = build_pipeline(autoencoder / "vae", teacher)
    with shipment(out) as made:
        export_lora(lcm, made / "mini-lcm-lora")
        lcm_scheduler(pipeline).save_pretrained(made / "mini-lcm-lora")
        export_tiny(autoencoder / "taesd", made / "mini-taesd")
        export_sd(pipeline, made / "mini-sd")
        save_reference(made / "mini-sd" / "reference", vocabulary, draw_sprites(vocabulary))
    print(f"{folder_bytes(out):,} bytes in {out}")


if __name__ == "__main__":
    typer.run(main)
