"""What a live connection has told and nobody has taken yet."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from fewstep_client.events import FinalFrame, Frame, LiveEvent, PreviewFrame

if TYPE_CHECKING:
    from fewstep_client.connection import Connection

MAX_WAITING = 1000
Item = tuple[LiveEvent, "Connection | None"]


class Inbox:
    """Events in order; of the pictures only those that no newer one has made stale.

    Nobody who takes no events for long fills the memory: the oldest of more than MAX_WAITING go.
    """

    def __init__(self) -> None:
        self._waiting: deque[Item] = deque(maxlen=MAX_WAITING)
        self._changed = asyncio.Event()
        self._is_closed = False

    def put(self, event: LiveEvent, connection: Connection | None = None) -> None:
        if isinstance(event, Frame):
            fresh = [item for item in self._waiting if not is_stale(item[0], event)]
            self._waiting = deque(fresh, MAX_WAITING)
        self._waiting.append((event, connection))
        self._changed.set()

    def close(self) -> None:
        """What waits can still be taken."""
        self._is_closed = True
        self._changed.set()

    async def take(self) -> Item | None:
        """The next event and where it came from; None when nothing more will come."""
        while not self._waiting:
            if self._is_closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.popleft()


def is_stale(old: LiveEvent, new: Frame) -> bool:
    """Whether a picture that waits needn't be shown any more: a final makes all older ones stale, a preview only
    previews, and a refined final its first version."""
    if not isinstance(old, Frame):
        return False
    is_preview, is_final = isinstance(old, PreviewFrame), isinstance(new, FinalFrame)
    if old.seq != new.seq:
        return old.seq < new.seq and (is_preview or is_final)
    return old.index == new.index and (is_preview or (is_final and new.refined and not old.refined))
