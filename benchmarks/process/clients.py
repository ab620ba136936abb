"""The clients, in a process of their own: a closed loop over the broker."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from app.parameters import Defaults, complete
from app.schemas import GenerationFields
from benchmarks.shared.figures import BenchmarkError
from benchmarks.shared.prompts import endless_prompts
from broker.messages import Accepted, Completed, Job, Preview, Started
from broker.redis_broker import RedisBroker
from broker.terms import Limits
from models.catalog import get_spec, load_catalog
from workers.settings import WorkerSettings

PATIENCE_S = 60.0  # beside the time asked for


@dataclass(frozen=True)
class Load:
    clients: int
    previews: bool = False

    def __str__(self) -> str:
        return f"{self.clients} {'client' if self.clients == 1 else 'clients'}{', previews' if self.previews else ''}"


@dataclass(frozen=True)
class Task:
    """What the clients of one turn do; `settings` are the worker's."""

    settings: WorkerSettings
    load: Load
    steps: int
    warmup_s: float
    seconds: float
    seed: int


@dataclass
class Seen:
    """What the clients saw: waits and step times of the pictures that count, numbers of all.

    Clients who share a batch are answered together, so pictures are counted from one answer to another: from the last
    one before the window, at `start_s`, to the last one in it, at `end_s`.
    """

    waits_ms: list[float] = field(default_factory=list)
    steps_ms: list[float] = field(default_factory=list)
    num_pictures: int = 0
    num_previews: int = 0
    start_s: float = 0.0
    end_s: float = 0.0

    @property
    def images_per_s(self) -> float:
        return len(self.waits_ms) / (self.end_s - self.start_s)


def run_clients(task: Task) -> Seen:
    return asyncio.run(ask_together(task))


async def ask_together(task: Task) -> Seen:
    async with RedisBroker(task.settings.redis_url, prefix=task.settings.redis_prefix) as broker:
        try:
            return await asyncio.wait_for(Clients(broker, task).run(), task.warmup_s + task.seconds + PATIENCE_S)
        except TimeoutError:
            raise BenchmarkError(f"{task.load}: some request has no answer") from None


class Clients:
    """A closed loop: each asks for its next picture when its last one is there."""

    def __init__(self, broker: RedisBroker, task: Task) -> None:
        self._broker, self._task = broker, task
        self._gateway_id = uuid.uuid4().hex
        self._jobs = endless_jobs(task, self._gateway_id)
        self._answered = asyncio.Semaphore(0)
        self._waiting: dict[str, asyncio.Future[Completed]] = {}
        self._seen = Seen()
        self._start_s = self._end_s = math.inf

    async def run(self) -> Seen:
        clients = (self._keep_asking() for _ in range(self._task.load.clients))
        await asyncio.gather(self._read_replies(), self._open_window(), *clients)
        await self._broker.drop_gateway(self._gateway_id)
        return self._seen

    async def _open_window(self) -> None:
        """After the warm-up, and not before as many answers as there are clients."""
        await asyncio.sleep(self._task.warmup_s)
        for _ in range(self._task.load.clients):
            await self._answered.acquire()
        self._start_s = time.perf_counter()
        self._end_s = self._start_s + self._task.seconds

    async def _keep_asking(self) -> None:
        while (asked_s := time.perf_counter()) < self._end_s:
            job = next(self._jobs)
            reply = self._waiting[job.request_id] = asyncio.get_running_loop().create_future()
            await self._broker.submit(job, Limits())
            completed = await reply
            self._note(completed, asked_s, time.perf_counter())

    def _note(self, completed: Completed, asked_s: float, answered_s: float) -> None:
        self._answered.release()
        self._seen.num_pictures += 1
        if answered_s < self._start_s:
            self._seen.start_s = answered_s
        elif answered_s < self._end_s:
            self._seen.end_s = answered_s
            self._seen.waits_ms.append((answered_s - asked_s) * 1000)
            self._seen.steps_ms += completed.timings.steps_ms

    async def _read_replies(self) -> None:
        after = "0"
        while self._waiting or time.perf_counter() < self._end_s:
            after, replies = await self._broker.read_replies(self._gateway_id, after)
            for reply in replies:
                match reply.event:
                    case Completed() as completed:
                        self._waiting.pop(completed.request_id).set_result(completed)
                    case Preview():
                        self._seen.num_previews += 1
                    case Accepted() | Started():
                        pass
                    case other:
                        raise BenchmarkError(f"{self._task.load}: a request ended with {other}")


def endless_jobs(task: Task, gateway_id: str) -> Iterator[Job]:
    """Each has a prompt of its own, so that no cache of texts helps."""
    spec = get_spec(load_catalog(), task.settings.models)
    asked = GenerationFields(prompt="-", num_inference_steps=task.steps, previews=task.load.previews)
    template = complete(asked, spec, Defaults(output_format="png"))
    for number, prompt in enumerate(endless_prompts(task.seed), task.seed * 1_000_000):
        params = replace(template, prompt=f"{prompt}, no. {number}", seed=number)
        yield Job(uuid.uuid4().hex, spec.name, params, "api", owner="benchmark", gateway_id=gateway_id, keep_s=0)
