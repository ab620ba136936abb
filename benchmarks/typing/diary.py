"""What one typist did and saw."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from benchmarks.shared.load import Window

SAMPLE_S = 0.02


@dataclass(frozen=True)
class Picture:
    """A picture that arrived. `type` is `preview`, `final` or `refined`."""

    arrived_s: float
    seq: int
    type: str


@dataclass(frozen=True)
class Moment:
    """A screen at one moment; both are 0 while it shows the newest words."""

    behind_ms: float = 0.0
    age_ms: float = 0.0


@dataclass
class Diary:
    """Moments are of `time.perf_counter`; the seq of a key is its place in `typed_s`. `looks` are pauses to look at the
    picture, from when to when.

    Keys count when they are typed, pictures when they arrive within the window.
    """

    typed_s: list[float] = field(default_factory=list)
    looks: list[tuple[float, float]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    superseded: set[int] = field(default_factory=set)

    def count_keys(self, window: Window) -> int:
        return sum(moment_s in window for moment_s in self.typed_s)

    def count_superseded(self, window: Window) -> int:
        return sum(self.typed_s[seq] in window for seq in self.superseded)

    def count_pictures(self, window: Window, *types: str) -> int:
        return sum(picture.type in types and picture.arrived_s in window for picture in self.pictures)

    def typing_s(self, window: Window) -> float:
        """How long the typist typed instead of looking."""
        looks = (min(end, window.end_s) - max(start, window.start_s) for start, end in self.looks)
        return window.seconds - sum(max(0.0, look_s) for look_s in looks)

    def waits_ms(self, window: Window, *types: str) -> list[float]:
        """From each key that got such a picture to the first one."""
        pictures = (picture for picture in reversed(self.pictures) if picture.type in types)
        arrived_s = {picture.seq: picture.arrived_s for picture in pictures}
        return [(arrived_s[seq] - self.typed_s[seq]) * 1000 for seq in arrived_s if self.typed_s[seq] in window]

    def watch_screen(self, window: Window) -> Iterator[Moment]:
        """Every SAMPLE_S, once it shows something: the newest words of which a picture has arrived."""
        arrived_s = [picture.arrived_s for picture in self.pictures]
        shown_seqs = list(accumulate((picture.seq for picture in self.pictures), max))
        for number in range(int(window.seconds / SAMPLE_S)):
            now_s = window.start_s + number * SAMPLE_S
            if num_arrived := bisect_right(arrived_s, now_s):
                yield self._compare(shown_seqs[num_arrived - 1], now_s)

    def _compare(self, shown: int, now_s: float) -> Moment:
        """The words that are shown with the newest."""
        newest = bisect_right(self.typed_s, now_s) - 1
        if newest <= shown:
            return Moment()
        return Moment((now_s - self.typed_s[shown + 1]) * 1000, (now_s - self.typed_s[shown]) * 1000)
