"""A worker whose engine takes no time: what is left of a request is what gateway, queue and HTTP cost.

    python -m benchmarks.gateway.instant_worker REDIS_URL PREFIX

It speaks the worker's protocol on a real Redis: registers, receives in batches, finishes each request in a transaction
of its own, many at once. Every picture is the same JPEG of 512x512, of the size that a photograph has at quality 85.
"""

from __future__ import annotations

import asyncio
import gc
import io
import random
import sys
import time

import uvloop
from PIL import Image

from broker.messages import Completed, Delivery, Picture, SizeCosts, Timings, WarmModel, WorkerInfo
from broker.redis_broker import RedisBroker
from models.catalog import load_catalog

MODEL = "sd15-lcm"  # only its catalog entry is needed: the sizes start with 512x512
WORKER_ID = "instant"
MAX_ROWS = 64
SIDE = 512
GRID = 33  # of the random colours under the picture; gives 46 KB
HEARTBEAT_S = 5.0
COSTS = SizeCosts(SIDE, SIDE, MAX_ROWS, step_ms={1: 0.01}, decode_ms={1: 0.01}, preview_ms={1: 0.01})


def main() -> None:
    url, prefix = sys.argv[1:]
    uvloop.run(work(url, prefix))


async def work(url: str, prefix: str) -> None:
    """Until the process is ended."""
    picture = paint()
    gc.freeze()
    async with RedisBroker(url, prefix=prefix) as broker, asyncio.TaskGroup() as tasks:
        tasks.create_task(stay_registered(broker))
        while True:
            deliveries = await broker.receive(WORKER_ID, MODEL, MAX_ROWS)
            received_s = time.perf_counter()
            for delivery in deliveries:
                tasks.create_task(finish(broker, delivery, picture, received_s))


async def stay_registered(broker: RedisBroker) -> None:
    fingerprint = load_catalog()[MODEL].fingerprint
    warm = WarmModel(MODEL, "1", MAX_ROWS, text_ms=0.01, sizes=(COSTS,), fingerprint=fingerprint)
    while True:
        await broker.register(WorkerInfo(WORKER_ID, "ready", "none", "none", (warm,)))
        await asyncio.sleep(HEARTBEAT_S)


async def finish(broker: RedisBroker, delivery: Delivery, data: bytes, received_s: float) -> None:
    """The time since it was received is told as the engine's."""
    params = delivery.job.params
    picture = Picture(0, params.seed, "jpeg", SIDE, SIDE, data)
    engine_ms = (time.perf_counter() - received_s) * 1000
    timings = Timings(delivery.waited_ms, 0.0, engine_ms, 0.0, 0.0, delivery.waited_ms + engine_ms, (engine_ms,))
    await broker.finish(WORKER_ID, Completed(delivery.job.request_id, (picture,), timings, "1"))


def paint() -> bytes:
    """A soft picture in colours that are the same in every process."""
    colours = Image.frombytes("RGB", (GRID, GRID), random.Random(0).randbytes(3 * GRID**2))
    file = io.BytesIO()
    colours.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()


if __name__ == "__main__":
    main()
