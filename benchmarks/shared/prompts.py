"""Prompts for a load: every one different, as from people who type, so that no cache of texts helps."""

from __future__ import annotations

import random
from collections.abc import Iterator

THINGS = (
    "apple", "banana", "carrot", "pizza", "cookie", "fox", "panda", "penguin", "owl", "snail", "turtle", "dolphin",
    "tree", "sunflower", "mushroom", "umbrella", "guitar", "trumpet", "rocket", "bus", "tractor", "balloon", "crown",
    "key", "bell", "cup of coffee", "snowman", "cactus",
)  # fmt: skip
COLORS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "brown", "gray", "black", "white")
SIZES = ("", "small ", "large ")


def endless_prompts(seed: int) -> Iterator[str]:
    """Prompts in an order that `seed` decides. They repeat after almost 25,000."""
    combinations = [
        f"{with_article(size + thing)} next to {with_article(other)} on {with_article(color)} background"
        for size in SIZES
        for thing in THINGS
        for other in THINGS
        if other != thing
        for color in COLORS
    ]
    random.Random(seed).shuffle(combinations)
    while True:
        yield from combinations


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeio' or noun.startswith('umb') else 'a'} {noun}"
