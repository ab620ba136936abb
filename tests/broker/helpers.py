"""Jobs, pictures and endings for the broker's tests."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from redis.asyncio import Redis

from broker.messages import Completed, Delivery, Job, Picture, Preview, SamplingParams, Timings
from broker.redis_broker import RedisBroker
from broker.terms import Limits

MODEL = "small"
NO_LIMITS = Limits(max_depth=100_000)

PARAMS = SamplingParams(
    prompt="a red apple",
    negative_prompt=None,
    width=32,
    height=32,
    num_inference_steps=4,
    guidance_scale=0.0,
    seed=7,
    scheduler="lcm",
    num_images=1,
    decoder="full",
    output_format="jpeg",
    output_quality=85,
    previews=True,
    metadata=True,
)


def api_job(request_id: str | None = None, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "request_id": request_id or uuid4().hex,
        "model": MODEL,
        "params": PARAMS,
        "lane": "api",
        "owner": "ann",
        "gateway_id": "gateway",
        "keep_s": 60,
    }
    return Job(**(values | changes))


def live_job(request_id: str | None = None, *, session: str = "session", **changes: Any) -> Job:
    return api_job(request_id, **({"lane": "live", "session": session, "keep_s": 0} | changes))


def picture(data: bytes = b"bytes of a picture", index: int = 0) -> Picture:
    return Picture(index=index, seed=7 + index, format="jpeg", width=32, height=32, data=data)


def preview(request_id: str, step: int = 1, data: bytes = b"a preview") -> Preview:
    return Preview(request_id, step=step, num_inference_steps=4, picture=picture(data))


def completed(request_id: str, data: bytes = b"bytes of a picture") -> Completed:
    timings = Timings(queue_ms=1, text_ms=1, denoise_ms=4, decode_ms=1, encode_ms=1, total_ms=8, steps_ms=(1, 1, 1, 1))
    return Completed(request_id, (picture(data),), timings, model_revision="1")


def ids(deliveries: list[Delivery]) -> list[str]:
    return [delivery.job.request_id for delivery in deliveries]


async def submit_all(broker: RedisBroker, *jobs: Job) -> None:
    for job in jobs:
        await broker.submit(job, NO_LIMITS)


async def receive_now(
    broker: RedisBroker, worker_id: str = "worker", count: int = 1, model: str = MODEL
) -> list[Delivery]:
    """What is there; doesn't wait."""
    return await broker.receive(worker_id, model, count, block_ms=0)


async def run_all(broker: RedisBroker, worker_id: str = "worker") -> list[str]:
    """Receives and finishes one after the other until nothing is left; the order in which they came."""
    order: list[str] = []
    while (await broker.depths([MODEL]))[MODEL]["queued"] > 0:
        for request_id in ids(await receive_now(broker, worker_id)):
            order.append(request_id)
            await broker.finish(worker_id, completed(request_id))
    assert await receive_now(broker, worker_id, count=1000) == []  # drops what stands for nothing any more
    return order


async def event_types(broker: RedisBroker, request_id: str) -> list[str]:
    return [logged.event.type for logged in (await broker.status(request_id)).log]


async def replies(broker: RedisBroker, gateway_id: str = "gateway") -> list[tuple[str, str]]:
    """(request_id, type) of all events that the gateway hasn't read yet."""
    _, events = await broker.read_replies(gateway_id, "0", block_ms=0)
    return [(logged.event.request_id, logged.event.type) for logged in events]


async def leftovers(redis: Redis, prefix: str) -> dict[str, str]:
    """Keys that would stay for ever. A model keeps its (empty) ready stream and its name."""
    kept = {}
    key: Any
    async for key in redis.scan_iter(match=f"{prefix}:*", count=1000):
        name = key.decode().removeprefix(f"{prefix}:")
        if not name.startswith("ready:") and name not in ("models", "weights") and await redis.pttl(key) < 0:
            kept[name] = str(await redis.type(key))
    return kept


async def assert_nothing_left(broker: RedisBroker, redis: Redis, prefix: str) -> None:
    names: Any = await redis.smembers(f"{prefix}:models")
    for model in (name.decode() for name in names):
        assert await broker.depths([model]) == {model: {"queued": 0, "running": 0}}
        ready = f"{prefix}:ready:{model}"
        assert await redis.xlen(ready) == 0
        pending: Any = await redis.xpending(ready, "workers")
        assert pending["pending"] == 0
    assert await leftovers(redis, prefix) == {}
