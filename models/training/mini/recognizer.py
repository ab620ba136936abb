"""Tells what is in a picture: the nearest neighbour at 16x16 RGB among all drawings of all things in several poses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.training.mini.dataset import Pixels

SIDE = 16
ANGLES = (-18.0, -12.0, -6.0, 0.0, 6.0, 12.0, 18.0)
MIN_CONTRAST = 36  # a pixel farther than this from the background (largest channel) belongs to a thing
FRAME = 2  # decoders leave faint marks along a picture's edge, which must not widen the crop
MIN_PIXELS = 2  # rows and columns with fewer such pixels are taken for stray ones

Floats = npt.NDArray[np.float32]


def background_color(picture: Pixels) -> Floats:
    """Median of the picture's edge, two pixels wide: RGB."""
    sides = (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])
    edge = np.concatenate([side.reshape(-1, 3) for side in sides])
    return np.asarray(np.median(edge, axis=0), dtype=np.float32)


def background_noise(picture: Pixels, margin: int = 4) -> float:
    """How mottled a plain background is: standard deviation, in 0 to 255, of the pixels well away from any thing."""
    color = background_color(picture)
    away = ~_dilate(_thing_mask(picture, color), margin)
    return float(picture[away].astype(np.float32).std(axis=0).mean()) if away.any() else 0.0


def sharpness(picture: Pixels) -> float:
    """Mean difference between neighbouring pixels, in 0 to 255: blurred pictures have less of it."""
    values = picture.astype(np.float32)
    return float((np.abs(np.diff(values, axis=0)).mean() + np.abs(np.diff(values, axis=1)).mean()) / 2)


def look_distance(pictures: Sequence[Pixels], others: Sequence[Pixels]) -> float:
    """Root of the mean squared difference between the looks of pictures and of their counterparts, in 0 to 255."""
    differences = [_look(picture) - _look(other) for picture, other in zip(pictures, others, strict=True)]
    return float(np.sqrt(np.square(differences).mean()))


def _look(picture: Pixels) -> npt.NDArray[np.float64]:
    """Mean and spread of each colour channel, and sharpness: `"7"`."""
    return np.array([*picture.mean(axis=(0, 1)), *picture.std(axis=(0, 1)), sharpness(picture)])


class ColorNamer:
    """Names the background's colour: the nearest of the named ones."""

    def __init__(self, colors: Sequence[tuple[int, int, int]]) -> None:
        self.colors = np.asarray(colors, dtype=np.float32)

    def name(self, picture: Pixels) -> int:
        return int(((self.colors - background_color(picture)) ** 2).sum(axis=1).argmin())


class Recognizer:
    """Names the things in a picture by index. Crops make it blind to place and size."""

    def __init__(self, drawings: Sequence[Sequence[Image.Image]]) -> None:
        owned = [(thing, pose) for thing, kinds in enumerate(drawings) for one in kinds for pose in _poses(one)]
        references = np.asarray([_reference(pose) for _, pose in owned], dtype=np.float32)
        self.owners = np.asarray([thing for thing, _ in owned])
        alpha = references[..., 3:].reshape(len(owned), -1, 1) / 255
        self.colors, self.holes = references[..., :3].reshape(len(owned), -1, 3) * alpha, 1 - alpha[..., 0]

    def single(self, picture: Pixels) -> int | None:
        """The one thing in the picture; None if nothing stands out from the background."""
        return next(iter(self.nearest(picture, 1)), None)

    def pair(self, picture: Pixels, vertical: bool) -> tuple[int | None, int | None]:
        """The things in the left and right (or upper and lower) half."""
        color = background_color(picture)
        half = picture.shape[0] // 2
        halves = (picture[:half], picture[half:]) if vertical else (picture[:, :half], picture[:, half:])
        first, second = (next(iter(self.nearest(part, 1, color)), None) for part in halves)
        return first, second

    def nearest(self, picture: Pixels, count: int, color: Floats | None = None) -> list[int]:
        """The `count` things that look most like the one in the picture, nearest first; none if nothing stands out."""
        color = background_color(picture) if color is None else color
        crop = _crop(picture, color)
        if crop is None:
            return []
        things = dict.fromkeys(self.owners[self._distances(crop, color).argsort()].tolist())
        return list(things)[:count]

    def _distances(self, crop: Floats, color: Floats) -> Floats:
        """Squared distances to all references on a ground of `color`, multiplied out, less what they all share."""
        pixels = crop.reshape(-1, 3)
        own, through, holes = self._squares
        on_ground = own + 2 * (through @ color) + holes * (color @ color)
        seen = self.colors.reshape(len(self.owners), -1) @ pixels.reshape(-1) + (self.holes @ pixels) @ color
        return np.asarray(on_ground - 2 * seen, dtype=np.float32)

    @cached_property
    def _squares(self) -> tuple[Floats, Floats, Floats]:
        return (
            np.einsum("npc,npc->n", self.colors, self.colors),
            np.einsum("npc,np->nc", self.colors, self.holes),
            np.einsum("np,np->n", self.holes, self.holes),
        )


def _poses(sprite: Image.Image) -> list[Image.Image]:
    mirrored = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return [
        side.rotate(angle, Image.Resampling.BICUBIC, expand=True) for side in (sprite, mirrored) for angle in ANGLES
    ]


def _reference(pose: Image.Image) -> Floats:
    visible = pose.getchannel("A").point(lambda alpha: 255 if alpha > 128 else 0).getbbox()
    return np.asarray(_square(pose.crop(visible), (0, 0, 0, 0)), dtype=np.float32)


def _crop(picture: Pixels, color: Floats) -> Floats | None:
    """What stands out from the background, centred on a square of the background's colour, at 16x16."""
    mask = _thing_mask(picture, color)
    mask[:FRAME] = mask[-FRAME:] = mask[:, :FRAME] = mask[:, -FRAME:] = False
    rows = np.flatnonzero(mask.sum(axis=1) >= MIN_PIXELS)
    columns = np.flatnonzero(mask.sum(axis=0) >= MIN_PIXELS)
    if not len(rows) or not len(columns):
        return None
    cut = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    red, green, blue = (round(float(channel)) for channel in color)
    return np.asarray(_square(Image.fromarray(cut), (red, green, blue)), dtype=np.float32)


def _square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new(image.mode, (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.BOX)


def _thing_mask(picture: Pixels, color: Floats) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = np.abs(picture.astype(np.float32) - color).max(axis=2) > MIN_CONTRAST
    return mask


def _dilate(mask: npt.NDArray[np.bool_], margin: int) -> npt.NDArray[np.bool_]:
    grown = mask.copy()
    for shift in range(1, margin + 1):
        for axis in (0, 1):
            grown |= np.roll(mask, shift, axis) | np.roll(mask, -shift, axis)
    return grown
