"""The classes of a class-conditional model, and how a prompt names one.

A file has one class a line, in the order of the network's class numbers, its names separated by commas. `imagenet.txt`
are the 1,000 of ImageNet-1k by their names in WordNet.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

IMAGENET = "imagenet"
IMAGENET_PATH = Path(__file__).with_name("imagenet.txt")
NUM_SUGGESTIONS = 5
ALIKE = 0.75  # of difflib's ratio: a typing error, not another word
ARTICLE = re.compile(r"^(?:an?|the) (?=.)")
BY_NUMBER = re.compile(r"(?:class )?(\d{1,9})")


class ClassFileError(ValueError):
    """A file of classes that can't be used: the message names the file and the line."""


class UnknownClassError(ValueError):
    """No class of that name. `suggestions` are names that may be meant, the best one first."""

    def __init__(self, prompt: str, suggestions: list[str]) -> None:
        super().__init__(f"no class is called {prompt[:60]!r}")
        self.suggestions = suggestions


class ClassNames:
    """`lines` are the names of each class, the usual one first. Case, spaces and an article before it don't matter.

    A name that several classes have is that of the class where it stands first among the names, then of the first such
    class; the others answer to their numbers, as all do: "class 517", or "517" where that is no name.
    """

    def __init__(self, lines: list[list[str]]) -> None:
        self._lines = lines
        self._bearers: dict[str, list[int]] = {}
        self._spelled: dict[str, str] = {}
        for _, number, name in sorted(_ranked(lines)):
            self._bearers.setdefault(_normal(name), []).append(number)
            self._spelled.setdefault(_normal(name), name)

    def __len__(self) -> int:
        return len(self._lines)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassNames) and self._lines == other._lines

    @cached_property
    def fingerprint(self) -> str:
        """Another one as soon as any name is another."""
        return hashlib.sha256(json.dumps(self._lines).encode()).hexdigest()

    def names(self, number: int) -> list[str]:
        """Of one class, the usual one first."""
        return self._lines[number]

    def examples(self, count: int) -> list[str]:
        """The usual names of some classes, from all over the list."""
        stride = max(1, len(self) // count)
        return [names[0] for names in self._lines[::stride][:count]]

    def find(self, prompt: str) -> int:
        """The number of the class that `prompt` names. Raises UnknownClassError."""
        wanted = _normal(prompt)
        if bearers := self._bearers.get(wanted):
            return bearers[0]
        by_number = BY_NUMBER.fullmatch(wanted)
        if by_number and int(by_number[1]) < len(self):
            return int(by_number[1])
        raise UnknownClassError(prompt, self._suggest(wanted))

    def namesakes(self, prompt: str) -> list[int]:
        """The other classes that have this name."""
        return self._bearers.get(_normal(prompt), [])[1:]

    def _suggest(self, wanted: str) -> list[str]:
        found: dict[int, str] = {}
        for name in self._candidates(wanted):
            found.setdefault(self._bearers[name][0], self._spelled[name])
            if len(found) == NUM_SUGGESTIONS:
                break
        return list(found.values())

    def _candidates(self, wanted: str) -> Iterator[str]:
        """Best first: names within the prompt ("photo of a goldfish"), kinds of what it names ("dog"), names that go on
        from it ("gold") or have it inside, names that look alike ("goldfsh"), kinds of any of its words."""
        words = frozenset(wanted.split())
        names = sorted(self._bearers, key=len)
        yield from (name for name in reversed(names) if words.issuperset(name.split()))
        yield from (name for name in names if name.endswith(f" {wanted}"))
        yield from (name for name in names if name.startswith(wanted))
        yield from (name for name in names if f" {wanted}" in name)
        yield from difflib.get_close_matches(wanted[: 2 * len(names[-1])], names, NUM_SUGGESTIONS, ALIKE)
        yield from (name for name in names if name.split()[-1] in words)


def load_classes(source: str) -> ClassNames:
    """`source` is "imagenet" or the path of a file. Raises ClassFileError."""
    path = IMAGENET_PATH if source == IMAGENET else Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClassFileError(f"{path}: {error}") from error
    lines = [_names(line) for line in text.splitlines()]
    if not lines:
        raise ClassFileError(f"{path}: it has no line, and each line is a class")
    if empty := [number for number, names in enumerate(lines, start=1) if not all(names)]:
        raise ClassFileError(f"{path}, line {empty[0]}: a name is missing; a line is one class, names between commas")
    return ClassNames(lines)


def _names(line: str) -> list[str]:
    return [" ".join(name.split()) for name in line.split(",")]


def _normal(name: str) -> str:
    return ARTICLE.sub("", " ".join(name.casefold().split()))


def _ranked(lines: list[list[str]]) -> Iterator[tuple[int, int, str]]:
    """(place among the names, number of the class, name) of every name."""
    return ((place, number, name) for number, names in enumerate(lines) for place, name in enumerate(names))
