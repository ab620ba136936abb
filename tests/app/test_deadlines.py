"""A deadline is kept or refused."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.app.conftest import Api
from tests.app.test_generations import until_state

NATIVE, OPENAI = "/v1/generations", "/v1/images/generations"
APPLE = {"prompt": "a red apple"}


async def hold_work(api: Api, num_requests: int) -> list[str]:
    """Requests that the worker runs or the queue holds until the gate opens."""
    api.painter.gate.clear()
    api.painter.max_running = 8
    created = [
        await api.http.post(NATIVE, json=APPLE, headers={"Prefer": "respond-async"}) for _ in range(num_requests)
    ]
    return [answer.headers["Location"] for answer in created]


async def until_running(api: Api, num_requests: int) -> None:
    async with asyncio.timeout(10):
        while len(api.painter.deliveries) < num_requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
@pytest.mark.parametrize("place", ["body", "header"])
async def test_what_never_fits_is_refused_for_good(api: Api, path: str, place: str) -> None:
    """By the painter's cost table alone one picture takes 45 ms."""
    body: dict[str, Any] = APPLE | ({"deadline_ms": 20} if place == "body" else {})
    headers = {"X-Fewstep-Deadline-Ms": "20"} if place == "header" else {}
    answer = await api.http.post(path, json=body, headers=headers)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (429, "false")
    assert "Retry-After" not in answer.headers
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("deadline_too_short", "deadline_ms")
    assert "takes about 45 ms" in error["message"]
    assert not api.painter.deliveries


async def test_retry_after_is_when_it_would_fit(api: Api) -> None:
    """8 run, 40 wait, each of which costs 23 ms of the worker; a request in a full batch runs for 8 times that."""
    await hold_work(api, 8)
    await until_running(api, 8)
    await hold_work(api, 40)
    queue_ms = 41 * (1 + (4 * 40 + 16) / 8)
    refused = await api.http.post(NATIVE, json=APPLE | {"deadline_ms": 500})
    assert refused.status_code == 429
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "deadline_unreachable", "deadline_ms")
    assert "the deadline is 500 ms" in error["message"]
    assert int(refused.headers["retry-after-ms"]) == pytest.approx(1.15 * (queue_ms + 184) - 500, abs=2)
    taken = await api.http.post(NATIVE, json=APPLE | {"deadline_ms": 3000}, headers={"Prefer": "respond-async"})
    assert taken.status_code == 202
    assert taken.json()["queue"] == {"position": 40, "predicted_start_ms": pytest.approx(queue_ms, abs=2)}
    api.painter.gate.set()


async def test_work_that_became_late_never_reaches_the_worker(api: Api) -> None:
    await hold_work(api, 8)
    await until_running(api, 8)
    body = APPLE | {"prompt": "late", "deadline_ms": 400}
    late = await api.http.post(NATIVE, json=body, headers={"Prefer": "respond-async"})
    waits = await api.http.post(NATIVE, json=body)
    assert (waits.status_code, waits.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert waits.headers["x-should-retry"] == "false"
    await until_state(api, late.headers["Location"], "expired")
    api.painter.gate.set()
    assert (await api.http.post(NATIVE, json=APPLE)).status_code == 200
    assert all(delivery.job.params.prompt != "late" for delivery in api.painter.deliveries)


async def test_the_earlier_of_two_deadlines_counts(api: Api) -> None:
    for body_ms, header_ms in ((20, "5000"), (5000, "20")):
        body = APPLE | {"deadline_ms": body_ms}
        answer = await api.http.post(NATIVE, json=body, headers={"X-Fewstep-Deadline-Ms": header_ms})
        assert answer.json()["error"]["code"] == "deadline_too_short"


@pytest.mark.parametrize("value", ["0", "soon", "3600001", "1.5"])
async def test_bad_headers(api: Api, value: str) -> None:
    answer = await api.http.post(NATIVE, json=APPLE, headers={"X-Fewstep-Deadline-Ms": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].lower() == "x-fewstep-deadline-ms"


async def test_the_sdk_comes_back_when_told(api: Api) -> None:
    """It retries a 429 after `retry-after-ms`, and then finds the queue drained."""

    async def drain_once_refused() -> None:
        refusal = 'fewstep_rejected_total{reason="deadline_unreachable"}'
        while refusal not in (await api.http.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        api.painter.gate.set()

    await hold_work(api, 8)
    await until_running(api, 8)
    await hold_work(api, 4)
    draining = asyncio.create_task(drain_once_refused())
    async with AsyncOpenAI(api_key="x", base_url=f"{api.url}/v1", max_retries=5) as client:
        images = await client.images.generate(prompt="a red apple", extra_body={"deadline_ms": 250})
    assert images.data
    await draining


async def test_a_stream_ends_at_its_deadline(api: Api) -> None:
    await hold_work(api, 8)
    await until_running(api, 8)
    async with AsyncOpenAI(api_key="x", base_url=f"{api.url}/v1", max_retries=0) as client:
        stream = await client.images.generate(prompt="a red apple", stream=True, extra_body={"deadline_ms": 300})
        with pytest.raises(openai.APIError, match="the deadline passed"):
            async for _ in stream:
                pass
    api.painter.gate.set()
