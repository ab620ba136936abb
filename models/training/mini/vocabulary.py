"""The vocabulary: every object the miniature model can draw, and every colour it knows by name."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

VOCABULARY_FILE = Path(__file__).with_name("vocabulary.toml")


@dataclass(frozen=True)
class Color:
    """A named colour."""

    names: tuple[str, ...]
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Thing:
    """An object that can be drawn: an emoji in one or several drawings (`glyphs`), or a shape in a named colour."""

    names: tuple[str, ...]
    glyphs: tuple[str, ...] = ()
    shape: str | None = None
    color: int | None = None

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Vocabulary:
    """Colours and things, in a fixed order: scenes refer to both by index."""

    colors: tuple[Color, ...]
    things: tuple[Thing, ...]

    @cached_property
    def emoji(self) -> tuple[int, ...]:
        return tuple(index for index, thing in enumerate(self.things) if thing.glyphs)

    @cached_property
    def shapes(self) -> tuple[int, ...]:
        return tuple(index for index, thing in enumerate(self.things) if thing.shape)

    @cached_property
    def tints(self) -> tuple[int, ...]:
        """The colours that an emoji can be asked for in: those with a hue."""
        return tuple(index for index, color in enumerate(self.colors) if max(color.rgb) - min(color.rgb) > 40)

    def can_tint(self, thing: int) -> bool:
        """Whether "a blue one" makes sense: not of a shape, which has its colour, nor where a name says a colour."""
        words = {word for name in self.things[thing].names for word in name.split()}
        return not self.things[thing].shape and words.isdisjoint(self._color_words)

    @cached_property
    def _color_words(self) -> frozenset[str]:
        return frozenset(name for color in self.colors for name in color.names)

    def without_emoji(self) -> Vocabulary:
        """The part that needs no font: drawn shapes only."""
        return Vocabulary(self.colors, tuple(self.things[index] for index in self.shapes))

    def find(self, name: str) -> int:
        """Index of the thing that goes by `name`."""
        return next(index for index, thing in enumerate(self.things) if name in thing.names)


def load_vocabulary(path: Path = VOCABULARY_FILE) -> Vocabulary:
    """Read the vocabulary file; emoji come first, then every shape in every colour."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    colors = _colors(table)
    emoji = tuple(Thing(tuple(names), glyphs=tuple(glyphs.split())) for glyphs, names in table["emoji"].items())
    return Vocabulary(colors, emoji + _shapes(table["shapes"], colors))


def _colors(table: Mapping[str, Any]) -> tuple[Color, ...]:
    synonyms = table.get("color_synonyms", {})
    return tuple(Color((name, *synonyms.get(name, ())), tuple(rgb)) for name, rgb in table["colors"].items())


def _shapes(shapes: Mapping[str, list[str]], colors: tuple[Color, ...]) -> tuple[Thing, ...]:
    return tuple(
        Thing(tuple(f"{tint} {noun}" for noun in nouns for tint in color.names), shape=shape, color=index)
        for shape, nouns in shapes.items()
        for index, color in enumerate(colors)
    )
