"""A network smaller than any that is served."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1))
    return layers.eval().requires_grad_(False)
