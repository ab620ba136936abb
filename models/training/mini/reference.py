"""Reference data that ships with the weights: small sprites and colours, enough to judge pictures without the font."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from models.training.mini.vocabulary import Vocabulary

SHEET = "sprites.webp"
INDEX = "reference.json"
SIDE = 32
COLUMNS = 24


@dataclass(frozen=True)
class Reference:
    """Names (with synonyms) and sprites of all things, in one order; names and RGB of the colours."""

    names: list[list[str]]
    sprites: list[Image.Image]
    colors: dict[str, tuple[int, int, int]]


def save_reference(folder: Path, vocabulary: Vocabulary, sprites: Sequence[Image.Image]) -> None:
    """Write the sprite sheet and its index."""
    folder.mkdir(parents=True, exist_ok=True)
    sheet = Image.new("RGBA", (COLUMNS * SIDE, -(-len(sprites) // COLUMNS) * SIDE))
    for index, sprite in enumerate(sprites):
        sheet.paste(sprite.resize((SIDE, SIDE), Image.Resampling.LANCZOS), _corner(index))
    sheet.save(folder / SHEET, lossless=True, quality=100, method=6)
    index_data = {
        "sheet": SHEET,
        "side": SIDE,
        "columns": COLUMNS,
        "things": [list(thing.names) for thing in vocabulary.things],
        "colors": {color.name: color.rgb for color in vocabulary.colors},
    }
    (folder / INDEX).write_text(json.dumps(index_data, indent=0) + "\n", encoding="utf-8")


def load_reference(folder: Path) -> Reference:
    """Read what `save_reference` wrote."""
    data = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    with Image.open(folder / data["sheet"]) as image:
        sheet = image.convert("RGBA")
    corners = [_corner(index) for index in range(len(data["things"]))]
    sprites = [sheet.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]
    colors = {name: (red, green, blue) for name, (red, green, blue) in data["colors"].items()}
    return Reference(data["things"], sprites, colors)


def _corner(index: int) -> tuple[int, int]:
    return index % COLUMNS * SIDE, index // COLUMNS * SIDE
