"""Stage 2: the teacher, a text-to-image diffusion model in Stable Diffusion's layout.

First a warm-up of the text encoder (its end-of-text state regresses the latent), then joint training of UNet and
text encoder on v-prediction with zero terminal SNR (arXiv 2202.00512, 2305.08891). A tenth of the captions is left
empty, for classifier-free guidance (Ho & Salimans, arXiv 2207.12598).

    python -m models.training.mini.teacher --latents runs/latents --out runs/teacher
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from models.training.diffusion import Diffusion, build_scheduler, draw_timesteps
from models.training.fingerprints import tensor_fingerprint
from models.training.mini.captions import Captioner
from models.training.mini.dataset import Scene
from models.training.mini.latents import LatentCache
from models.training.mini.tokenizer import MAX_TOKENS, build_tokenizer, save_tokenizer
from models.training.mini.vocabulary import Vocabulary, load_vocabulary
from models.training.pictures import Batch
from models.training.teachers import Conditions, Encoders, Teacher
from models.training.trainer import CPU, Identity, Trainer, TrainSettings, autocast

HIDDEN = 192
LATENT_SIZE = 16
CAPTION_DROPOUT = 0.1
TEXT_RATE_SHARE = 0.4
NOISY_SHARE = 0.2  # of the training leans on the noisier timesteps; a uniform end keeps pictures from mottling


def build_text_encoder(tokenizer: CLIPTokenizer, hidden: int = HIDDEN, layers: int = 2) -> CLIPTextModel:
    """A small CLIPTextModel: `"b t"` tokens to `"b t hidden"`."""
    return CLIPTextModel(
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


def build_unet(channels: tuple[int, int, int] = (64, 96, 144), hidden: int = HIDDEN) -> UNet2DConditionModel:
    """A small UNet2DConditionModel with Stable Diffusion's plain conditioning, cross-attention at two levels."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=hidden,
        attention_head_dim=4,
        norm_num_groups=16,
    )


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


def open_trained(folder: Path) -> Teacher:
    """The teacher that this stage wrote: no VAE belongs to it yet."""
    classes = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
    return Teacher(
        name=str(folder),
        layout="sd",
        folder=folder,
        networks={name: (kind, folder / name) for name, kind in classes.items()},
        variant=None,
        scheduler_config=dict(build_scheduler().config),
        unet_config=json.loads((folder / "unet" / "config.json").read_text()),
        vae_config={},
    )


def warm_up(text_encoder: CLIPTextModel, data: CaptionedLatents, out: Path, settings: TrainSettings) -> None:
    """Teach the text encoder to tell captions apart, before any denoising: minutes that save many more later."""
    sample = data.cache.latents[0]
    head = nn.Linear(text_encoder.config.hidden_size, sample.numel())
    trainer = Trainer(nn.ModuleDict({"text_encoder": text_encoder, "head": head}), out / "warm_up", settings)

    def loss_of(_step: int) -> Tensor:
        latents, tokens = data.batch(trainer, dropout=0.0)
        with autocast():
            guess = head(text_encoder(tokens).pooler_output)
        return F.mse_loss(guess.float(), latents.flatten(1))

    trainer.fit(loss_of)


def train_jointly(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    data: CaptionedLatents,
    out: Path,
    settings: TrainSettings,
) -> Trainer:
    """Train both networks; the averaged weights lie in `out` after every checkpoint."""
    model = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).train()
    groups: list[dict[str, Any]] = [
        {"params": list(unet.parameters())},
        {"params": list(text_encoder.parameters()), "lr": TEXT_RATE_SHARE * settings.rate},
    ]
    unet.set_attn_processor(AttnProcessor())
    trainer = Trainer(model, out / "joint", settings, groups)
    diffusion = Diffusion()

    def loss_of(step: int) -> Tensor:
        latents, tokens = data.batch(trainer, CAPTION_DROPOUT)
        timesteps = draw_timesteps(len(latents), noisy_half=step < NOISY_SHARE * settings.steps)
        noise = torch.randn_like(latents)
        with autocast():
            states = text_encoder(tokens).last_hidden_state
            velocity = unet(diffusion.add_noise(latents, noise, timesteps), timesteps, states).sample
        return F.mse_loss(velocity.float(), diffusion.target(latents, noise, timesteps))

    trainer.fit(loss_of, on_save=lambda: save_teacher(trainer, out))
    return trainer


def save_teacher(trainer: Trainer, out: Path) -> None:
    """Write the averaged networks as diffusers folders."""
    with trainer.averaged_weights():
        for name in ("unet", "text_encoder"):
            trainer.model[name].save_pretrained(out / name)


def main(
    latents: Annotated[Path, typer.Option(help="Folder that the latents stage wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and results.")],
    steps: Annotated[int, typer.Option(help="Steps of joint training.")] = 12_000,
    warm_up_steps: Annotated[int, typer.Option(help="Steps of the text encoder's warm-up.")] = 4000,
    start: Annotated[Path | None, typer.Option(help="Folder of an earlier teacher to go on from.")] = None,
    batch_size: int = 48,
    emoji: Annotated[bool, typer.Option(help="Without emoji no font is needed.")] = True,
    seed: int = 0,
) -> None:
    """Train the teacher; continues where an interrupted run stopped."""
    vocabulary = load_vocabulary() if emoji else load_vocabulary().without_emoji()
    if not (out / "tokenizer").exists():
        first = CLIPTokenizer.from_pretrained(start / "tokenizer") if start else build_tokenizer(vocabulary)
        save_tokenizer(first, out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    data = CaptionedLatents(LatentCache.load(latents), vocabulary, tokenizer, batch_size)
    torch.manual_seed(seed)
    if start:
        text_encoder = CLIPTextModel.from_pretrained(start / "text_encoder")
        unet = UNet2DConditionModel.from_pretrained(start / "unet")
    else:
        text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    warm_up(text_encoder, data, out, TrainSettings(steps=warm_up_steps, seed=seed, save_every=1000))
    train_jointly(unet, text_encoder, data, out, TrainSettings(steps=steps, warmup=200, seed=seed + 1))


if __name__ == "__main__":
    typer.run(main)
