"""The other side of the queue for the gateway's tests: it speaks the real protocol and paints plain rectangles."""

from __future__ import annotations

import asyncio
import io
import json
import math
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from app.tasks import raise_if_cancelled
from broker.errors import BrokerUnavailable
from broker.messages import (
    Cancelled,
    Completed,
    Delivery,
    Expired,
    Failed,
    ImageFormat,
    JobError,
    ModelStatus,
    Picture,
    Preview,
    SamplingParams,
    Superseded,
    TerminalEvent,
    Timings,
    WarmModel,
    WorkerInfo,
)
from broker.redis_broker import RedisBroker
from models.catalog import ModelSpec, load_catalog
from tests.jobs import make_warm

MODEL = "mini-lcm"


def encode(color: tuple[int, int, int], params: SamplingParams, format: ImageFormat) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (params.width, params.height), color).save(buffer, format)
    return buffer.getvalue()


def color_of(params: SamplingParams, index: int) -> tuple[int, int, int]:
    """Tells pictures apart: by seed and by prompt."""
    return (params.seed + index) % 256, len(params.prompt) % 256, params.num_inference_steps


def end_of(delivery: Delivery) -> float:
    """When its deadline passes, by the loop's clock."""
    if delivery.job.deadline_ms is None:
        return math.inf
    return asyncio.get_running_loop().time() + (delivery.job.deadline_ms - delivery.waited_ms) / 1000


class Painter:
    """A worker. `gate` holds every request before its next step while it is cleared; `fail_with` makes all fail.

    It takes whatever there is, unless `max_running` bounds what it holds, as a real worker's batch does.
    """

    def __init__(self, url: str, prefix: str, catalog: Mapping[str, ModelSpec] | None = None) -> None:
        self.worker_id = f"painter-{uuid.uuid4().hex[:8]}"
        self.gate = asyncio.Event()
        self.gate.set()
        self.step_s = 0.002
        self.fail_with: JobError | None = None
        self.max_batch_size = 8
        self.max_running: int | None = None
        self.model = MODEL
        self.catalog = load_catalog() if catalog is None else catalog
        self.deliveries: list[Delivery] = []
        self.endings: list[TerminalEvent] = []
        self._broker = RedisBroker(url, prefix=prefix)
        self._aborted: dict[str, str] = {}

    async def run(self) -> None:
        async with self._broker, asyncio.TaskGroup() as tasks:
            await self.register()
            tasks.create_task(self._read_aborts())
            running: set[asyncio.Task[None]] = set()
            while True:
                raise_if_cancelled()
                for delivery in await self._receive(len(running)):
                    self.deliveries.append(delivery)
                    task = tasks.create_task(self._paint(delivery))
                    running.add(task)
                    task.add_done_callback(running.discard)

    async def _receive(self, num_running: int) -> list[Delivery]:
        num_free = self.max_batch_size if self.max_running is None else self.max_running - num_running
        try:
            if num_free > 0:
                return await self._broker.receive(self.worker_id, self.model, min(num_free, self.max_batch_size), 50)
            await asyncio.sleep(0.005)
            return []
        except BrokerUnavailable:
            await asyncio.sleep(0.02)
            return []

    async def register(
        self, state: Any = "ready", detail: str = "", statuses: tuple[ModelStatus, ...] | None = None
    ) -> None:
        """As a worker of its one model, or of those that `statuses` tell of."""
        models = (self._warm_model(),) if state == "ready" else ()
        if statuses is None:
            statuses = (ModelStatus(self.model, "warm" if state == "ready" else "warming", detail),)
        info = WorkerInfo(self.worker_id, state, "cpu", "float32", models, 0, detail, statuses)
        await self._broker.register(info, ttl_s=60)

    def _warm_model(self) -> WarmModel:
        """As its own catalog has it; one that lacks it tells of no entry."""
        warm, spec = make_warm(self.model, max_rows=self.max_batch_size), self.catalog.get(self.model)
        return warm if spec is None else replace(warm, fingerprint=spec.fingerprint, loras=tuple(spec.loras))

    async def unregister(self) -> None:
        await self._broker.unregister(self.worker_id)

    async def _read_aborts(self) -> None:
        after = "0"
        while True:
            raise_if_cancelled()
            try:
                after, aborts = await self._broker.read_aborts(self.worker_id, after, 100)
            except BrokerUnavailable:
                await asyncio.sleep(0.02)
                continue
            for abort in aborts:
                if abort.reason != "newer":
                    self._aborted[abort.request_id] = abort.reason

    async def _paint(self, delivery: Delivery) -> None:
        request_id, params = delivery.job.request_id, delivery.job.params
        end_s = end_of(delivery)
        for step in range(1, params.num_inference_steps + 1):
            await self._wait(request_id, end_s)
            if asyncio.get_running_loop().time() >= end_s:
                return await self._finish(Expired(request_id))
            if request_id in self._aborted:
                return await self._finish(self._stopped(request_id))
            if params.previews and step < params.num_inference_steps:
                await self._preview(request_id, params, step)
        if self.fail_with:
            return await self._finish(Failed(request_id, self.fail_with))
        return await self._finish(self._complete(delivery))

    async def _wait(self, request_id: str, end_s: float) -> None:
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(self.step_s)
        while not self.gate.is_set() and request_id not in self._aborted and clock() < end_s:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def _stopped(self, request_id: str) -> TerminalEvent:
        is_newer = self._aborted[request_id] == "newer"
        return Superseded(request_id) if is_newer else Cancelled(request_id)

    async def _preview(self, request_id: str, params: SamplingParams, step: int) -> None:
        for index in range(params.num_images):
            data = encode((step, step, step), params, "jpeg")
            picture = Picture(index, params.seed + index, "jpeg", params.width, params.height, data)
            await self._broker.publish(self.worker_id, Preview(request_id, step, params.num_inference_steps, picture))

    def _complete(self, delivery: Delivery) -> Completed:
        params = delivery.job.params
        pictures = tuple(
            Picture(
                index,
                params.seed + index,
                params.output_format,
                params.width,
                params.height,
                encode(color_of(params, index), params, params.output_format),
            )
            for index in range(params.num_images)
        )
        steps_ms = tuple(2.0 for _ in range(params.num_inference_steps))
        timings = Timings(delivery.waited_ms, 1.0, sum(steps_ms), 3.0, 0.5, delivery.waited_ms + 12.5, steps_ms)
        return Completed(delivery.job.request_id, pictures, timings, "1")

    async def _finish(self, event: TerminalEvent) -> None:
        if await self._broker.finish(self.worker_id, event):
            self.endings.append(event)


@dataclass(frozen=True, slots=True)
class LiveFrame:
    header: dict[str, Any]
    data: bytes


def unpack(message: bytes) -> LiveFrame:
    (length,) = struct.unpack_from(">I", message)
    return LiveFrame(json.loads(message[4 : 4 + length]), message[4 + length :])


def open_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))
