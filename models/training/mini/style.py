"""A style LoRA: the teacher, taught by the plain diffusion loss to draw its own pictures in another style.

Few-step sampling is no part of this training. By Luo et al. (arXiv 2311.05556, section 3.2) the difference that
distillation makes to the weights and the difference that a style makes add up: this LoRA beside the LCM-LoRA draws the
style in four steps. The captions stay as they are, so that the LoRA's weight alone switches the style.

    python -m models.training.mini.style neon --out runs/neon --ship models/bundled
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from models.training.diffusion import Diffusion, draw_timesteps
from models.training.lcm import LORA_TARGETS, add_lora, save_lora
from models.training.mini.autoencoder import load_kl, vae_encoder
from models.training.mini.dataset import Pixels
from models.training.mini.export import BUNDLED, export_lora, shipment
from models.training.mini.latents import SCENES, LatentCache, encode_scenes
from models.training.mini.restyling import STYLES
from models.training.mini.teacher import CAPTION_DROPOUT, CaptionedLatents
from models.training.mini.vocabulary import Vocabulary, load_vocabulary
from models.training.trainer import Trainer, TrainSettings, autocast

STYLE_RANK = 4
# A style lies in colours and strokes: so the first and the last convolution, and not what depends on the timestep.
STYLE_TARGETS = ("conv_in", "conv_out", *(target for target in LORA_TARGETS if target != "time_emb_proj"))
NOISY_SHARE = 0.5  # of the training leans on the noisier timesteps: a few-step sampler starts there

StyleName = StrEnum("StyleName", list(STYLES))  # type: ignore[misc]


class StyleTraining:
    """A frozen teacher with a small LoRA that learns restyled pictures."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        data: CaptionedLatents,
        out: Path,
        settings: TrainSettings,
    ) -> None:
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.data = data
        self.out = out
        self.settings = settings
        self.diffusion = Diffusion()
        torch.manual_seed(settings.seed)
        self.unet = add_lora(unet, STYLE_RANK, STYLE_TARGETS)
        self.trainer = Trainer(self.unet, out, settings)

    def run(self) -> None:
        """Train to the end of the plan; the averaged LoRA lies in `out` after every checkpoint."""
        self.trainer.fit(self.loss, on_save=self.save)

    def save(self) -> None:
        with self.trainer.averaged_weights():
            save_lora(self.unet, self.out)

    def loss(self, step: int) -> Tensor:
        latents, tokens = self.data.batch(self.trainer, CAPTION_DROPOUT)
        timesteps = draw_timesteps(len(latents), noisy_half=step < NOISY_SHARE * self.settings.steps)
        noise = torch.randn_like(latents)
        noisy = self.diffusion.add_noise(latents, noise, timesteps)
        with autocast():
            velocity = self.unet(noisy, timesteps, self._states(tokens)).sample
        return F.mse_loss(velocity.float(), self.diffusion.target(latents, noise, timesteps))

    @torch.no_grad()
    def _states(self, tokens: Tensor) -> Tensor:
        states: Tensor = self.text_encoder(tokens).last_hidden_state
        return states


def restyled_latents(
    base: Path, vocabulary: Vocabulary, restyle: Callable[[Pixels], Pixels], count: int, out: Path, seed: int
) -> LatentCache:
    """Latents of restyled pictures; an earlier run's are taken from `out`."""
    if not (out / SCENES).exists():
        encode_scenes(vocabulary, vae_encoder(load_kl(base)), count, restyle, seed=seed).save(out)
    return LatentCache.load(out)


def ship(lora: Path, name: str, bundled: Path) -> None:
    """Put the LoRA into `bundled`, in fp16, with its card."""
    with shipment(bundled) as made:
        export_lora(lora, made / name)


def main(
    style: Annotated[StyleName, typer.Argument(help="A style of models/training/mini/restyling.py.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and results.")],
    base: Annotated[Path, typer.Option(help="The teacher, as exported.")] = BUNDLED / "mini-sd",
    ship_to: Annotated[Path | None, typer.Option("--ship", help="Folder to put the finished LoRA into.")] = None,
    pictures: Annotated[int, typer.Option(help="How many to paint.")] = 6000,
    steps: int = 250,
    rate: float = 2e-3,
    batch_size: int = 32,
    emoji: Annotated[bool, typer.Option(help="Without emoji no font is needed.")] = True,
    seed: int = 3,
) -> None:
    """Train one style LoRA; continues where an interrupted run stopped."""
    vocabulary = load_vocabulary() if emoji else load_vocabulary().without_emoji()
    cache = restyled_latents(base, vocabulary, STYLES[style], pictures, out / "latents", seed)
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    StyleTraining(
        UNet2DConditionModel.from_pretrained(base, subfolder="unet", variant="fp16", dtype=torch.float32),
        CLIPTextModel.from_pretrained(base, subfolder="text_encoder", variant="fp16", dtype=torch.float32),
        CaptionedLatents(cache, vocabulary, tokenizer, batch_size),
        out,
        TrainSettings(steps, rate, warmup=20, ema_decay=0.98, save_every=25, weight_decay=0, seed=seed),
    ).run()
    if ship_to is not None:
        ship(out, f"mini-{style}", ship_to)


if __name__ == "__main__":
    typer.run(main)
