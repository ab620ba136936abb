"""Previews for a model without a tiny decoder: the linear map from latents to colours that fits its decoder best."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_SAMPLES = 8
SIDE = 16  # of the sample latents
COARSENESS = 4  # pictures are smooth: so are three quarters of the samples


class LatentRgb:
    """`decode` takes latents "b c h w" to pictures "b 3 height width" in [-1, 1]; so does this, roughly and almost for
    free. Fitted once, by least squares over latents of random noise, smooth and rough, and their decoded colours."""

    def __init__(self, decode: Callable[[Tensor], Tensor], num_channels: int, scale_factor: int, device: torch.device):
        self._scale_factor = scale_factor
        latents = _sample_latents(num_channels).to(device)
        with torch.inference_mode():
            colours = F.avg_pool2d(decode(latents).float(), scale_factor)
            fit = torch.linalg.lstsq(_rows(_with_one(latents)).cpu(), _rows(colours).cpu())
        self._weights = fit.solution.to(device)

    def __call__(self, latents: Tensor) -> Tensor:
        colours = torch.einsum("bchw,cd->bdhw", _with_one(latents), self._weights)
        return F.interpolate(colours, scale_factor=self._scale_factor, mode="bilinear")


def _sample_latents(num_channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rough = torch.randn(NUM_SAMPLES, num_channels, SIDE, SIDE, generator=generator)
    smooth = F.interpolate(
        torch.randn(3 * NUM_SAMPLES, num_channels, SIDE // COARSENESS, SIDE // COARSENESS, generator=generator),
        scale_factor=COARSENESS,
        mode="bilinear",
    )
    return torch.cat([rough, smooth])


def _with_one(latents: Tensor) -> Tensor:
    """A further channel of ones, for the map's constant."""
    return torch.cat([latents.float(), torch.ones_like(latents[:, :1], dtype=torch.float32)], dim=1)


def _rows(images: Tensor) -> Tensor:
    """ "b c h w" to "(b h w) c"."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)
