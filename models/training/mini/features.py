"""A classifier of latents, for its features: it learns which things a painted picture shows, and on which background.

What it sees on the way is what a discriminator of adversarial distillation looks through (`fewstep distill turbo
--features`): of 16x16 latents a few small maps, at a fraction of a UNet's cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.training.features import LatentClassifier
from models.training.fingerprints import tensor_fingerprint
from models.training.lcm import RUN
from models.training.mini.dataset import Scene
from models.training.mini.latents import LatentCache
from models.training.mini.vocabulary import Vocabulary
from models.training.trainer import Compute, Trainer, TrainSettings

HELD_OUT_SHARE = 0.02
UNNAMED = -100  # a background of no named colour, which cross entropy leaves out


@dataclass(frozen=True)
class Labels:
    """`things` `"b n"` are 1 for what is there, `backgrounds` `"b"` the number of the colour, or UNNAMED."""

    things: Tensor
    backgrounds: Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene], vocabulary: Vocabulary) -> Labels:
        things = torch.zeros(len(scenes), len(vocabulary.things))
        for row, scene in enumerate(scenes):
            things[row, list(scene.things)] = 1
        backgrounds = [UNNAMED if scene.background is None else scene.background for scene in scenes]
        return cls(things, torch.tensor(backgrounds))


@dataclass(frozen=True)
class Accuracy:
    """Shares: of pictures whose things are just those that look likeliest, and of named backgrounds that are told."""

    things: float
    backgrounds: float


def build_classifier(vocabulary: Vocabulary, channels: tuple[int, ...] = (64, 128, 192)) -> LatentClassifier:
    network: LatentClassifier = LatentClassifier(len(vocabulary.things), len(vocabulary.colors), channels=channels)
    return network


class ClassifierTraining:
    """Trains a classifier; its averaged weights lie in `out` after every checkpoint, and what the training needs to go
    on in `out/training`. Raises CheckpointError where that is another run's."""

    def __init__(
        self,
        network: LatentClassifier,
        cache: LatentCache,
        vocabulary: Vocabulary,
        out: Path,
        settings: TrainSettings,
        batch_size: int = 64,
        compute: Compute | None = None,
    ) -> None:
        self.network, self.cache, self.vocabulary, self.out = network, cache, vocabulary, out
        self.batch_size, self.compute = batch_size, compute or Compute()
        identity = {"data": tensor_fingerprint(cache.latents), "batch_size": batch_size}
        self.trainer = Trainer(network.to(self.compute.device).train(), out / RUN, settings, identity=identity)

    def train(self, until: int | None = None) -> None:
        """To the end of the plan, or to this step."""
        self.trainer.fit(self.loss, self.save, until)

    def loss(self, _step: int) -> Tensor:
        latents, scenes = self.cache.draw(self.batch_size, self.trainer.rng)
        with self.compute.autocast():
            things, backgrounds = self.network(_mirrored(latents).to(self.compute.device))
        return _loss(things.float().cpu(), backgrounds.float().cpu(), Labels.of(scenes, self.vocabulary))

    def save(self) -> None:
        self.network.save_pretrained(self.out)


def _mirrored(latents: Tensor) -> Tensor:
    """Half of the pictures, at random. Latents keep the places of pixels."""
    chosen = torch.rand(len(latents), 1, 1, 1) < 0.5
    return torch.where(chosen, latents.flip(3), latents)


def _loss(things: Tensor, backgrounds: Tensor, labels: Labels) -> Tensor:
    """Summed over the things, since few of many are there."""
    loss = F.binary_cross_entropy_with_logits(things, labels.things, reduction="none").sum(1).mean()
    if bool((labels.backgrounds != UNNAMED).any()):
        loss = loss + F.cross_entropy(backgrounds, labels.backgrounds, ignore_index=UNNAMED)
    return loss


@torch.no_grad()
def measure(
    network: LatentClassifier, cache: LatentCache, vocabulary: Vocabulary, compute: Compute | None = None
) -> Accuracy:
    """On all pictures of the cache."""
    compute = compute or Compute()
    labels = Labels.of(cache.scenes, vocabulary)
    outputs = [network.eval()(part.float().to(compute.device)) for part in torch.split(cache.latents, 256)]
    things, backgrounds = (torch.cat(parts).cpu() for parts in zip(*outputs, strict=True))
    hits = [
        set(logits.topk(int(wanted.sum())).indices.tolist()) == set(wanted.nonzero().flatten().tolist())
        for logits, wanted in zip(things, labels.things, strict=True)
    ]
    named = labels.backgrounds != UNNAMED
    told = backgrounds.argmax(1)[named] == labels.backgrounds[named]
    return Accuracy(sum(hits) / len(hits), float(told.float().mean()))


def train_classifier(cache: LatentCache, vocabulary: Vocabulary, out: Path, settings: TrainSettings) -> Accuracy:
    """Train a classifier and measure it on pictures that it never saw; continues where an interrupted run stopped."""
    seen, held_out = split(cache)
    torch.manual_seed(settings.seed)
    training = ClassifierTraining(build_classifier(vocabulary), seen, vocabulary, out, settings)
    training.train()
    return measure(training.trainer.keep_average(), held_out, vocabulary)


def split(cache: LatentCache, share: float = HELD_OUT_SHARE) -> tuple[LatentCache, LatentCache]:
    """What to learn from, and the last `share`, to measure on."""
    end = len(cache.scenes) - max(1, round(share * len(cache.scenes)))
    return LatentCache(cache.latents[:end], cache.scenes[:end]), LatentCache(cache.latents[end:], cache.scenes[end:])
