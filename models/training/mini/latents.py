"""Latents: the pictures that a denoiser learns from, painted and encoded once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from models.training.mini.autoencoder import Encode
from models.training.mini.dataset import Composer, Pixels, Scene, SceneSampler
from models.training.mini.pixels import to_tensor
from models.training.mini.vocabulary import Vocabulary

LATENTS = "latents.safetensors"
SCENES = "scenes.json"


@dataclass(frozen=True)
class LatentCache:
    """Scaled latents, `"n 4 h w"` in fp16, and the scene of each."""

    latents: Tensor
    scenes: list[Scene]

    def draw(self, count: int, rng: random.Random) -> tuple[Tensor, list[Scene]]:
        """A random batch."""
        picks = [rng.randrange(len(self.scenes)) for _ in range(count)]
        return self.latents[picks].float(), [self.scenes[pick] for pick in picks]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"latents": self.latents}, folder / LATENTS)
        (folder / SCENES).write_text(json.dumps([asdict(scene) for scene in self.scenes]))

    @staticmethod
    def exists(folder: Path) -> bool:
        return (folder / SCENES).exists()

    @classmethod
    def load(cls, folder: Path) -> LatentCache:
        rows = json.loads((folder / SCENES).read_text())
        scenes = [Scene(**{**row, "things": tuple(row["things"]), "tints": tuple(row["tints"])}) for row in rows]
        return cls(load_file(folder / LATENTS)["latents"], scenes)


def encode_scenes(
    vocabulary: Vocabulary,
    encode: Encode,
    count: int,
    restyle: Callable[[Pixels], Pixels] | None = None,
    batch_size: int = 64,
    seed: int = 7,
) -> LatentCache:
    """Draw scenes, paint them (and redraw them in a style) and encode them."""
    rng = random.Random(seed)
    sampler, composer = SceneSampler(vocabulary), Composer(vocabulary)
    scenes = [sampler.sample(rng) for _ in range(count)]
    batches = []
    for start in tqdm(range(0, count, batch_size), desc="latents", mininterval=2.0):
        pictures = [composer.compose(scene, rng) for scene in scenes[start : start + batch_size]]
        batches.append(encode(to_tensor([restyle(picture) for picture in pictures] if restyle else pictures)).half())
    return LatentCache(torch.cat(batches).contiguous(), scenes)
