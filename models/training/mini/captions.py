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
        nouns = [self._noun(thing, scene.size, articles, rng) for thing in scene.things]
        if len(nouns) == 1:
            return nouns[0]
        return rng.choice(ROW if scene.layout == "row" else COLUMN).format(a=nouns[0], b=nouns[1])

    def _noun(self, thing: int, size: str, article: bool, rng: random.Random) -> str:
        names = self.vocabulary.things[thing].names
        noun = names[0] if rng.random() < 0.5 else rng.choice(names)
        if size in SIZE_WORDS:
            noun = f"{rng.choice(SIZE_WORDS[size])} {noun}"
        return _with_article(noun) if article else noun


def plain_caption(scene: Scene, vocabulary: Vocabulary) -> str:
    """The plainest wording: canonical names, and the background if it is named."""
    nouns = [_with_article(vocabulary.things[thing].name) for thing in scene.things]
    content = (" next to " if scene.layout == "row" else " above ").join(nouns)
    if scene.background is None:
        return content
    color = vocabulary.colors[scene.background].name
    return f"{content} on {_with_article(color)} background"


def _with_article(noun: str) -> str:
    return noun if _is_plural(noun) else f"{_article(noun)} {noun}"


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeio" or noun.startswith(("umb", "unb")) else "a"


def _is_plural(noun: str) -> bool:
    return noun.endswith(("grapes", "cherries", "fries", "scissors", "socks", "prints", "paws", "eyes"))
