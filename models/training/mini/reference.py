"""Reference data that ships with the weights: small sprites and colours, enough to judge pictures without the font."""

from __future__ import annotations

import itertools
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
    """Names (with synonyms) and drawings of all things, in one order; names and RGB of the colours."""

    names: list[list[str]]
    drawings: list[list[Image.Image]]
    colors: dict[str, tuple[int, int, int]]


def save_reference(folder: Path, vocabulary: Vocabulary, drawings: Sequence[Sequence[Image.Image]]) -> None:
    """Write the sprite sheet and its index."""
    folder.mkdir(parents=True, exist_ok=True)
    sprites = [sprite for kinds in drawings for sprite in kinds]
    sheet = Image.new("RGBA", (COLUMNS * SIDE, -(-len(sprites) // COLUMNS) * SIDE))
    for index, sprite in enumerate(sprites):
        sheet.paste(sprite.resize((SIDE, SIDE), Image.Resampling.LANCZOS), _corner(index))
    sheet.save(folder / SHEET, lossless=True, quality=100, method=6)
    index_data = {
        "sheet": SHEET,
        "side": SIDE,
        "columns": COLUMNS,
        "things": [list(thing.names) for thing in vocabulary.things],
        "drawings": [len(kinds) for kinds in drawings],
        "colors": {color.name: color.rgb for color in vocabulary.colors},
    }
    (folder / INDEX).write_text(json.dumps(index_data, indent=0) + "\n", encoding="utf-8")


def load_reference(folder: Path) -> Reference:
    """Read what `save_reference` wrote."""
    data = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    with Image.open(folder / data["sheet"]) as image:
        sheet = image.convert("RGBA")
    corners = (_corner(index) for index in itertools.count())
    drawings = [[_cut(sheet, next(corners)) for _ in range(number)] for number in data["drawings"]]
    colors = {name: (red, green, blue) for name, (red, green, blue) in data["colors"].items()}
    return Reference(data["things"], drawings, colors)


def _cut(sheet: Image.Image, corner: tuple[int, int]) -> Image.Image:
    x, y = corner
    return sheet.crop((x, y, x + SIDE, y + SIDE))


def _corner(index: int) -> tuple[int, int]:
    return index % COLUMNS * SIDE, index // COLUMNS * SIDE
