"""The autoencoders. First an AutoencoderKL (Kingma & Welling, arXiv 1312.6114; its place as in latent
diffusion, arXiv 2112.10752), then the tiny one for previews, after the idea of TAESD.

The latents of the first are its own, but held near a fixed linear code: so they have mean 0 and variance 1 from the
start, are smooth, which a denoiser likes, and decoder and encoder needn't chase each other. The tiny one learns to
write and read the same latents.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from models.training.mini.dataset import IMAGE_SIZE, Composer, Pixels, SceneSampler
from models.training.mini.linear_code import LinearCode
from models.training.mini.pixels import to_tensor
from models.training.mini.vocabulary import Vocabulary
from models.training.trainer import Trainer, TrainSettings, autocast

SCALING_FACTOR = 0.18215  # Stable Diffusion's own
LOG_VARIANCE = -3.0  # of the KL autoencoder's posterior: a 25th of the latents' spread
MAX_NOISE = 0.15  # on scaled latents, in training: what a denoiser makes is never clean
ANCHOR_WEIGHT = 0.02  # of the distance between latents and linear code
WIDTH_WEIGHT = 0.002
ENCODER_WEIGHT = 0.2  # of the tiny encoder's error
FIT_PICTURES = 1000
EMA_DECAY = 0.98  # short runs: a longer average would still remember their beginning
ENCODER_SAVING = 4  # the tiny encoder's task is easy: it sees a quarter of each batch


def build_kl(channels: tuple[int, ...] = (32, 32, 64)) -> AutoencoderKL:
    """A small AutoencoderKL, four times smaller latents: `"b 3 64 64"` to `"b 4 16 16"`."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=SCALING_FACTOR,
    )


def load_decoder(model: Path) -> AutoencoderKL:
    """The autoencoder of a model folder in fp16, as fp32, to train its decoder alone: its latents are what the folder's
    UNet knows."""
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(model, subfolder="vae", variant="fp16", dtype=torch.float32)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return vae


def build_tiny(channels: int = 12) -> AutoencoderTiny:
    """An AutoencoderTiny for the scaled latents that a UNet works on. Its decoder has no block at full size, where most
    of the time would go."""
    return AutoencoderTiny(
        encoder_block_out_channels=(channels,) * 3,
        decoder_block_out_channels=(channels,) * 3,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 0),
        latent_channels=4,
        scaling_factor=1.0,
    )


Encode = Callable[[Tensor], Tensor]  # pictures `"b 3 64 64"` in -1 to 1 to scaled latents `"b 4 16 16"`


class PictureSource:
    """Batches of random pictures, `"b c h w"` in -1 to 1; a share of `crowded` is full of things."""

    def __init__(self, vocabulary: Vocabulary, batch_size: int, crowded: float = 0.5) -> None:
        self.crowded = crowded
        self.sampler = SceneSampler(vocabulary)
        self.composer = Composer(vocabulary)
        self.batch_size = batch_size

    def batch(self, rng: random.Random) -> Tensor:
        return to_tensor([self._picture(rng) for _ in range(self.batch_size)])

    def _picture(self, rng: random.Random) -> Pixels:
        if rng.random() < self.crowded:
            return self.composer.crowd(rng)
        return self.composer.compose(self.sampler.sample(rng), rng)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1, squares for the large errors, and L1 on differences between neighbours, which keeps edges crisp."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def fit_code(vocabulary: Vocabulary, count: int = FIT_PICTURES, seed: int = 6) -> LinearCode:
    """The linear code of this vocabulary's pictures."""
    source = PictureSource(vocabulary, batch_size=count, crowded=0)
    return LinearCode.fit(source.batch(random.Random(seed)))


def train_kl(
    source: PictureSource, code: LinearCode, out: Path, settings: TrainSettings, vae: AutoencoderKL
) -> AutoencoderKL:
    """Train the KL autoencoder and write it to `out/vae`."""
    trainer = Trainer(vae.train(), out / "kl", settings)

    def loss_of(_step: int) -> Tensor:
        pixels = source.batch(trainer.rng)
        with autocast():
            posterior = vae.encode(pixels).latent_dist
            latents = SCALING_FACTOR * posterior.mean.float()
            output = vae.decode(roughen(latents) / SCALING_FACTOR).sample
        anchor = F.mse_loss(latents, code.encode(pixels))
        width = F.mse_loss(posterior.logvar.float(), torch.full_like(latents, LOG_VARIANCE))
        return reconstruction_loss(output.float(), pixels) + ANCHOR_WEIGHT * anchor + WIDTH_WEIGHT * width

    trainer.fit(loss_of)
    averaged: AutoencoderKL = trainer.keep_average().eval()
    averaged.save_pretrained(out / "vae")
    return averaged


def train_tiny(
    source: PictureSource, encode: Encode, out: Path, settings: TrainSettings, tiny: AutoencoderTiny
) -> AutoencoderTiny:
    """Train the tiny autoencoder on the scaled latents that `encode` gives, and write it to `out/taesd`."""
    trainer = Trainer(tiny.train(), out / "tiny", settings)

    def loss_of(_step: int) -> Tensor:
        pixels = source.batch(trainer.rng)
        latents = encode(pixels)
        few = len(pixels) // ENCODER_SAVING
        with autocast():
            encoded, output = tiny.encode(pixels[:few]).latents, tiny.decode(roughen(latents)).sample
        return reconstruction_loss(output.float(), pixels) + ENCODER_WEIGHT * F.mse_loss(encoded.float(), latents[:few])

    trainer.fit(loss_of)
    averaged: AutoencoderTiny = trainer.keep_average().eval()
    averaged.save_pretrained(out / "taesd")
    return averaged


def vae_encoder(vae: AutoencoderKL) -> Encode:
    """From pictures to the scaled latents that a UNet works on."""

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        with autocast():
            mean = vae.encode(pixels).latent_dist.mean
        latents: Tensor = mean.float().contiguous() * vae.config.scaling_factor
        return latents

    return encode


def roughen(latents: Tensor) -> Tensor:
    """Scaled latents with noise, each picture at a level of its own."""
    return latents + MAX_NOISE * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)


@torch.no_grad()
def signal_to_noise(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in -1 to 1."""
    return float(10 * torch.log10(4 / F.mse_loss(output.clamp(-1, 1), target)))


@torch.no_grad()
def report(source: PictureSource, vae: AutoencoderKL, tiny: AutoencoderTiny, seed: int) -> None:
    """Print how well both decoders read the same latents, on fresh pictures."""
    rng = random.Random(seed)
    pixels = torch.cat([source.batch(rng) for _ in range(16)])
    latents = vae_encoder(vae)(pixels)
    read = {"KL": vae.decode(latents / SCALING_FACTOR).sample, "tiny": tiny.decode(latents).sample}
    print(f"latents: mean {latents.mean():.3f}, standard deviation {latents.std():.3f}")
    for name, pictures in read.items():
        print(f"{name}: {signal_to_noise(pictures, pixels):.2f} dB")
