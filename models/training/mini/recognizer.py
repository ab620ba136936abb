"""Tells what is in a picture: nearest neighbour at 16x16 RGB among all things of the vocabulary in several poses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.training.mini.dataset import Pixels

SIDE = 16
ANGLES = (-14.0, -7.0, 0.0, 7.0, 14.0)
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


class ColorNamer:
    """Names the background's colour: the nearest of the named ones."""

    def __init__(self, colors: Sequence[tuple[int, int, int]]) -> None:
        self.colors = np.asarray(colors, dtype=np.float32)

    def name(self, picture: Pixels) -> int:
        return int(((self.colors - background_color(picture)) ** 2).sum(axis=1).argmin())


class Recognizer:
    """Names the things in a picture by index. Crops make it blind to place and size."""

    def __init__(self, sprites: Sequence[Image.Image]) -> None:
        poses = [[_reference(pose) for pose in _poses(sprite)] for sprite in sprites]
        self.poses_per_thing = len(poses[0])
        references = np.asarray(poses, dtype=np.float32).reshape(-1, SIDE, SIDE, 4)
        self.alpha = references[..., 3:] / 255
        self.premultiplied = references[..., :3] * self.alpha

    def single(self, picture: Pixels) -> int | None:
        """The one thing in the picture; None if nothing stands out from the background."""
        return self._nearest(picture, background_color(picture))

    def pair(self, picture: Pixels, vertical: bool) -> tuple[int | None, int | None]:
        """The things in the left and right (or upper and lower) half."""
        color = background_color(picture)
        half = picture.shape[0] // 2
        halves = (picture[:half], picture[half:]) if vertical else (picture[:, :half], picture[:, half:])
        return self._nearest(halves[0], color), self._nearest(halves[1], color)

    def _nearest(self, picture: Pixels, color: Floats) -> int | None:
        crop = _crop(picture, color)
        if crop is None:
            return None
        references = self.premultiplied + (1 - self.alpha) * color
        distances = ((references - crop) ** 2).sum(axis=(1, 2, 3))
        return int(distances.argmin()) // self.poses_per_thing


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
