"""Captions: the many ways to ask for one scene."""

from __future__ import annotations

import random

from models.training.mini.dataset import Scene
from models.training.mini.vocabulary import Vocabulary

SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("big", "large", "huge")}
MEDIA = ("picture", "drawing", "image", "icon")

ROW = (
    "{a} next to {b}", "{a} and {b}", "{a} beside {b}", "{a} to the left of {b}", "{a} left of {b}",
    "{b} to the right of {a}", "{b} right of {a}",
)  # fmt: skip
COLUMN = ("{a} above {b}", "{b} below {a}", "{a} over {b}", "{b} under {a}", "{b} beneath {a}", "{a} on top of {b}")

ROW_OF_THREE = ("{a}, {b} and {c}", "{a} next to {b} and {c}", "{a}, {b}, {c} in a row", "{b} between {a} and {c}")
COLUMN_OF_THREE = ("{a} above {b} above {c}", "{c} below {b} below {a}", "{a} over {b} over {c}")

ON_BACKGROUND = (
    "{content} on {a_color} background", "{content} on {a_color} background", "{content} on {a_color} background",
    "{content}, {color} background", "{content} on {color}", "{content} with {a_color} background",
    "{content} in front of {a_color} background", "{color} background, {content}", "{content} against {color}",
)  # fmt: skip


class Captioner:
    """Writes a random caption for a scene; two calls may give two wordings."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def caption(self, scene: Scene, rng: random.Random) -> str:
        """A caption, in lower case."""
        content = self._content(scene, rng)
        if rng.random() < 0.12:
            content = f"{_with_article(rng.choice(MEDIA))} of {content}"
        if scene.background is None:
            return content
        color = rng.choice(self.vocabulary.colors[scene.background].names)
        return rng.choice(ON_BACKGROUND).format(content=content, color=color, a_color=_with_article(color))

    def _content(self, scene: Scene, rng: random.Random) -> str:
        articles = rng.random() < 0.7
        nouns = [self._noun(scene, place, articles, rng) for place in range(len(scene.things))]
        if len(nouns) == 1:
            return nouns[0]
        rows, columns = (ROW, COLUMN) if len(nouns) == 2 else (ROW_OF_THREE, COLUMN_OF_THREE)
        wording = rng.choice(rows if scene.layout == "row" else columns)
        return wording.format(**dict(zip("abc", nouns, strict=False)))

    def _noun(self, scene: Scene, place: int, article: bool, rng: random.Random) -> str:
        names, tint = self.vocabulary.things[scene.things[place]].names, scene.tint(place)
        noun = names[0] if rng.random() < 0.5 else rng.choice(names)
        if tint is not None:
            noun = f"{rng.choice(self.vocabulary.colors[tint].names)} {noun}"
        if scene.size in SIZE_WORDS:
            noun = f"{rng.choice(SIZE_WORDS[scene.size])} {noun}"
        return _with_article(noun) if article else noun


def plain_caption(scene: Scene, vocabulary: Vocabulary) -> str:
    """The plainest wording: canonical names, the colours that are asked for, and the background if it is named."""
    nouns = [_with_article(_plain_noun(scene, place, vocabulary)) for place in range(len(scene.things))]
    content = (" next to " if scene.layout == "row" else " above ").join(nouns)
    if scene.background is None:
        return content
    color = vocabulary.colors[scene.background].name
    return f"{content} on {_with_article(color)} background"


def _plain_noun(scene: Scene, place: int, vocabulary: Vocabulary) -> str:
    name, tint = vocabulary.things[scene.things[place]].name, scene.tint(place)
    return name if tint is None else f"{vocabulary.colors[tint].name} {name}"


def _with_article(noun: str) -> str:
    return noun if _is_plural(noun) else f"{_article(noun)} {noun}"


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeio" or noun.startswith(("umb", "unb")) else "a"


def _is_plural(noun: str) -> bool:
    return noun.endswith(("grapes", "cherries", "fries", "scissors", "socks", "prints", "paws", "eyes"))
