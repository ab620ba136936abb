"""Styles as programs: each redraws a picture of the dataset, and a LoRA then learns to draw like that by itself.

A new style is one more function in `STYLES`. Lines are drawn two pixels wide: thinner ones get lost in latents that are
four times smaller than the picture.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from models.training.mini.dataset import Pixels

Floats = npt.NDArray[np.float32]
Restyle = Callable[[Pixels], Pixels]  # `"h w c"` to `"h w c"`

PAPER, INK = (250.0, 244.0, 230.0), (44.0, 38.0, 54.0)
NIGHT = (10.0, 6.0, 26.0)
LINE_WIDTH = 1.1  # standard deviation of the blur whose slopes are the lines, in pixels


def sketch(picture: Pixels) -> Pixels:
    """Ink lines and pale crayon on paper, which keeps a hint of the background's colour."""
    paper = _blend(_color(PAPER), _ground(picture), 0.2)
    filled = _blend(paper, _blend(_color(PAPER), picture, 0.5), _matte(picture))
    return _bytes(_blend(filled, _color(INK), 0.9 * _lines(picture)))


def neon(picture: Pixels) -> Pixels:
    """Glowing tubes in the thing's own colours, on a night that keeps a hint of the background's."""
    night = _blend(_color(NIGHT), _ground(picture), 0.2)
    lines = _lines(picture)
    glow: Floats = np.minimum(lines + 0.55 * _blur(lines, 2.5), 1, dtype=np.float32)
    dim = _blend(night, picture, 0.22 * _matte(picture))
    return _bytes(_blend(dim, _tube_color(picture), 0.95 * glow) + 60 * lines**2)


STYLES: dict[str, Restyle] = {"neon": neon, "sketch": sketch}


def _ground(picture: Pixels) -> Floats:
    """The background's colour, row by row (backgrounds may run from one colour at the top to another): `"h 1 c"`."""
    edges = np.concatenate([picture[:, :2], picture[:, -2:]], axis=1)
    return np.asarray(np.median(edges, axis=1, keepdims=True), dtype=np.float32)


def _matte(picture: Pixels) -> Floats:
    """How far each pixel stands out from the background, 0 to 1: `"h w 1"`."""
    distance = np.abs(picture - _ground(picture)).max(axis=2, keepdims=True)
    return np.asarray(np.clip((distance - 6) / 50, 0, 1), dtype=np.float32)


def _lines(picture: Pixels) -> Floats:
    """Outlines, and the edges inside of things, 0 to 1: `"h w 1"`."""
    matte = _matte(picture)
    slopes = np.maximum(_slope(255 * matte), _slope(picture * matte))
    return np.asarray(np.clip((slopes - 16) / 80, 0, 1), dtype=np.float32)


def _slope(values: Floats) -> Floats:
    """The steepest channel's slope: `"h w 1"`."""
    smooth = np.pad(_blur(values, LINE_WIDTH), ((1, 1), (1, 1), (0, 0)), mode="edge")
    along_x, along_y = smooth[1:-1, 2:] - smooth[1:-1, :-2], smooth[2:, 1:-1] - smooth[:-2, 1:-1]
    return np.asarray(np.hypot(along_x, along_y).max(axis=2, keepdims=True))


def _tube_color(picture: Pixels) -> Floats:
    """The things' colours, spread beyond their edges and made bright; dark things glow white."""
    matte = _matte(picture)
    colors = _blur(picture * matte, 1.2) / (_blur(matte, 1.2) + 0.02)
    gray = 0.75 * colors.min(axis=2, keepdims=True)
    return np.asarray(255 * (colors - gray + 16) / (colors.max(axis=2, keepdims=True) - gray + 16))


def _blur(values: Floats, deviation: float) -> Floats:
    """Gaussian blur of `"h w c"`."""
    reach = round(3 * deviation)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1, dtype=np.float32) / deviation) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[axis] = (reach, reach)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, padding, mode="edge"), len(weights), axis)
        values = windows @ weights
    return values


def _blend(one: Floats, other: Floats | Pixels, share: float | Floats) -> Floats:
    return np.asarray(one + share * (other - one), dtype=np.float32)


def _color(rgb: tuple[float, float, float]) -> Floats:
    return np.asarray(rgb, dtype=np.float32)


def _bytes(values: Floats) -> Pixels:
    return np.clip(values.round(), 0, 255).astype(np.uint8)
