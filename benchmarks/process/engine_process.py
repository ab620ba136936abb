"""An engine in a process of its own, behind what the worker asks of its engine's thread.

Requests and aborts cross by one pipe, reports by another.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.process.thread_worker import ThreadWorker
from benchmarks.shared.diffusers_loop import hush_libraries
from broker.messages import Abort, Delivery, ModelStatus, WarmModel
from models.pipeline import Conditioning
from workers.engine import EngineOutput
from workers.engine.request import Denoising
from workers.engine_thread import EngineThread
from workers.settings import WorkerSettings

SPAWN = multiprocessing.get_context("spawn")
PROGRESS_EVERY_S = 1.0
STOP_WITHIN_S = 60.0
NOTHING: Any = None


@dataclass(frozen=True)
class Built:
    """The models are warm, or `error` says why not."""

    warm_models: tuple[WarmModel, ...]
    error: BaseException | None


@dataclass(frozen=True)
class Ended:
    """The engine's loop is over, as it was told to or by an error."""

    error: BaseException | None


Report = Built | Ended | list[EngineOutput]
Outbox = queue.SimpleQueue[Report | None]


class RemoteModels:
    """What the worker asks of its WarmSet, as the child told it."""

    def __init__(self) -> None:
        self.ready: Future[None] = Future()
        self.warm_models: tuple[WarmModel, ...] = ()
        self.statuses: tuple[ModelStatus, ...] = ()

    def give_up(self) -> None: ...


class EngineProcess:
    """What EngineThread offers, with the engine in a child process.

    `models` hears what the warm-up measured and `on_outputs` gets what is ready, without tensors; it is called on a
    thread of this process and must only hand over. Times of the two processes compare, as both clocks are the
    system's on Linux. The child ends with this process: then its pipe has an end.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        models: RemoteModels,
        on_outputs: Callable[[list[EngineOutput]], None],
    ) -> None:
        self._models, self._on_outputs = models, on_outputs
        commands, self._commands = SPAWN.Pipe(duplex=False)
        self._reports, reports = SPAWN.Pipe(duplex=False)
        self._ends_of_child = (commands, reports)
        self._progress_s = SPAWN.RawValue("d", time.monotonic())
        arguments = (settings, commands, reports, self._progress_s)
        self._process = SPAWN.Process(target=run_engine, args=arguments, name="engine", daemon=True)
        self.ended: Future[None] = Future()

    def start(self) -> None:
        self._process.start()
        for end in self._ends_of_child:
            end.close()
        threading.Thread(target=self._listen, name="engine-reports", daemon=True).start()

    def add(self, delivery: Delivery) -> None:
        self._tell(delivery)

    def abort(self, abort: Abort) -> None:
        self._tell(abort)

    def stop(self, timeout_s: float) -> None:
        """Ends the process after its current step, or kills it after `timeout_s`: a thread can't be killed."""
        self._tell(None)
        if self._process.is_alive():
            self._process.join(timeout_s)
            self._process.kill()

    def is_stalled(self, max_stall_s: float) -> bool:
        return time.monotonic() - self.last_progress_s > max_stall_s

    @property
    def last_progress_s(self) -> float:
        return float(self._progress_s.value)

    def _tell(self, command: Delivery | Abort | None) -> None:
        with contextlib.suppress(OSError):  # a dead child: `ended` tells
            self._commands.send(command)

    def _listen(self) -> None:
        try:
            while True:
                self._hear(self._reports.recv())
        except EOFError:
            for future in (self._models.ready, self.ended):
                if not future.done():
                    settle(future, ChildProcessError("the engine's process has ended"))

    def _hear(self, report: Report) -> None:
        match report:
            case Built(warm_models=warm_models, error=error):
                self._progress_s.value = time.monotonic()  # the child's own word comes within a second
                self._models.warm_models = warm_models
                settle(self._models.ready, error)
            case Ended(error=error):
                settle(self.ended, error)
            case outputs:
                self._on_outputs(outputs)


def settle(future: Future[None], error: BaseException | None) -> None:
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def run_engine(settings: WorkerSettings, commands: Connection, reports: Connection, progress_s: Any) -> None:
    hush_libraries()
    EngineHost(settings).obey(commands, reports, progress_s)


class EngineHost(ThreadWorker):
    """The child: a worker that builds its engine thread and never serves."""

    def obey(self, commands: Connection, reports: Connection, progress_s: Any) -> None:
        """Runs the engine until told to stop, or the parent is gone."""
        outbox: Outbox = queue.SimpleQueue()  # a full pipe must not hold up a step
        sender = threading.Thread(target=send_all, args=(outbox, reports), name="sender")
        sender.start()
        engine = self._start_engine(outbox)
        with contextlib.suppress(EOFError):
            while True:
                progress_s.value = engine.last_progress_s
                if commands.poll(PROGRESS_EVERY_S) and not pass_on(commands.recv(), engine):
                    break
        engine.stop(STOP_WITHIN_S)
        outbox.put(None)
        sender.join()

    def _start_engine(self, outbox: Outbox) -> EngineThread:
        models = self._warm_set
        engine = EngineThread(
            self._build_engine, lambda outputs: outbox.put([lighten(output) for output in outputs]), models.start
        )
        models.ready.add_done_callback(lambda ready: outbox.put(Built(models.warm_models, ready.exception())))
        engine.ended.add_done_callback(lambda ended: outbox.put(Ended(ended.exception())))
        engine.start()
        return engine

    def _tell_news(self) -> None:
        """There is no event loop here; `Built` tells the parent."""


def pass_on(command: Delivery | Abort | None, engine: EngineThread) -> bool:
    """False: stop."""
    match command:
        case Delivery() as delivery:
            engine.add(delivery)
        case Abort() as abort:
            engine.abort(abort)
    return command is not None


def send_all(outbox: Outbox, reports: Connection) -> None:
    with contextlib.suppress(BrokenPipeError):
        while (report := outbox.get()) is not None:
            reports.send(report)


def lighten(output: EngineOutput) -> EngineOutput:
    """With all that the publisher reads of its request, and no tensor: those would cross by shared memory."""
    request = output.request
    return replace(output, request=replace(request, denoising=request.denoising and without_tensors(request.denoising)))


def without_tensors(denoising: Denoising) -> Denoising:
    negative = denoising.negative and Conditioning(NOTHING, truncated=denoising.negative.truncated)
    conditioning = Conditioning(NOTHING, truncated=denoising.conditioning.truncated)
    return Denoising(NOTHING, NOTHING, {}, conditioning, negative, denoising.guidance_scale, denoising.step_index)
