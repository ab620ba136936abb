from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from tests.app.conftest import Api, StartApi
from tests.app.peers import open_image
from tests.app.test_generations import until, until_state

WITH_PREVIEWS = {"prompt": "a red apple", "seed": 7, "previews": True}


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    id: int
    data: dict[str, Any]


async def read_events(answer: httpx.Response) -> AsyncIterator[Event]:
    fields: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield Event(fields["event"], int(fields["id"]), json.loads(fields["data"]))
            fields = {}


async def follow(api: Api, location: str, **headers: str) -> list[Event]:
    async with api.http.stream("GET", f"{location}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert len(answer.headers["X-Request-Id"]) == 32
        return [event async for event in read_events(answer)]


async def create(api: Api) -> str:
    answer = await api.http.post("/v1/generations", json=WITH_PREVIEWS, headers={"Prefer": "respond-async"})
    location: str = answer.headers["Location"]
    return location


async def test_order_of_events(api: Api) -> None:
    api.painter.gate.clear()
    location = await create(api)
    following = asyncio.create_task(follow(api, location))
    await until(lambda: bool(api.painter.deliveries))
    await asyncio.sleep(0.05)
    api.painter.step_s = 0.02
    api.painter.gate.set()
    events = await following
    assert [event.name for event in events] == ["queued", "started", "preview", "preview", "preview", "completed"]
    assert [event.id for event in events] == list(range(1, 7))
    assert [event.data["state"] for event in events if event.name != "preview"] == ["queued", "running", "completed"]
    preview = events[2].data
    assert {key: preview[key] for key in preview if key != "b64_json"} == {
        "index": 0,
        "step": 1,
        "num_inference_steps": 4,
        "format": "jpeg",
    }
    assert open_image(base64.b64decode(preview["b64_json"])).size == (64, 64)
    final = events[-1].data
    assert open_image(base64.b64decode(final["images"][0]["b64_json"])).size == (64, 64)
    assert final["timings"]["total_ms"] > 0


async def test_attach_in_the_middle_gets_the_log_first(api: Api) -> None:
    api.painter.gate.clear()
    location = await create(api)
    await until(lambda: bool(api.painter.deliveries))
    async with api.http.stream("GET", f"{location}/events") as answer:
        events = read_events(answer)
        assert [(await anext(events)).name for _ in range(2)] == ["queued", "started"]
        api.painter.gate.set()
        names = [event.name async for event in events]
    assert names[-1] == "completed"


async def test_attach_after_the_end(api: Api) -> None:
    location = await create(api)
    await until_state(api, location, "completed")
    events = await follow(api, location)
    assert [events[0].name, events[1].name, events[-1].name] == ["queued", "started", "completed"]
    assert "b64_json" in events[-1].data["images"][0]


async def test_continue_after_the_last_event_id(api: Api) -> None:
    location = await create(api)
    await until_state(api, location, "completed")
    everything = await follow(api, location)
    rest = await follow(api, location, **{"Last-Event-ID": "2"})
    assert rest == [event for event in everything if event.id > 2]
    over = await api.http.get(f"{location}/events", headers={"Last-Event-ID": str(everything[-1].id)})
    assert (over.status_code, over.content) == (204, b"")
    nonsense = await follow(api, location, **{"Last-Event-ID": "abc"})
    assert nonsense == everything


async def test_several_readers_of_one_request(api: Api) -> None:
    api.painter.gate.clear()
    location = await create(api)
    following = [asyncio.create_task(follow(api, location)) for _ in range(3)]
    await asyncio.sleep(0.05)
    api.painter.gate.set()
    for events in await asyncio.gather(*following):
        assert (events[0].name, events[-1].name) == ("queued", "completed")


async def test_another_gateway_can_attach(start_api: StartApi) -> None:
    async with start_api() as first, start_api(has_worker=False, prefix=first.settings.redis_prefix) as second:
        first.painter.gate.clear()
        location = await create(first)
        following = asyncio.create_task(follow(second, location))
        await asyncio.sleep(0.1)
        first.painter.gate.set()
        events = await following
        assert (events[0].name, events[-1].name) == ("queued", "completed")
        assert "b64_json" in events[-1].data["images"][0]


async def test_a_cancel_ends_the_stream(api: Api) -> None:
    api.painter.gate.clear()
    location = await create(api)
    following = asyncio.create_task(follow(api, location))
    await until(lambda: bool(api.painter.deliveries))
    await api.http.delete(location)
    events = await following
    assert events[-1].name == "cancelled"
    assert events[-1].data["error"]["code"] == "cancelled"


async def test_a_reader_that_leaves_cancels_nothing(api: Api) -> None:
    api.painter.gate.clear()
    location = await create(api)
    async with api.http.stream("GET", f"{location}/events") as answer:
        await anext(read_events(answer))
    api.painter.gate.set()
    await until_state(api, location, "completed")
    await until(lambda: not api.gateway.replies._subscriptions)
