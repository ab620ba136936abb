"""Turns beside requests: what is long must not hold requests up."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from models.loading import load_pipeline
from tests.jobs import make_delivery
from tests.small_models import small_spec
from workers.engine import Engine, EngineOutput, Finished
from workers.engine.runner import ModelRunner
from workers.engine_thread import REST_FACTOR, EngineThread, Turns


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    import torch

    spec = small_spec(tmp_path_factory.mktemp("models"))
    return ModelRunner(load_pipeline(spec, torch.device("cpu"), torch.float32))


def start(runner: ModelRunner, turns: Iterator[None], outputs: list[EngineOutput]) -> EngineThread:
    thread = EngineThread(lambda: Engine({"small": runner}), outputs.extend, lambda _: turns)
    thread.start()
    return thread


def until(condition: threading.Event) -> None:
    assert condition.wait(60)


def test_requests_are_drawn_between_turns(runner: ModelRunner) -> None:
    """The turns are over only when the picture is there."""
    outputs: list[EngineOutput] = []
    is_over = threading.Event()

    def turns() -> Iterator[None]:
        while not any(isinstance(output, Finished) for output in outputs):
            yield
        is_over.set()

    thread = start(runner, turns(), outputs)
    thread.add(make_delivery())
    until(is_over)
    thread.stop(10)
    assert thread.ended.result(10) is None


def test_a_turn_is_never_taken_for_a_hang_but_a_step_is(runner: ModelRunner) -> None:
    outputs: list[EngineOutput] = []
    is_in_turn, may_go_on = threading.Event(), threading.Event()

    def turns() -> Iterator[None]:
        is_in_turn.set()
        may_go_on.wait(60)
        yield

    thread = start(runner, turns(), outputs)
    until(is_in_turn)
    assert not thread.is_stalled(0.0)
    may_go_on.set()
    thread.stop(10)
    assert thread.ended.result(10) is None
    assert thread.is_stalled(0.0), "its last progress was some time ago"


def test_an_error_in_a_turn_ends_the_thread(runner: ModelRunner) -> None:
    def turns() -> Iterator[None]:
        yield
        raise RuntimeError("the device is lost")

    thread = start(runner, turns(), [])
    with pytest.raises(RuntimeError, match="the device is lost"):
        thread.ended.result(60)


def test_a_busy_device_rests_from_turns() -> None:
    """After a turn requests have the device for as long as the turn took, and longer."""
    taken: list[float] = []

    def pieces() -> Iterator[None]:
        for _ in range(3):
            time.sleep(0.05)
            taken.append(time.monotonic())
            yield

    turns = Turns(pieces())
    while not turns.are_over:
        turns.take(is_busy=True)
    gaps = [later - earlier for earlier, later in itertools.pairwise(taken)]
    assert min(gaps) >= 0.05 * (1 + REST_FACTOR)


def test_an_idle_device_takes_turn_after_turn() -> None:
    turns = Turns(iter([None] * 3))
    for _ in range(3):
        turns.take(is_busy=False)
        assert not turns.are_over
    turns.take(is_busy=False)
    assert turns.are_over
