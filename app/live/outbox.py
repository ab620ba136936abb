"""What waits to be sent over one live socket: messages in order, pictures as the newest only.

Plain Python without a socket, so that every rule is a test of a millisecond.
"""

from __future__ import annotations

from collections import deque

from app.live.protocol import Frame, FrameType

Slot = tuple[FrameType, int]


class Outbox:
    """A slow reader loses stale previews and finals that a newer final overtook, never the newest final.

    At most `max_unacked` numbered frames are under way: buffers of the kernel and of proxies would otherwise hide a
    slow reader. What was overtaken by a final that is already sent isn't sent any more either.
    """

    def __init__(self, max_unacked: int) -> None:
        self._max_unacked = max_unacked
        self._messages: deque[str] = deque()
        self._frames: dict[Slot, Frame] = {}
        self._shown: tuple[int, bool] = (-1, False)
        self._shown_indices: set[int] = set()
        self._sent: deque[tuple[int, float]] = deque()
        self._last_number = 0

    def put_message(self, text: str) -> None:
        self._messages.append(text)

    def put_frame(self, frame: Frame) -> list[Frame]:
        """Takes the place of what it makes stale; returns what is dropped, which may be the frame itself."""
        if self._is_stale(frame):
            return [frame]
        dropped = [waiting for waiting in self._frames.values() if _replaces(frame, waiting)]
        for waiting in dropped:
            del self._frames[_slot(waiting)]
        self._frames[_slot(frame)] = frame
        return dropped

    def take_message(self) -> str | None:
        return self._messages.popleft() if self._messages else None

    def take_frame(self, now: float) -> tuple[int, Frame] | None:
        """The next picture and its number, older prompts first; None while none may go."""
        if not self._frames or len(self._sent) >= self._max_unacked:
            return None
        frame = min(self._frames.values(), key=lambda frame: (frame.rank, frame.type, frame.picture.index))
        del self._frames[_slot(frame)]
        self._remember(frame)
        self._last_number += 1
        self._sent.append((self._last_number, now))
        return self._last_number, frame

    def acknowledge(self, number: int) -> list[float]:
        """Frames up to `number` have arrived; returns when they were sent. Raises ValueError for one never sent."""
        if number > self._last_number:
            raise ValueError(f"the last frame sent is {self._last_number}")
        sent_at = []
        while self._sent and self._sent[0][0] <= number:
            sent_at.append(self._sent.popleft()[1])
        return sent_at

    def _is_stale(self, frame: Frame) -> bool:
        if frame.rank < self._shown or any(_replaces(waiting, frame) for waiting in self._frames.values()):
            return True
        return frame.type == "preview" and frame.rank == self._shown and frame.picture.index in self._shown_indices

    def _remember(self, frame: Frame) -> None:
        if frame.type != "final":
            return
        if frame.rank > self._shown:
            self._shown, self._shown_indices = frame.rank, set()
        self._shown_indices.add(frame.picture.index)


def _slot(frame: Frame) -> Slot:
    return frame.type, frame.picture.index


def _replaces(new: Frame, old: Frame) -> bool:
    """A final makes all older frames stale and its own previews; a preview makes older previews stale."""
    if new.type == "preview" and old.type == "final":
        return False
    if new.rank != old.rank:
        return new.rank > old.rank
    if new.picture.index != old.picture.index:
        return False
    return old.type == "preview" and (new.type == "final" or new.step > old.step)
