"""The thread that owns the device: nothing else touches the engine or its models."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from broker.messages import Abort, Delivery
from workers.engine import Engine, EngineOutput

logger = logging.getLogger(__name__)

Command = Callable[[Engine], None]


class EngineThread:
    """Builds an engine on its own thread, then steps it while there is work.

    `build` loads and warms the models; `on_outputs` is called on the engine thread and must only hand over. `built`
    and `ended` tell when the one and the other is over, and what went wrong.
    """

    def __init__(self, build: Callable[[], Engine], on_outputs: Callable[[list[EngineOutput]], None]) -> None:
        self._build = build
        self._on_outputs = on_outputs
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.built: Future[None] = Future()
        self.ended: Future[None] = Future()
        self.last_progress_s = time.monotonic()

    def start(self) -> None:
        self._thread.start()

    def add(self, delivery: Delivery) -> None:
        self._commands.put(lambda engine: engine.add(delivery))

    def abort(self, abort: Abort) -> None:
        asked_s = time.perf_counter()
        self._commands.put(lambda engine: engine.abort(abort, asked_s))

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after its current step; gives up waiting after `timeout_s`."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def is_stalled(self, max_stall_s: float) -> bool:
        """Whether the current step has run longer than any step should. An idle engine makes progress all the time."""
        return time.monotonic() - self.last_progress_s > max_stall_s

    def _run(self) -> None:
        try:
            engine = self._build()
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for `built`
            self.built.set_exception(error)
            return
        self.built.set_result(None)
        try:
            self._main_loop(engine)
        except Exception as error:  # noqa: BLE001 - handed to whoever watches `ended`
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    def _main_loop(self, engine: Engine) -> None:
        self.last_progress_s = time.monotonic()
        while self._obey(engine):
            self.last_progress_s = time.monotonic()
            if outputs := engine.step():
                self._on_outputs(outputs)

    def _obey(self, engine: Engine) -> bool:
        """Applies the commands that have come; False: stop."""
        for command in self._take_commands(is_idle=not engine.has_work):
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
