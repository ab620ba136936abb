"""The teachers, text-to-image diffusion models in Stable Diffusion's layout and in SDXL's.

First a warm-up of the text encoder (its end-of-text state regresses the latent), then joint training of UNet and text
encoders, on v-prediction with zero terminal SNR (arXiv 2202.00512, 2305.08891). A tenth of the captions is left empty,
for classifier-free guidance (Ho & Salimans, arXiv 2207.12598).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.training.diffusion import Diffusion, draw_timesteps
from models.training.fingerprints import tensor_fingerprint
from models.training.mini.captions import Captioner
from models.training.mini.dataset import Scene
from models.training.mini.latents import LatentCache
from models.training.mini.networks import Networks
from models.training.mini.tokenizer import MAX_TOKENS
from models.training.mini.vocabulary import Vocabulary
from models.training.pictures import Batch
from models.training.teachers import Conditions, Encoders, call_unet
from models.training.trainer import CPU, Identity, Trainer, TrainSettings, autocast

CAPTION_DROPOUT = 0.1
TEXT_RATE_SHARE = 0.4
NOISY_SHARE = 0.2  # of the training leans on the noisier timesteps; a uniform end keeps pictures from mottling


class CaptionedLatents:
    """Batches for training: latents, and token ids of freshly worded captions."""

    def __init__(
        self, cache: LatentCache, vocabulary: Vocabulary, tokenizer: CLIPTokenizer, batch_size: int = 48
    ) -> None:
        self.cache = cache
        self.captioner = Captioner(vocabulary)
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    def batch(self, trainer: Trainer, dropout: float) -> tuple[Tensor, Tensor]:
        """Latents `"b 4 h w"` and token ids `"b t"`; a share of `dropout` gets the empty caption."""
        latents, captions = self.draw(trainer.rng, dropout)
        return latents, self.tokens([caption or "" for caption in captions])

    def draw(self, rng: random.Random, dropout: float) -> tuple[Tensor, list[str | None]]:
        """Latents `"b 4 h w"` and captions; a share of `dropout` gets none."""
        latents, scenes = self.cache.draw(self.batch_size, rng)
        return latents, [self._caption(scene, rng, dropout) for scene in scenes]

    def _caption(self, scene: Scene, rng: random.Random, dropout: float) -> str | None:
        return None if rng.random() < dropout else self.captioner.caption(scene, rng)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        encoded = self.tokenizer(
            list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        ids: Tensor = encoded.input_ids
        return ids


class PaintedBatches:
    """Meets Batches: each caption is worded and encoded anew."""

    def __init__(self, data: CaptionedLatents, encoders: Encoders, dropout: float = CAPTION_DROPOUT) -> None:
        self.data, self.encoders, self.dropout = data, encoders, dropout

    @property
    def identity(self) -> Identity:
        data = tensor_fingerprint(self.data.cache.latents)
        return {"data": data, "batch_size": self.data.batch_size, "caption_dropout": self.dropout}

    @property
    def unconditional(self) -> Conditions:
        return self.encoders.encode_captions([None]).to(CPU)

    def draw(self, rng: random.Random) -> Batch:
        latents, captions = self.data.draw(rng, self.dropout)
        conditions = self.encoders.encode_captions(captions).to(CPU)
        return Batch(latents, conditions.with_time_ids(self.encoders.plain_time_ids(latents)))


def warm_up(networks: Networks, data: CaptionedLatents, out: Path, settings: TrainSettings) -> None:
    """Teach the first text encoder to tell captions apart, before any denoising: minutes that save many more later."""
    encoder: Any = networks.text_encoders["text_encoder"]
    head = nn.Linear(encoder.config.hidden_size, data.cache.latents[0].numel())
    trainer = Trainer(nn.ModuleDict({"text_encoder": encoder, "head": head}), out / "warm_up", settings)

    def loss_of(_step: int) -> Tensor:
        latents, tokens = data.batch(trainer, dropout=0.0)
        with autocast():
            guess = head(encoder(tokens).pooler_output)
        return F.mse_loss(guess.float(), latents.flatten(1))

    trainer.fit(loss_of)


def train_jointly(
    networks: Networks, data: CaptionedLatents, out: Path, settings: TrainSettings, save: Callable[[], None]
) -> None:
    """Train all networks; at each checkpoint `save` finds the averaged weights in them, and so does the caller at the
    end."""
    encoders = [weight for encoder in networks.text_encoders.values() for weight in encoder.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": list(networks.unet.parameters())},
        {"params": encoders, "lr": TEXT_RATE_SHARE * settings.rate},
    ]
    networks.unet.set_attn_processor(AttnProcessor())
    networks.unet.to(memory_format=torch.channels_last)  # in which a CPU convolves faster
    trainer = Trainer(networks.module().train(), out / "joint", settings, groups)
    diffusion = Diffusion(networks.scheduler)

    def loss_of(step: int) -> Tensor:
        latents, tokens = data.batch(trainer, CAPTION_DROPOUT)
        timesteps = draw_timesteps(len(latents), noisy_half=step < NOISY_SHARE * settings.steps)
        noise = torch.randn_like(latents)
        noisy = diffusion.add_noise(latents, noise, timesteps)
        with autocast():
            output = call_unet(networks.unet, noisy, timesteps, networks.encode(tokens))
        return F.mse_loss(output, diffusion.target(latents, noise, timesteps))

    trainer.fit(loss_of, save)
    trainer.keep_average()


def start_from(networks: Networks, model: Path, names: Sequence[str] | None = None, variant: str | None = None) -> None:
    """Take the weights of a model folder: of all networks, or of `names`, which have the same shape there."""
    kinds = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for name, network in networks.module().items():
        if names is None or name in names:
            other = kinds[name].from_pretrained(model, subfolder=name, variant=variant, dtype=torch.float32)
            network.load_state_dict(other.state_dict())
