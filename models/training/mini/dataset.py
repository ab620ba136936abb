"""Scenes and their pictures: one to three things on a background, composed on the fly from cached sprites.

Poses, drawings, places and unnamed backgrounds differ from picture to picture of one scene. So a denoiser that sees
only noise can't know the picture: its single step blurs them all together, and it takes many steps, or a distillation.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from models.training.mini.sprites import draw_sprites, tint
from models.training.mini.vocabulary import Vocabulary

IMAGE_SIZE = 64
LATENT_SIDE = 4  # pixels on a side that one latent stands for
OVERSAMPLING = 2
HELD_OUT = 0.1

Layout = Literal["single", "row", "column"]
Size = Literal["small", "normal", "large"]
Pixels = npt.NDArray[np.uint8]
RGB = tuple[int, int, int]
Place = tuple[float, float, float]  # centre and scale, as fractions of the picture's side


SCALES: dict[Size, float] = {"small": 0.42, "normal": 0.75, "large": 0.92}  # of the picture's side
GROUP_SCALES = {2: 0.42, 3: 0.3}  # by the number of things


@dataclass(frozen=True)
class Poses:
    """How much pictures of one scene differ.

    Things move by whole latents: moved by single pixels, each would be another picture to learn, and look the same to
    the eye.
    """

    reach: int  # in latents, how far from its usual place a thing may be, as far as it stays in the picture
    mirrored: float  # share


STILL = Poses(reach=0, mirrored=0.0)
LIVELY = Poses(reach=1, mirrored=0.5)


@dataclass(frozen=True)
class Scene:
    """What a caption says about a picture. Drawing, pose, place and an unnamed background come when it is composed."""

    things: tuple[int, ...]
    layout: Layout = "single"
    size: Size = "normal"
    background: int | None = None
    tints: tuple[int | None, ...] = ()  # a colour for each thing, or none for all

    def tint(self, place: int) -> int | None:
        return self.tints[place] if self.tints else None


def is_held_out(scene: Scene, vocabulary: Vocabulary, share: float = HELD_OUT) -> bool:
    """Whether no training picture may show this scene: a thing on a background, a thing in a colour, or two neighbours,
    whose names fall into the held-out `share` by their CRC-32. The words alone all occur in training.
    """
    names = [vocabulary.things[thing].name for thing in scene.things]
    combinations = [f"{one} & {other}" for one, other in pairwise(names)]
    for place, name in enumerate(names):
        if scene.background is not None and len(names) == 1:
            combinations.append(f"{name} on {vocabulary.colors[scene.background].name}")
        color = scene.tint(place)
        if color is not None:
            combinations.append(f"{vocabulary.colors[color].name} {name}")
    return any(zlib.crc32(combination.encode()) < share * 2**32 for combination in combinations)


@dataclass(frozen=True)
class SceneSampler:
    """Draws scenes: mostly emoji, some shapes; one to three of them; the background named or not."""

    vocabulary: Vocabulary
    pairs: float = 0.28
    trios: float = 0.05
    shapes: float = 0.1
    tinted: float = 0.12
    sizes: dict[Size, float] = field(default_factory=lambda: {"small": 0.15, "normal": 0.72, "large": 0.13})

    def sample(self, rng: random.Random) -> Scene:
        """A scene of the training split."""
        while is_held_out(scene := self.any_scene(rng), self.vocabulary):
            pass
        return scene

    def any_scene(self, rng: random.Random) -> Scene:
        """A scene of either split."""
        (number,) = rng.choices((1, 2, 3), (1 - self.pairs - self.trios, self.pairs, self.trios))
        things = tuple(self._thing(rng) for _ in range(number))
        colors = tuple(self._tint(thing, rng) for thing in things)
        background = self._background(things, colors, rng) if rng.random() < (0.78 if number == 1 else 0.85) else None
        if number == 1:
            (size,) = rng.choices(list(self.sizes), list(self.sizes.values()))
            return Scene(things, "single", size, background, colors)
        return Scene(things, "row" if rng.random() < 0.65 else "column", "normal", background, colors)

    def _thing(self, rng: random.Random) -> int:
        vocabulary = self.vocabulary
        pool = vocabulary.shapes if not vocabulary.emoji or rng.random() < self.shapes else vocabulary.emoji
        return rng.choice(pool)

    def _tint(self, thing: int, rng: random.Random) -> int | None:
        if rng.random() > self.tinted or not self.vocabulary.can_tint(thing):
            return None
        return rng.choice(self.vocabulary.tints)

    def _background(self, things: tuple[int, ...], tints: Sequence[int | None], rng: random.Random) -> int:
        """A named background, never the colour of a thing that would vanish on it."""
        taken = {self.vocabulary.things[thing].color for thing in things} | set(tints)
        return rng.choice([color for color in range(len(self.vocabulary.colors)) if color not in taken])


class Composer:
    """Paints scenes."""

    def __init__(
        self, vocabulary: Vocabulary, sprites: list[list[Image.Image]] | None = None, poses: Poses = LIVELY
    ) -> None:
        self.vocabulary = vocabulary
        self.sprites = sprites if sprites is not None else draw_sprites(vocabulary)
        self.poses = poses

    def compose(self, scene: Scene, rng: random.Random) -> Pixels:
        """A picture of the scene, `"h w c"`."""
        canvas = self._backdrop(scene.background, rng)
        for place, where in enumerate(self._places(scene, rng)):
            self._put(canvas, scene.things[place], scene.tint(place), where, rng)
        return _reduced(canvas)

    def crowd(self, rng: random.Random) -> Pixels:
        """A picture full of things, for the autoencoder: plain backgrounds teach it little."""
        canvas = self._backdrop(None, rng)
        for _ in range(rng.randint(3, 8)):
            thing = rng.randrange(len(self.sprites))
            self._put(canvas, thing, None, (rng.random(), rng.random(), rng.uniform(0.3, 0.7)), rng)
        return _reduced(canvas)

    def _put(self, canvas: Image.Image, thing: int, color: int | None, where: Place, rng: random.Random) -> None:
        x, y, scale = where
        side = canvas.width
        sprite = rng.choice(self.sprites[thing])
        if color is not None:
            sprite = tint(sprite, self.vocabulary.colors[color].rgb)
        sprite = self._pose(sprite, round(scale * side), rng)
        canvas.paste(sprite, (round(x * side - sprite.width / 2), round(y * side - sprite.height / 2)), sprite)

    def _pose(self, sprite: Image.Image, side: int, rng: random.Random) -> Image.Image:
        """The sprite at its size, sometimes mirrored."""
        sprite = sprite.resize((side, side), Image.Resampling.LANCZOS)
        return sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < self.poses.mirrored else sprite

    def _places(self, scene: Scene, rng: random.Random) -> list[Place]:
        """Where each thing goes."""
        number = len(scene.things)
        if number == 1:
            scale = SCALES[scene.size]
            room = math.floor((0.5 - scale / 2) * IMAGE_SIZE / LATENT_SIDE)
            reach = min(room, self.poses.reach)
            return [(_moved(0.5, reach, rng), _moved(0.5, reach, rng), scale)]
        places: list[Place] = []
        for along in (0.25, 0.75) if number == 2 else (0.1875, 0.5, 0.8125):
            across = _moved(0.5, self.poses.reach, rng)
            x, y = (along, across) if scene.layout == "row" else (across, along)
            places.append((x, y, GROUP_SCALES[number]))
        return places

    def _backdrop(self, background: int | None, rng: random.Random) -> Image.Image:
        """A plain one where it is named; else a plain, shaded or patterned one of colours between the named ones."""
        side = IMAGE_SIZE * OVERSAMPLING
        if background is not None:
            return Image.new("RGB", (side, side), self.vocabulary.colors[background].rgb)
        ground, other = self._any_color(rng), self._any_color(rng)
        (kind,) = rng.choices(("plain", "shaded", "patterned"), (0.4, 0.35, 0.25))
        if kind == "plain":
            return Image.new("RGB", (side, side), ground)
        if kind == "patterned":
            other = _between(ground, other, 0.35)
        mask = _shading(side, rng) if kind == "shaded" else _pattern(side, rng)
        return Image.composite(Image.new("RGB", (side, side), other), Image.new("RGB", (side, side), ground), mask)

    def _any_color(self, rng: random.Random) -> RGB:
        """A blend of two named colours."""
        first, second = rng.choice(self.vocabulary.colors).rgb, rng.choice(self.vocabulary.colors).rgb
        return _between(first, second, 0.35 * rng.random())


def _moved(middle: float, reach: int, rng: random.Random) -> float:
    """By up to `reach` latents either way."""
    return middle + rng.randint(-reach, reach) * LATENT_SIDE / IMAGE_SIZE


def _between(one: RGB, other: RGB, share: float) -> RGB:
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _shading(side: int, rng: random.Random) -> Image.Image:
    """A linear slope in any direction."""
    angle, span = rng.uniform(0, 2 * math.pi), np.linspace(-1, 1, side)
    slope = np.cos(angle) * span[None, :] + np.sin(angle) * span[:, None]
    return Image.fromarray((127.5 + 127.5 * slope / np.abs(slope).max()).astype(np.uint8))


def _pattern(side: int, rng: random.Random) -> Image.Image:
    """Stripes, dots or a chequerboard."""
    mask = Image.new("L", (side, side))
    pen, pitch = ImageDraw.Draw(mask), side // rng.randint(4, 7)
    kind, phase = rng.choice(("stripes", "dots", "squares")), rng.randrange(pitch)
    for column, x in enumerate(range(-phase, side, pitch)):
        if kind == "stripes":
            pen.rectangle((x, 0, x + pitch // 2, side), fill=255)
            continue
        for row, y in enumerate(range(-phase, side, pitch)):
            if kind == "dots":
                pen.ellipse((x + pitch // 4, y + pitch // 4, x + 3 * pitch // 4, y + 3 * pitch // 4), fill=255)
            elif (column + row) % 2:
                pen.rectangle((x, y, x + pitch - 1, y + pitch - 1), fill=255)
    return mask.rotate(90) if rng.random() < 0.5 else mask


def _reduced(canvas: Image.Image) -> Pixels:
    """What was painted large, at its size: so that edges are smooth."""
    return np.asarray(canvas.reduce(OVERSAMPLING), dtype=np.uint8)
