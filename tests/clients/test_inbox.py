"""Which pictures wait for a slow reader, without a socket."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fewstep_client import Cancelled, FinalFrame, LiveEvent, PreviewFrame, Timings
from fewstep_client.inbox import MAX_WAITING, Inbox

COMMON: dict[str, Any] = {
    "request_id": "r",
    "num_inference_steps": 4,
    "seed": 1,
    "format": "jpeg",
    "width": 64,
    "height": 64,
    "data": b"",
}
TIMINGS = Timings(1, 1, 1, 1, 1, 1, 6)


def preview(seq: int, frame: int, index: int = 0) -> PreviewFrame:
    return PreviewFrame(seq=seq, frame=frame, index=index, step=1, refined=False, **COMMON)


def final(seq: int, frame: int, index: int = 0, *, refined: bool = False) -> FinalFrame:
    return FinalFrame(seq=seq, frame=frame, index=index, step=4, refined=refined, timings=TIMINGS, **COMMON)


def word(seq: int) -> Cancelled:
    return Cancelled(seq, "r", False)


async def taken(*events: LiveEvent) -> list[LiveEvent]:
    """What a reader gets who takes nothing until all of them are there."""
    inbox = Inbox()
    for event in events:
        inbox.put(event)
    inbox.close()
    items: list[LiveEvent] = []
    while item := await inbox.take():
        items.append(item[0])
    return items


@pytest.mark.parametrize(
    ("events", "left"),
    [
        ([preview(1, 1), preview(1, 2)], [1]),
        ([preview(1, 1), final(1, 2)], [1]),
        ([final(1, 1), preview(2, 2)], [0, 1]),
        ([final(1, 1), final(2, 2)], [1]),
        ([final(1, 1), final(1, 2, refined=True)], [1]),
        ([preview(1, 1), preview(1, 2, index=1)], [0, 1]),
        ([final(1, 1), final(1, 2, index=1)], [0, 1]),
        ([final(1, 1), final(1, 2, index=1), final(2, 3)], [2]),
        ([final(1, 1), word(1), final(2, 2)], [1, 2]),
    ],
)
async def test_what_a_newer_picture_makes_stale(events: list[LiveEvent], left: list[int]) -> None:
    assert await taken(*events) == [events[index] for index in left]


async def test_a_reader_that_never_reads_costs_no_more_than_so_much() -> None:
    words = [word(seq) for seq in range(MAX_WAITING + 10)]
    assert await taken(*words) == words[10:]


async def test_a_reader_waits_and_is_woken() -> None:
    inbox = Inbox()
    taking = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    inbox.put(word(1))
    assert await taking == (word(1), None)
    taking = asyncio.create_task(inbox.take())
    await asyncio.sleep(0)
    inbox.close()
    assert await taking is None
