"""The two workers, each in a process of its own that runs in its turns only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import Any, Literal

import psutil

from benchmarks.process.engine_process import SPAWN, EngineProcess, RemoteModels
from benchmarks.process.thread_worker import ThreadWorker
from benchmarks.shared.diffusers_loop import hush_libraries
from benchmarks.shared.figures import BenchmarkError
from benchmarks.shared.servers import READY_WITHIN_S, CpuMeter, signal_group
from broker.redis_broker import RedisBroker
from workers.settings import WorkerSettings
from workers.worker import Worker


class ProcessWorker(ThreadWorker):
    """The same but for where its engine runs."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings)
        models: Any = RemoteModels()
        engine: Any = EngineProcess(settings, models, self._hand_over)
        self._warm_set, self._engine = models, engine


Program = Literal["thread", "process"]
PROGRAMS: dict[Program, type[Worker]] = {"thread": ThreadWorker, "process": ProcessWorker}


def run_worker(program: Program, settings: WorkerSettings) -> None:
    os.setsid()  # a group of its own, which is stopped and ended as one
    logging.basicConfig(level=logging.ERROR)  # after each rest a read times out and is tried again, with a warning
    hush_libraries()
    asyncio.run(serve(PROGRAMS[program](settings)))


async def serve(worker: Worker) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.request_stop)
    await worker.serve()


class Contender:
    """A worker that is ready, with a queue of its own; it runs in its turns only."""

    def __init__(self, program: Program, settings: WorkerSettings) -> None:
        self.program, self.settings = program, settings
        self._process = SPAWN.Process(target=run_worker, args=(program, settings), name=program)

    def __enter__(self) -> Contender:
        self._process.start()
        try:
            asyncio.run(self._wait_until_ready())
        except BaseException:
            self.__exit__()
            raise
        signal_group(self._pid, signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        signal_group(self._pid, signal.SIGCONT)
        self._process.terminate()
        self._process.join(30)
        signal_group(self._pid, signal.SIGKILL)
        self._process.kill()

    @contextlib.contextmanager
    def awake(self) -> Iterator[CpuMeter]:
        """For the time of its turn, of which the meter tells the CPU time."""
        signal_group(self._pid, signal.SIGCONT)
        try:
            yield CpuMeter(psutil.Process(self._pid))
        finally:
            signal_group(self._pid, signal.SIGSTOP)

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    async def _wait_until_ready(self) -> None:
        end_s = time.monotonic() + READY_WITHIN_S
        async with RedisBroker(self.settings.redis_url, prefix=self.settings.redis_prefix) as broker:
            while not any(info.state == "ready" for info in await broker.workers()):
                if not self._process.is_alive() or time.monotonic() > end_s:
                    raise BenchmarkError(f"the worker with its engine in a {self.program} is not ready, see above")
                await asyncio.sleep(0.2)
