"""Whether a picture shows what its prompt asks for: prompts held out of training, and a judge that has learnt nothing.

The judge compares with the drawings themselves (`recognizer.py`), so it shares no feature with the networks it judges.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from typing import Literal

import numpy as np
from PIL import Image

from models.training.mini.captions import plain_caption
from models.training.mini.dataset import Layout, Pixels, Scene, is_held_out
from models.training.mini.recognizer import MIN_CONTRAST, ColorNamer, Recognizer
from models.training.mini.reference import Reference
from models.training.mini.sprites import tint
from models.training.mini.vocabulary import Vocabulary

Kind = Literal["object", "shape", "tinted", "pair"]
MIN_STANDING_OUT = 0.85
NEAR = 5
FIRST_SEED = 1000  # of the pictures
CASE_SEED = 11

Drawings = Sequence[Sequence[Image.Image]]


@dataclass(frozen=True)
class Case:
    """One prompt, what it asks for, and its seed."""

    prompt: str
    scene: Scene
    seed: int
    kind: Kind


@dataclass(frozen=True)
class Verdict:
    """What is right in one picture. `near`: a single thing is among the five nearest; of two things as `things`."""

    things: bool
    near: bool
    background: bool


class CaseMaker:
    """Draws prompts whose combination no training picture showed; with the same `seed`, always the same ones.

    Backgrounds are named, and let at least 85 % of a thing's pixels stand out: what can't be seen can't be judged.
    """

    def __init__(self, vocabulary: Vocabulary, drawings: Drawings, seed: int = CASE_SEED) -> None:
        self.vocabulary = vocabulary
        self.drawings = drawings
        self.rng = random.Random(seed)

    def cases(self, per_kind: int) -> list[Case]:
        """At most `per_kind` of each kind: objects, shapes, recoloured objects, and two things in a row or a column."""
        kinds: dict[Kind, Iterator[Scene]] = {
            "object": self._singles(self.vocabulary.emoji),
            "shape": self._singles(self.vocabulary.shapes),
            "tinted": self._tinted(),
            "pair": self._pairs(),
        }
        picks = [(kind, scene) for kind, scenes in kinds.items() for scene in islice(scenes, per_kind)]
        return [
            Case(plain_caption(scene, self.vocabulary), scene, FIRST_SEED + number, kind)
            for number, (kind, scene) in enumerate(picks)
        ]

    def _singles(self, things: Sequence[int]) -> Iterator[Scene]:
        for thing in self.rng.sample(things, len(things)):
            scenes = [Scene((thing,), background=color) for color in self.grounds((thing,))]
            yield from self._pick([scene for scene in scenes if is_held_out(scene, self.vocabulary)])

    def _tinted(self) -> Iterator[Scene]:
        for thing in self.rng.sample(self.vocabulary.emoji, len(self.vocabulary.emoji)):
            if not self.vocabulary.can_tint(thing):
                continue
            scenes = [
                Scene((thing,), background=color, tints=(shade,))
                for shade in self.vocabulary.tints
                if is_held_out(Scene((thing,), tints=(shade,)), self.vocabulary)
                for color in self.grounds((thing,), (shade,))
            ]
            yield from self._pick(scenes)

    def _pairs(self) -> Iterator[Scene]:
        things = [*self.vocabulary.emoji, *self.vocabulary.shapes]
        number = 0
        while len(things) > 1:
            layout: Layout = "row" if number % 2 else "column"
            pair = (self.rng.choice(things), self.rng.choice(things))
            if is_held_out(Scene(pair, layout), self.vocabulary) and (grounds := self.grounds(pair)):
                yield Scene(pair, layout, background=self.rng.choice(grounds))
                number += 1

    def _pick(self, scenes: Sequence[Scene]) -> list[Scene]:
        return [self.rng.choice(scenes)] if scenes else []

    def grounds(self, things: Sequence[int], tints: Sequence[int] = ()) -> list[int]:
        """The backgrounds from which every drawing of every thing stands out."""
        sprites = [sprite for thing in things for sprite in self.drawings[thing]]
        if tints:
            sprites = [tint(sprite, self.vocabulary.colors[shade].rgb) for shade in tints for sprite in sprites]
        colors = enumerate(self.vocabulary.colors)
        return [index for index, color in colors if all(_stands_out(sprite, color.rgb) for sprite in sprites)]


def _stands_out(sprite: Image.Image, rgb: tuple[int, int, int]) -> bool:
    pixels = np.asarray(sprite.resize((32, 32)), dtype=np.float32)
    visible = pixels[pixels[..., 3] > 128][:, :3]
    return float((np.abs(visible - np.asarray(rgb)).max(axis=1) > MIN_CONTRAST).mean()) >= MIN_STANDING_OUT


class Judge:
    """Says what is right in a picture."""

    def __init__(self, vocabulary: Vocabulary, drawings: Drawings) -> None:
        self.vocabulary = vocabulary
        self.drawings = drawings
        self.namer = ColorNamer([color.rgb for color in vocabulary.colors])
        self.in_color = cache(self._in_color)
        self.shades_of = cache(self._shades_of)

    def judge(self, case: Case, picture: Pixels) -> Verdict:
        """The picture is `"h w c"`. A recoloured thing must be the right one of all in that colour, in the right colour
        of all that it may have; of two things, both must be right, each in its place.
        """
        scene = case.scene
        background = self.namer.name(picture) == scene.background
        if case.kind == "pair":
            right = self._plain.pair(picture, vertical=scene.layout == "column") == scene.things
            return Verdict(right, right, background)
        (thing,) = scene.things
        shade = scene.tint(0)
        nearest = (self._plain if shade is None else self.in_color(shade)).nearest(picture, NEAR)
        in_color = shade is None or self.shades_of(thing).nearest(picture, 1) == [self.vocabulary.tints.index(shade)]
        return Verdict(nearest[:1] == [thing] and in_color, thing in nearest and in_color, background)

    @cached_property
    def _plain(self) -> Recognizer:
        return Recognizer(self.drawings)

    def _in_color(self, shade: int) -> Recognizer:
        """Tells apart the emoji in one colour; shapes, which have their own, stay as they are."""
        rgb, emoji = self.vocabulary.colors[shade].rgb, set(self.vocabulary.emoji)
        things = enumerate(self.drawings)
        return Recognizer([[tint(one, rgb) for one in kinds] if thing in emoji else kinds for thing, kinds in things])

    def _shades_of(self, thing: int) -> Recognizer:
        """Tells apart the colours of one thing, by their place among `Vocabulary.tints`; its own comes last."""
        colors = [self.vocabulary.colors[shade].rgb for shade in self.vocabulary.tints]
        return Recognizer([*([tint(one, rgb) for one in self.drawings[thing]] for rgb in colors), self.drawings[thing]])


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds a true share with 95 % confidence (Wilson 1927), good near 0 and 1 too."""
    share, z2 = successes / trials, z * z
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    reach = z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def check_reference(reference: Reference, vocabulary: Vocabulary) -> None:
    """Raise ValueError if shipped drawings are of another vocabulary: indices would mean other things."""
    if reference.names != [list(thing.names) for thing in vocabulary.things]:
        raise ValueError("reference.json names other things than vocabulary.toml; export the drawings again")
