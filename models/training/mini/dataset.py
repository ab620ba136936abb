"""Scenes and their pictures: one or two things on a background, composed on the fly from cached sprites."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.training.mini.sprites import draw_sprites
from models.training.mini.vocabulary import Vocabulary

IMAGE_SIZE = 64
OVERSAMPLING = 2

Layout = Literal["single", "row", "column"]
Size = Literal["small", "normal", "large"]
Pixels = npt.NDArray[np.uint8]
RGB = tuple[int, int, int]
Place = tuple[float, float, float]  # centre and scale, as fractions of the picture's side

SCALES: dict[str, tuple[float, float]] = {"small": (0.41, 0.43), "normal": (0.74, 0.77), "large": (0.91, 0.93)}
REACH = {"small": 0.02, "normal": 0.02, "large": 0.01}  # how far from the middle a single thing may be
PAIR_SCALE = (0.43, 0.45)
MIRRORED = 0.0
TILT = 1.0  # degrees, standard deviation


@dataclass(frozen=True)
class Scene:
    """What a caption says about a picture. Pose, place and an unnamed background are drawn when it is composed."""

    things: tuple[int, ...]
    layout: Layout = "single"
    size: Size = "normal"
    background: int | None = None


class SceneSampler:
    """Draws scenes: mostly emoji, some shapes; one or two of them; the background named or not."""

    def __init__(self, vocabulary: Vocabulary, pairs: float = 0.3, shapes: float = 0.12) -> None:
        self.vocabulary = vocabulary
        self.pairs = pairs
        self.shapes = shapes

    def sample(self, rng: random.Random) -> Scene:
        if rng.random() < self.pairs:
            return self._pair(rng)
        thing = self._thing(rng)
        size: Size = rng.choices(("small", "normal", "large"), (0.15, 0.72, 0.13))[0]
        return Scene((thing,), "single", size, self._background((thing,), 0.78, rng))

    def _pair(self, rng: random.Random) -> Scene:
        first, second = self._thing(rng), self._thing(rng)
        layout: Layout = "row" if rng.random() < 0.65 else "column"
        return Scene((first, second), layout, "normal", self._background((first, second), 0.85, rng))

    def _thing(self, rng: random.Random) -> int:
        vocabulary = self.vocabulary
        pool = vocabulary.shapes if not vocabulary.emoji or rng.random() < self.shapes else vocabulary.emoji
        return rng.choice(pool)

    def _background(self, things: tuple[int, ...], named: float, rng: random.Random) -> int | None:
        """A named background (or none), never the colour of a shape that would vanish on it."""
        if rng.random() > named:
            return None
        taken = {self.vocabulary.things[thing].color for thing in things}
        return rng.choice([color for color in range(len(self.vocabulary.colors)) if color not in taken])


class Composer:
    """Paints scenes. Poses vary lightly, so that two seeds give two pictures."""

    def __init__(self, vocabulary: Vocabulary, sprites: list[Image.Image] | None = None) -> None:
        self.vocabulary = vocabulary
        self.sprites = sprites if sprites is not None else draw_sprites(vocabulary)

    def compose(self, scene: Scene, rng: random.Random) -> Pixels:
        """A picture of the scene, `"h w c"`."""
        return self._paint(scene.background, scene.things, _places(scene, rng), rng)

    def crowd(self, rng: random.Random) -> Pixels:
        """A picture full of things, for the autoencoder: plain backgrounds teach it little."""
        things = [rng.randrange(len(self.sprites)) for _ in range(rng.randint(3, 8))]
        places = [(rng.random(), rng.random(), rng.uniform(0.3, 0.7)) for _ in things]
        return self._paint(None, things, places, rng)

    def _paint(
        self, background: int | None, things: Sequence[int], places: Sequence[Place], rng: random.Random
    ) -> Pixels:
        """Paint large, then reduce, so that edges are smooth."""
        side = IMAGE_SIZE * OVERSAMPLING
        canvas = self._backdrop(background, side, rng)
        for thing, (x, y, scale) in zip(things, places, strict=True):
            sprite = self._pose(thing, round(scale * side), rng)
            corner = (round(x * side - sprite.width / 2), round(y * side - sprite.height / 2))
            canvas.paste(sprite, corner, sprite)
        return np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.uint8)

    def _backdrop(self, background: int | None, side: int, rng: random.Random) -> Image.Image:
        if background is not None:
            return Image.new("RGB", (side, side), self.vocabulary.colors[background].rgb)
        top, bottom = self._any_color(rng), self._any_color(rng)
        if rng.random() < 0.6:
            return Image.new("RGB", (side, side), top)
        mask = Image.linear_gradient("L").resize((side, side))
        return Image.composite(Image.new("RGB", (side, side), bottom), Image.new("RGB", (side, side), top), mask)

    def _any_color(self, rng: random.Random) -> RGB:
        """A blend of two named colours."""
        first, second = rng.choice(self.vocabulary.colors).rgb, rng.choice(self.vocabulary.colors).rgb
        share = 0.35 * rng.random()
        red, green, blue = (round(a + share * (b - a)) for a, b in zip(first, second, strict=True))
        return red, green, blue

    def _pose(self, thing: int, side: int, rng: random.Random) -> Image.Image:
        """The sprite at its size, lightly turned, sometimes mirrored."""
        sprite = self.sprites[thing].resize((side, side), Image.Resampling.LANCZOS)
        if rng.random() < MIRRORED:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        angle = max(-2.5 * TILT, min(2.5 * TILT, rng.gauss(0.0, TILT)))
        return sprite.rotate(angle, Image.Resampling.BICUBIC, expand=True)


def _places(scene: Scene, rng: random.Random) -> list[Place]:
    """Where each thing goes."""
    if scene.layout == "single":
        scale = rng.uniform(*SCALES[scene.size])
        reach = min(0.5 - scale / 2, REACH[scene.size])
        return [(0.5 + rng.uniform(-reach, reach), 0.5 + rng.uniform(-reach, reach), scale)]
    places = []
    for along in (0.255, 0.745):
        scale, across = rng.uniform(*PAIR_SCALE), rng.uniform(0.49, 0.51)
        along += rng.uniform(-0.01, 0.01)
        places.append((along, across, scale) if scene.layout == "row" else (across, along, scale))
    return places
