"""The latent code: a fixed linear one, the four main components of 4x4 blocks of pixels.

A learnt code would be better, but takes longer to learn than everything else together; this one is ready at once, keeps
all colours, and is smooth, which a denoiser likes. The autoencoders learn to write it and, mostly, to read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 4
CHANNELS = 4


@dataclass(frozen=True)
class LinearCode:
    """`weight` `"4 3 4 4"` and `bias` `"4"` of the convolution that encodes."""

    weight: Tensor
    bias: Tensor

    def encode(self, pixels: Tensor) -> Tensor:
        """`"b 3 64 64"` in -1 to 1 to scaled latents `"b 4 16 16"`, mean 0 and variance 1 over all."""
        return F.conv2d(pixels, self.weight, self.bias, stride=BLOCK)

    @classmethod
    def fit(cls, pixels: Tensor) -> LinearCode:
        """The main components of the blocks. Weaker ones are lifted half the way to the strongest."""
        blocks = F.unfold(pixels, BLOCK, stride=BLOCK).transpose(1, 2).flatten(0, 1)
        mean = blocks.mean(0)
        _, spreads, axes = torch.linalg.svd(blocks - mean, full_matrices=False)
        spreads = spreads[:CHANNELS] / len(blocks) ** 0.5
        rows = axes[:CHANNELS] / spreads[:, None].sqrt()
        rows = rows / spreads.mean().sqrt()
        return cls(rows.view(CHANNELS, 3, BLOCK, BLOCK).contiguous(), -(rows @ mean))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"weight": self.weight, "bias": self.bias}, path)

    @classmethod
    def load(cls, path: Path) -> LinearCode:
        return cls(**load_file(path))
