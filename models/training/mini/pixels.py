"""Pictures as bytes and as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.training.mini.dataset import Pixels


def to_tensor(pictures: Sequence[Pixels]) -> Tensor:
    """`"h w c"` bytes to one batch, `"b c h w"` in -1 to 1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().float().div(127.5).sub(1)


def to_pixels(batch: Tensor) -> Pixels:
    """The way back: `"b c h w"` in -1 to 1 to `"b h w c"` bytes."""
    scaled = batch.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).numpy()
