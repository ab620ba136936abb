"""A style LoRA: the teacher, taught by the plain diffusion loss to draw its own pictures in another style.

Few-step sampling is no part of this training. By Luo et al. (arXiv 2311.05556, section 3.2) the difference that
distillation makes to the weights and the difference that a style makes add up: this LoRA beside the LCM-LoRA draws the
style in four steps. The captions stay as they are, so that the LoRA's weight alone switches the style.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.training.diffusion import Diffusion, draw_timesteps
from models.training.lcm import LORA_TARGETS, add_lora, save_lora
from models.training.mini.latents import LatentCache, encode_scenes
from models.training.mini.restyling import Restyle
from models.training.mini.teacher import CaptionedLatents, PaintedBatches
from models.training.mini.vocabulary import Vocabulary
from models.training.pictures import Batches
from models.training.teachers import Encoders, Teacher, call_unet
from models.training.trainer import CPU, Trainer, TrainSettings, autocast

BATCH = 32
STYLE_RANK = 4
# A style lies in colours and strokes: so the first and the last convolution, and not what depends on the timestep.
STYLE_TARGETS = ("conv_in", "conv_out", *(target for target in LORA_TARGETS if target != "time_emb_proj"))
NOISY_SHARE = 0.5  # of the training leans on the noisier timesteps: a few-step sampler starts there


class StyleTraining:
    """A teacher's UNet with a small LoRA that learns restyled pictures."""

    def __init__(self, unet: Any, diffusion: Diffusion, batches: Batches, out: Path, settings: TrainSettings) -> None:
        self.batches = batches
        self.out = out
        self.diffusion = diffusion
        torch.manual_seed(settings.seed)
        self.unet = add_lora(unet, STYLE_RANK, STYLE_TARGETS)
        self.trainer = Trainer(self.unet, out, settings)

    def run(self) -> None:
        """Train to the end of the plan; the averaged LoRA lies in `out` after every checkpoint."""
        self.trainer.fit(self.loss, on_save=self.save)

    def save(self) -> None:
        save_lora(self.unet, self.out)

    def loss(self, step: int) -> Tensor:
        batch = self.batches.draw(self.trainer.rng)
        leans = step < NOISY_SHARE * self.trainer.settings.steps
        timesteps, noise = draw_timesteps(len(batch.latents), leans), torch.randn_like(batch.latents)
        noisy = self.diffusion.add_noise(batch.latents, noise, timesteps)
        with autocast():
            output = call_unet(self.unet, noisy, timesteps, batch.conditions)
        return F.mse_loss(output, self.diffusion.target(batch.latents, noise, timesteps))


def train_style(
    teacher: Teacher, vocabulary: Vocabulary, restyle: Restyle, out: Path, settings: TrainSettings, count: int
) -> None:
    """Train one style LoRA on `count` restyled pictures; continues where an interrupted run stopped."""
    encoders = teacher.load_encoders(CPU)
    cache = restyled_latents(encoders, vocabulary, restyle, count, out / "latents", settings.seed)
    batches = PaintedBatches(CaptionedLatents(cache, vocabulary, encoders.tokenizers[0], BATCH), encoders)
    unet = teacher.load_unet(CPU, torch.float32)
    StyleTraining(unet, teacher.build_diffusion(CPU), batches, out, settings).run()


def restyled_latents(
    encoders: Encoders, vocabulary: Vocabulary, restyle: Restyle, count: int, out: Path, seed: int
) -> LatentCache:
    """Latents of restyled pictures; an earlier run's are taken from `out`."""
    if not LatentCache.exists(out):

        def encode(pixels: Tensor) -> Tensor:
            return encoders.encode_pictures(pixels)[0]

        encode_scenes(vocabulary, encode, count, restyle, seed=seed).save(out)
    return LatentCache.load(out)
