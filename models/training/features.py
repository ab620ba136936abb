"""Frozen networks that a discriminator looks through: from latents to feature maps at several depths.

Adversarial distillation doesn't train a network to tell pictures apart from scratch: light heads on the features of one
that knows pictures already learn faster and mislead less (Sauer et al., arXiv 2311.17042, section 3.1). Here these are
the teacher's own encoder, which every teacher has (arXiv 2403.12015), or a classifier of latents, trained for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from models.networks import check_weights, explained
from models.training.diffusion import Diffusion
from models.training.errors import FeaturesError
from models.training.fingerprints import file_fingerprints, fingerprint
from models.training.teachers import LATENT_CHANNELS, Conditions
from models.training.trainer import Compute, Identity

TEACHER = "teacher"  # in place of a folder


class Features(Protocol):
    """Feature maps `"b c h w"` in fp32 of latents `"b 4 h w"`. Gradients go through to the latents, and to nothing
    else."""

    channels: tuple[int, ...]  # of the maps, from fine to coarse

    @property
    def identity(self) -> Identity:
        """What makes these features what they are, by the names of settings."""

    def draw_levels(self, count: int) -> Tensor:
        """Timesteps `"b"` up to which latents are noised before they are looked at."""

    def extract(self, latents: Tensor, levels: Tensor, conditions: Conditions) -> list[Tensor]:
        """The maps, of latents noised up to `levels`."""

    def summarize(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """What the latents show, without noise and without places: `"b c"`, of as many channels as the last map."""


class TeacherFeatures:
    """What the encoder half of a UNet sees: the state before each downsampling, and the middle.

    The network knows noisy pictures, so they are noised first: much noise shows the layout alone, little the texture.
    The share of all timesteps is drawn from a logit-normal distribution around `middle` (arXiv 2403.12015, section
    3.1).
    """

    def __init__(
        self, unet: Any, diffusion: Diffusion, compute: Compute, middle: float = 0.0, spread: float = 1.0
    ) -> None:
        self.unet, self.diffusion, self.compute = unet, diffusion, compute
        self.middle, self.spread = middle, spread
        widths = unet.config.block_out_channels
        self.channels = (*widths, widths[-1])

    @property
    def identity(self) -> Identity:
        return {"features": TEACHER, "noise_middle": self.middle, "noise_spread": self.spread}

    def draw_levels(self, count: int) -> Tensor:
        shares = torch.sigmoid(self.middle + self.spread * torch.randn(count))
        return (shares * self.diffusion.num_timesteps).long().to(self.compute.device)

    def extract(self, latents: Tensor, levels: Tensor, conditions: Conditions) -> list[Tensor]:
        return self._look(self.diffusion.add_noise(latents, torch.randn_like(latents), levels), levels, conditions)

    @torch.no_grad()
    def summarize(self, latents: Tensor, conditions: Conditions) -> Tensor:
        start = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
        return self._look(latents, start, conditions)[-1].mean((2, 3))

    def _look(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> list[Tensor]:
        with self.compute.autocast():
            return [state.float() for state in encode(self.unet, noisy, timesteps, conditions)]


def encode(unet: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> list[Tensor]:
    """The encoder half of a UNet2DConditionModel's forward: the state after the last layer of each block, and the
    middle block's."""
    added = {"text_embeds": conditions.pooled, "time_ids": conditions.time_ids}
    embedded = unet.time_embedding(unet.get_time_embed(noisy, timesteps))
    if unet.config.addition_embed_type is not None:
        embedded = embedded + unet.get_aug_embed(embedded, conditions.states, added)
    states = unet.process_encoder_hidden_states(conditions.states, added)
    hidden, maps = unet.conv_in(noisy), []
    for block in unet.down_blocks:
        text = {"encoder_hidden_states": states} if getattr(block, "has_cross_attention", False) else {}
        hidden, layers = block(hidden_states=hidden, temb=embedded, **text)
        maps.append(layers[len(block.resnets) - 1])
    text = {"encoder_hidden_states": states} if getattr(unet.mid_block, "has_cross_attention", False) else {}
    return [*maps, unet.mid_block(hidden, embedded, **text)]


class LatentClassifier(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A small convolutional classifier of latents: `num_labels` things that are there or aren't, and `num_colors` of
    which the background has one."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_labels: int,
        num_colors: int,
        in_channels: int = LATENT_CHANNELS,
        channels: tuple[int, ...] = (64, 128, 192),
    ) -> None:
        super().__init__()
        before = (in_channels, *channels[:-1])
        self.stages = nn.ModuleList(
            _stage(wide_in, wide_out, stride=1 if number == 0 else 2)
            for number, (wide_in, wide_out) in enumerate(zip(before, channels, strict=True))
        )
        self.labels = nn.Linear(2 * channels[-1], num_labels)
        self.colors = nn.Linear(2 * channels[-1], num_colors)

    def maps(self, latents: Tensor) -> list[Tensor]:
        """One per stage, from fine to coarse."""
        maps = []
        for stage in self.stages:
            latents = stage(latents)
            maps.append(latents)
        return maps

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of things `"b n"` and of background colours `"b n"`."""
        last = self.maps(latents)[-1]
        pooled = torch.cat([last.mean((2, 3)), last.amax((2, 3))], dim=1)
        return self.labels(pooled), self.colors(pooled)


def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1), Residual(channels_out), Residual(channels_out)
    )


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = max(1, channels // 16)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        change = hidden
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            change = convolution(F.silu(norm(change)))
        return hidden + change


class ClassifierFeatures:
    """The stages of a frozen LatentClassifier, which sees latents as they are."""

    def __init__(self, network: LatentClassifier, compute: Compute, name: str) -> None:
        self.network, self.compute = network, compute
        self.channels = tuple(network.config.channels)
        self._name = name

    @property
    def identity(self) -> Identity:
        return {"features": self._name}

    def draw_levels(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.long, device=self.compute.device)

    def extract(self, latents: Tensor, levels: Tensor, conditions: Conditions) -> list[Tensor]:  # noqa: ARG002
        with self.compute.autocast():
            return [state.float() for state in self.network.maps(latents)]

    @torch.no_grad()
    def summarize(self, latents: Tensor, conditions: Conditions) -> Tensor:
        return self.extract(latents, self.draw_levels(len(latents)), conditions)[-1].mean((2, 3))


def load_classifier(folder: Path, compute: Compute) -> ClassifierFeatures:
    """Of a folder that `models.training.mini.features` wrote, or of any other LatentClassifier's.

    Raises FeaturesError for a folder of something else, LoadError for files that can't be read.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise FeaturesError(f"--features {folder}: {TEACHER!r} or the folder of a LatentClassifier is needed")
    with explained(f"can't read {config}"):
        kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    if kind != LatentClassifier.__name__:
        raise FeaturesError(f"--features {folder}: a LatentClassifier is needed there, it has {kind}")
    check_weights(folder)
    with explained(f"can't load the LatentClassifier of {folder}"):
        network = LatentClassifier.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    if network.config.in_channels != LATENT_CHANNELS:
        channels = network.config.in_channels
        raise FeaturesError(
            f"--features {folder}: its LatentClassifier takes {channels} channels, not {LATENT_CHANNELS}"
        )
    name = fingerprint(file_fingerprints(folder.glob("*.safetensors")))
    return ClassifierFeatures(network.requires_grad_(False).eval().to(compute.device), compute, name)
