"""The discriminator of adversarial distillation: heads on frozen feature maps, told what the picture should show.

As in Sauer et al., arXiv 2311.17042, section 3.1 and StyleGAN-T (arXiv 2301.09515, section 4.1): a light head with
spectral normalization (Miyato et al., arXiv 1802.05957) on each map, conditioned by projection (Miyato & Koyama, arXiv
1802.05637), hinge loss, and the R1 penalty (Mescheder et al., arXiv 1801.04406) at the heads' inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.training.teachers import Conditions

MAX_WIDTH = 256
CONDITION_WIDTH = 256
LEVEL_WIDTH = 64
GROUP = 16  # channels of a normalization group


class Condition(nn.Module):
    """What a picture is judged by, as one vector: its text, what the original shows, and how much noise is on it.

    `states` and `pooled` are the widths of the text's states and of SDXL's pooled embedding (0 without), `image` that
    of the original's summary.
    """

    def __init__(self, states: int, pooled: int, image: int, width: int = CONDITION_WIDTH) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(states))
        self.text = nn.Sequential(nn.LayerNorm(states + pooled), nn.Linear(states + pooled, width))
        self.image = nn.Sequential(nn.LayerNorm(image), nn.Linear(image, width))
        self.level = nn.Linear(LEVEL_WIDTH, width)

    def forward(self, conditions: Conditions, summary: Tensor, seen: Tensor, levels: Tensor) -> Tensor:
        """`"b d"`. `seen` `"b"` is how much of the original the student could see: one that began with noise alone
        can't be asked for just this picture."""
        level = self.level(get_timestep_embedding(levels, LEVEL_WIDTH))
        vector = self.text(self._read(conditions)) + seen[:, None] * self.image(summary) + level
        return F.silu(vector)

    def _read(self, conditions: Conditions) -> Tensor:
        """Attention over the tokens, so that padding needn't be known."""
        states = conditions.states.float()
        attention = (states @ self.query / math.sqrt(states.shape[-1])).softmax(dim=1)
        text = (attention[:, None] @ states)[:, 0]
        return text if conditions.pooled is None else torch.cat([text, conditions.pooled.float()], dim=1)


class Head(nn.Module):
    """Logits `"b h w"` of a feature map `"b c h w"`: high where it looks real and fits the condition."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        width = min(channels, MAX_WIDTH)
        self.entry = spectral_norm(nn.Conv2d(channels, width, 1))
        self.mix = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.score = spectral_norm(nn.Conv2d(width, 1, 1))
        self.projection = nn.Linear(condition, width)
        self.norms = nn.ModuleList(nn.GroupNorm(max(1, width // GROUP), width) for _ in range(2))

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        hidden = F.leaky_relu(self.norms[0](self.entry(features)), 0.2)
        hidden = (hidden + F.leaky_relu(self.norms[1](self.mix(hidden)), 0.2)) / math.sqrt(2)
        projected = self.projection(condition) / math.sqrt(hidden.shape[1])
        fit = torch.einsum("bchw,bc->bhw", hidden, projected)
        logits: Tensor = self.score(hidden)[:, 0] + fit
        return logits


class Heads(nn.Module):
    """One head per feature map, and the condition that they share."""

    def __init__(self, channels: Sequence[int], states: int, pooled: int) -> None:
        super().__init__()
        self.condition = Condition(states, pooled, channels[-1])
        self.heads = nn.ModuleList(Head(width, CONDITION_WIDTH) for width in channels)

    def forward(self, maps: Sequence[Tensor], condition: Tensor) -> list[Tensor]:
        return [head(features, condition) for head, features in zip(self.heads, maps, strict=True)]


def deceive(logits: Sequence[Tensor]) -> Tensor:
    """The student's loss: its pictures should look real to every head."""
    return -torch.stack([each.mean() for each in logits]).sum()


def tell_apart(real: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """The heads' hinge loss."""
    return torch.stack(
        [F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in zip(real, made, strict=True)],
    ).sum()


def r1_penalty(maps: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
    """Mean over the pictures of the squared gradient of each head's logits, summed over places, by its features."""
    gradients = torch.autograd.grad([each.sum() for each in logits], list(maps), create_graph=True)
    return torch.stack([gradient.square().sum((1, 2, 3)).mean() for gradient in gradients]).sum()
