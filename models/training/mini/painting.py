"""The miniature's own pictures as the data of any teacher's distillation, painted and encoded once."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from models.training.fingerprints import fingerprint
from models.training.mini.latents import SCENES, LatentCache, encode_scenes
from models.training.mini.sprites import FONT_FILE
from models.training.mini.teacher import CaptionedLatents, PaintedBatches
from models.training.mini.vocabulary import Vocabulary, load_vocabulary
from models.training.teachers import Encoders, Size


def drawable_vocabulary() -> Vocabulary:
    """All of it where the font for emoji is, else the shapes."""
    vocabulary = load_vocabulary()
    return vocabulary if FONT_FILE.exists() else vocabulary.without_emoji()


def paint(
    vocabulary: Vocabulary, encoders: Encoders, size: Size, root: Path, batch_size: int, dropout: float, count: int
) -> PaintedBatches:
    """Batches of `count` pictures, enlarged to `size`; an earlier run's latents are taken from `root`."""
    teacher = encoders.teacher
    key = fingerprint(teacher.fingerprint_of("vae"), size, count, [thing.names for thing in vocabulary.things])
    folder = root / f"mini-{key}"

    def encode(pixels: Tensor) -> Tensor:
        width, height = size
        return encoders.encode_pictures(F.interpolate(pixels, (height, width), mode="bilinear"))[0].cpu().contiguous()

    if not (folder / SCENES).exists():
        encode_scenes(vocabulary, encode, count).save(folder)
    data = CaptionedLatents(LatentCache.load(folder), vocabulary, encoders.tokenizers[0], batch_size)
    return PaintedBatches(data, encoders, dropout)
