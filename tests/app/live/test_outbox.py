from __future__ import annotations

import pytest

from app.live.outbox import Outbox
from app.live.protocol import Frame, FrameType
from broker.messages import Picture


def frame(type: FrameType, seq: int, *, step: int = 4, index: int = 0, is_refined: bool = False) -> Frame:
    return Frame(type, seq, f"r{seq}", Picture(index, 0, "jpeg", 8, 8, b"x"), step, 4, is_refined)


def take_all(outbox: Outbox) -> list[tuple[FrameType, int, int]]:
    """Takes as a client does that acknowledges at once."""
    taken = []
    while item := outbox.take_frame(0.0):
        number, frame = item
        outbox.acknowledge(number)
        taken.append((frame.type, frame.seq, frame.step))
    return taken


def test_only_the_newest_preview_waits() -> None:
    outbox = Outbox(2)
    assert outbox.put_frame(frame("preview", 1, step=1)) == []
    assert outbox.put_frame(frame("preview", 1, step=2)) == [frame("preview", 1, step=1)]
    assert take_all(outbox) == [("preview", 1, 2)]


def test_a_final_overtakes_its_previews_and_all_that_is_older() -> None:
    outbox = Outbox(2)
    outbox.put_frame(frame("final", 1))
    outbox.put_frame(frame("preview", 2, step=1))
    assert len(outbox.put_frame(frame("final", 2))) == 2
    assert take_all(outbox) == [("final", 2, 4)]


def test_a_newer_preview_leaves_the_older_final() -> None:
    outbox = Outbox(2)
    outbox.put_frame(frame("final", 1))
    outbox.put_frame(frame("preview", 2, step=1))
    assert take_all(outbox) == [("final", 1, 4), ("preview", 2, 1)]


def test_what_comes_late_is_dropped() -> None:
    outbox = Outbox(2)
    outbox.put_frame(frame("final", 2))
    for late in (frame("preview", 2, step=3), frame("preview", 1, step=3), frame("final", 1)):
        assert outbox.put_frame(late) == [late]
    assert take_all(outbox) == [("final", 2, 4)]
    for late in (frame("preview", 2, step=3), frame("preview", 1, step=3), frame("final", 1)):
        assert outbox.put_frame(late) == [late]


def test_the_refined_final_replaces_the_quick_one() -> None:
    outbox = Outbox(2)
    outbox.put_frame(frame("final", 1))
    assert outbox.put_frame(frame("final", 1, is_refined=True)) == [frame("final", 1)]
    assert outbox.put_frame(frame("final", 1)) == [frame("final", 1)]
    assert len(take_all(outbox)) == 1


def test_a_grid_keeps_every_picture() -> None:
    outbox = Outbox(2)
    for index in range(4):
        outbox.put_frame(frame("preview", 1, step=1, index=index))
    for index in range(4):
        outbox.put_frame(frame("final", 1, index=index))
    assert take_all(outbox) == [("final", 1, 4)] * 4


def test_at_most_two_unacknowledged() -> None:
    outbox = Outbox(2)
    for index in range(3):
        outbox.put_frame(frame("final", 1, index=index))
    assert outbox.take_frame(1.0) is not None
    assert outbox.take_frame(2.0) is not None
    assert outbox.take_frame(3.0) is None
    assert outbox.acknowledge(2) == [1.0, 2.0]
    assert outbox.acknowledge(2) == []
    taken = outbox.take_frame(3.0)
    assert taken is not None
    assert taken[0] == 3


def test_the_newest_final_survives_a_reader_that_stops() -> None:
    outbox = Outbox(2)
    for seq in range(1, 50):
        outbox.put_frame(frame("preview", seq, step=1))
        outbox.put_frame(frame("final", seq))
        if seq < 3:
            outbox.take_frame(0.0)
    outbox.acknowledge(2)
    assert take_all(outbox) == [("final", 49, 4)]


def test_an_ack_for_what_was_never_sent() -> None:
    with pytest.raises(ValueError, match="the last frame sent is 0"):
        Outbox(2).acknowledge(1)


def test_messages_keep_their_order() -> None:
    outbox = Outbox(2)
    outbox.put_message("a")
    outbox.put_message("b")
    assert [outbox.take_message() for _ in range(3)] == ["a", "b", None]
