"""The thread that owns the device: nothing else touches the engine or its models."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from broker.messages import Abort, Delivery
from workers.engine import Engine, EngineOutput

logger = logging.getLogger(__name__)

MAX_TURN_S = 3600.0  # files of a large model may come over a slow line
REST_FACTOR = 3  # beside requests, what else there is to do takes at most a fourth of the device's time
Command = Callable[[Engine], None]


class Turns:
    """Work beside requests, one piece a turn: each `next` of `pieces` is one."""

    def __init__(self, pieces: Iterator[None]) -> None:
        self._pieces = pieces
        self._rests_until_s = 0.0
        self.are_over = False

    def take(self, *, is_busy: bool) -> None:
        """The next piece. A device that `is_busy` with requests rests from turns for a while after each."""
        started_s = time.monotonic()
        if self.are_over or (is_busy and started_s < self._rests_until_s):
            return
        self.are_over = next(self._pieces, self) is self
        took_s = time.monotonic() - started_s
        self._rests_until_s = started_s + took_s + REST_FACTOR * took_s


class EngineThread:
    """Builds an engine on its own thread, then steps it while there is work.

    `prepare(engine)` loads and warms models: its pieces get their turns between steps. `on_outputs` is called on the
    engine thread and must only hand over. `ended` tells when the thread is over, and what went wrong.
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        on_outputs: Callable[[list[EngineOutput]], None],
        prepare: Callable[[Engine], Iterator[None]],
    ) -> None:
        self._build = build
        self._on_outputs = on_outputs
        self._prepare = prepare
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.ended: Future[None] = Future()
        self.last_progress_s = math.inf

    def start(self) -> None:
        self._thread.start()

    def add(self, delivery: Delivery) -> None:
        self.call(lambda engine: engine.add(delivery))

    def abort(self, abort: Abort) -> None:
        asked_s = time.perf_counter()
        self.call(lambda engine: engine.abort(abort, asked_s))

    def call(self, command: Command) -> None:
        """Has it done on the engine thread, before the next step."""
        self._commands.put(command)

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after its current step; gives up waiting after `timeout_s`."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def is_stalled(self, max_stall_s: float) -> bool:
        """Whether the current step has run longer than any step should. An idle engine makes progress all the time; a
        turn of a model that isn't warm may take `MAX_TURN_S` longer."""
        return time.monotonic() - self.last_progress_s > max_stall_s

    def _run(self) -> None:
        try:
            engine = self._build()
            self._main_loop(engine, Turns(self._prepare(engine)))
        except Exception as error:  # noqa: BLE001 - handed to whoever watches `ended`
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    def _main_loop(self, engine: Engine, turns: Turns) -> None:
        while self._obey(engine, is_idle=turns.are_over and not engine.has_work):
            self.last_progress_s = time.monotonic()
            if outputs := engine.step():
                self._on_outputs(outputs)
            if not turns.are_over:
                self.last_progress_s = time.monotonic() + MAX_TURN_S
                turns.take(is_busy=engine.has_work)
                self.last_progress_s = time.monotonic()

    def _obey(self, engine: Engine, *, is_idle: bool) -> bool:
        """Applies the commands that have come; False: stop."""
        for command in self._take_commands(is_idle):
            if command is None:
                return False
            command(engine)
        return True

    def _take_commands(self, is_idle: bool) -> list[Command | None]:
        """All that are there; an idle engine waits up to a second for the first."""
        commands: list[Command | None] = []
        try:
            commands.append(self._commands.get(block=is_idle, timeout=1.0))
            while True:
                commands.append(self._commands.get_nowait())
        except queue.Empty:
            return commands
