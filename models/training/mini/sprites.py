"""Sprites: the drawings of each thing of the vocabulary as square RGBA pictures, cached in memory."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models.training.mini.vocabulary import Thing, Vocabulary

FONT_FILE = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size that the font's bitmaps come in
SPRITE_SIZE = 128
OVERSAMPLING = 4

Point = tuple[float, float]


def draw_sprites(vocabulary: Vocabulary, font_file: Path = FONT_FILE) -> list[list[Image.Image]]:
    """The drawings of each thing, in the vocabulary's order. The font is opened only if the vocabulary has emoji."""
    font = ImageFont.truetype(str(font_file), FONT_SIZE) if vocabulary.emoji else None
    return [_draw(thing, vocabulary, font) for thing in vocabulary.things]


def _draw(thing: Thing, vocabulary: Vocabulary, font: ImageFont.FreeTypeFont | None) -> list[Image.Image]:
    if thing.shape is not None and thing.color is not None:
        return [draw_shape(thing.shape, vocabulary.colors[thing.color].rgb)]
    if not thing.glyphs or font is None:
        raise ValueError(f"{thing.name} is neither a shape nor an emoji")
    return [draw_emoji(glyph, font) for glyph in thing.glyphs]


def tint(sprite: Image.Image, rgb: tuple[int, int, int]) -> Image.Image:
    """The sprite in shades of one colour: its middle brightness becomes the colour, darker parts go to black, brighter
    ones to white.
    """
    gray = np.asarray(sprite.convert("L"), dtype=np.float32) / 255
    alpha = np.asarray(sprite.getchannel("A"))
    middle = float(np.clip(np.median(gray[alpha > 128]), 0.2, 0.8))
    dark = np.clip(gray / middle, 0, 1)[..., None]
    light = 0.8 * np.clip((gray - middle) / (1 - middle), 0, 1)[..., None]
    shades = dark * (np.asarray(rgb, dtype=np.float32) * (1 - light) + 255 * light)
    tinted = Image.fromarray(shades.round().astype(np.uint8))
    tinted.putalpha(sprite.getchannel("A"))
    return tinted


def draw_emoji(glyph: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The glyph, cropped to what is visible and centred on a square."""
    page = Image.new("RGBA", (2 * SPRITE_SIZE, 2 * SPRITE_SIZE))
    ImageDraw.Draw(page).text((32, 32), glyph, font=font, embedded_color=True)
    glyph_image = page.crop(page.getchannel("A").getbbox())
    side = max(glyph_image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(glyph_image, ((side - glyph_image.width) // 2, (side - glyph_image.height) // 2))
    return square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)


def draw_shape(shape: str, rgb: tuple[int, int, int]) -> Image.Image:
    """A filled shape with smooth edges."""
    side = SPRITE_SIZE * OVERSAMPLING
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
    if shape == "ring":
        pen.ellipse((0.24 * side, 0.24 * side, 0.76 * side, 0.76 * side), fill=0)
    if shape in OUTLINES:
        pen.polygon([(x * (side - 1), y * (side - 1)) for x, y in OUTLINES[shape]], fill=255)
    sprite = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE), rgb)
    sprite.putalpha(mask.reduce(OVERSAMPLING))
    return sprite


def _around(*radii: float, corners: int) -> list[Point]:
    """Corners on circles about the centre, the first one on top; the radii take turns."""
    angles = [2 * math.pi * corner / corners for corner in range(corners)]
    spokes = [radii[corner % len(radii)] for corner in range(corners)]
    return [(0.5 + r * math.sin(angle), 0.5 - r * math.cos(angle)) for r, angle in zip(spokes, angles, strict=True)]


def _heart() -> list[Point]:
    turns = [2 * math.pi * step / 90 for step in range(90)]
    return [(0.5 + 0.5 * math.sin(t) ** 3, 0.44 - _heart_height(t) / 34) for t in turns]


def _heart_height(t: float) -> float:
    return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)


OUTLINES: dict[str, list[Point]] = {
    "square": [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
    "triangle": [(0.5, 0.06), (1.0, 0.94), (0.0, 0.94)],
    "diamond": [(0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)],
    "hexagon": _around(0.5, corners=6),
    "star": _around(0.52, 0.21, corners=10),
    "heart": _heart(),
    "plus": [
        (0.34, 0.0), (0.66, 0.0), (0.66, 0.34), (1.0, 0.34), (1.0, 0.66), (0.66, 0.66),
        (0.66, 1.0), (0.34, 1.0), (0.34, 0.66), (0.0, 0.66), (0.0, 0.34), (0.34, 0.34),
    ],
}  # fmt: skip
