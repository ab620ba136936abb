"""One generation for several requests, over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from app.sharing import name_picture
from models.catalog import StyleLora, load_catalog
from tests.app.conftest import Api, StartApi
from tests.app.test_generations import until_state
from tests.jobs import make_job

NATIVE, OPENAI = "/v1/generations", "/v1/images/generations"
APPLE = {"prompt": "a red apple", "seed": 7}


async def post(api: Api, body: dict[str, Any], path: str = NATIVE, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return await api.http.post(path, json=body, headers=names)


@pytest.fixture
async def shared(start_api: StartApi) -> Any:
    async with start_api(cache_s=60) as api:
        yield api


# The cache


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_the_same_picture_is_drawn_once(shared: Api, path: str) -> None:
    first = await post(shared, APPLE, path)
    again = await post(shared, APPLE, path)
    assert (first.headers["Cache-Status"], again.headers["Cache-Status"]) == ("fewstep; fwd=miss", "fewstep; hit")
    assert first.headers["X-Fewstep-Generation"] == again.headers["X-Fewstep-Generation"]
    assert first.headers["X-Request-Id"] != again.headers["X-Request-Id"]
    assert again.headers["Server-Timing"] == 'cache;desc="cached"'
    assert len(shared.painter.deliveries) == 1
    metrics = (await shared.http.get("/metrics")).text
    assert 'fewstep_admitted_total{model="mini-lcm",origin="cached"} 1.0' in metrics
    assert 'fewstep_outcomes_total{model="mini-lcm",outcome="completed"} 1.0' in metrics


async def test_bytes_and_json_share_a_picture(shared: Api) -> None:
    json = await post(shared, APPLE | {"output_format": "png"}, Accept="application/json")
    image = await post(shared, APPLE, Accept="image/png")
    assert image.headers["Cache-Status"] == "fewstep; hit"
    assert (await shared.http.get(json.json()["images"][0]["url"])).content == image.content


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_what_a_worker_draws_by_another_entry_is_not_shared(shared: Api, path: str) -> None:
    painter, ours = shared.painter, shared.painter.catalog
    painter.catalog = {"mini-lcm": ours["mini-lcm"].model_copy(update={"description": "new"})}
    for catalog, status in ((painter.catalog, "fewstep; fwd=bypass"), (ours, "fewstep; fwd=miss")):
        painter.catalog = catalog
        await painter.register()
        shared.gateway.fleet._fresh_until = 0
        assert (await post(shared, APPLE, path)).headers["Cache-Status"] == status


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"prompt": "a red apple!"}, {"num_inference_steps": 3}, {"output_quality": 10}]
)
async def test_another_picture_is_drawn(shared: Api, change: dict[str, Any]) -> None:
    await post(shared, APPLE)
    assert (await post(shared, APPLE | change)).headers["Cache-Status"] == "fewstep; fwd=miss"


@pytest.mark.parametrize("body", [{"prompt": "a red apple"}, APPLE | {"cache": False}])
@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_what_is_not_shared(shared: Api, body: dict[str, Any], path: str) -> None:
    """A picture without a seed is a new one every time."""
    answers = [await post(shared, body, path) for _ in range(2)]
    assert [answer.headers["Cache-Status"] for answer in answers] == ["fewstep; fwd=bypass"] * 2
    assert len(shared.painter.deliveries) == 2


async def test_requests_under_way_are_joined(shared: Api) -> None:
    shared.painter.gate.clear()
    waiting = [asyncio.create_task(post(shared, APPLE)) for _ in range(5)]
    async with asyncio.timeout(10):
        while sum(waiters_of(shared)) < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    shared.painter.gate.set()
    answers = await asyncio.gather(*waiting)
    statuses = sorted(answer.headers["Cache-Status"] for answer in answers)
    assert statuses == ["fewstep; fwd=miss"] + ["fewstep; fwd=miss; collapsed"] * 4
    assert len({answer.json()["images"][0]["b64_json"] for answer in answers}) == 1
    assert len(shared.painter.deliveries) == 1


def waiters_of(api: Api) -> list[int]:
    return [len(waiters) for waiters in api.gateway.replies._subscriptions.values()]


async def test_one_of_two_clients_may_leave(shared: Api) -> None:
    shared.painter.gate.clear()
    stays = asyncio.create_task(post(shared, APPLE))
    leaves = asyncio.create_task(post(shared, APPLE))
    async with asyncio.timeout(10):
        while sum(waiters_of(shared)) < 2 or not shared.painter.deliveries:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    leaves.cancel()
    await asyncio.wait((leaves,))
    async with asyncio.timeout(10):
        while sum(waiters_of(shared)) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    shared.painter.gate.set()
    assert (await stays).status_code == 200


async def test_a_shared_request_keeps_each_callers_deadline(shared: Api) -> None:
    shared.painter.gate.clear()
    created = await post(shared, APPLE, Prefer="respond-async")
    late = await post(shared, APPLE | {"deadline_ms": 400})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    shared.painter.gate.set()
    assert await until_state(shared, created.headers["Location"], "completed")


async def test_asking_again_asynchronously_finds_the_result_at_once(shared: Api) -> None:
    await post(shared, APPLE)
    again = await post(shared, APPLE, Prefer="respond-async")
    assert (again.status_code, again.json()["state"]) == (200, "completed")


async def test_who_ran_into_its_deadline_wants_it_no_more(shared: Api) -> None:
    """By OpenAI's route: then the other one leaves, and nobody is left."""
    shared.painter.gate.clear()
    body = APPLE | {"output_format": "png", "output_quality": 100}
    leaves = asyncio.create_task(post(shared, body))
    async with asyncio.timeout(10):
        while not shared.painter.deliveries:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    late = await post(shared, APPLE | {"deadline_ms": 400}, OPENAI)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    leaves.cancel()
    async with asyncio.timeout(10):
        while not shared.painter.endings:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(shared.painter.deliveries) == 1


async def test_a_shared_result_outlives_its_end_even_where_nothing_is_kept(start_api: StartApi) -> None:
    async with start_api(cache_s=60, keep_sync_s=0) as api:
        await post(api, APPLE)
        again = await post(api, APPLE)
        assert again.headers["Cache-Status"] == "fewstep; hit"
        assert again.json()["images"][0]["b64_json"]


# Idempotency keys


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_a_retry_with_a_key_gives_the_same_result(api: Api, path: str) -> None:
    body = {"prompt": "a red apple"}
    first = await post(api, body, path, Idempotency_Key="order-1")
    again = await post(api, body | {"negative_prompt": None}, path, Idempotency_Key="order-1")
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert first.headers["X-Fewstep-Seed"] == again.headers["X-Fewstep-Seed"]
    assert first.headers["X-Fewstep-Generation"] == again.headers["X-Fewstep-Generation"]
    assert len(api.painter.deliveries) == 1


async def test_a_retry_while_the_first_is_under_way_waits_for_it(api: Api) -> None:
    api.painter.gate.clear()
    created = await post(api, APPLE, Idempotency_Key="k", Prefer="respond-async")
    again = await post(api, APPLE, Idempotency_Key="k", Prefer="respond-async")
    assert again.headers["Location"] == created.headers["Location"]
    waiting = asyncio.create_task(post(api, APPLE, Idempotency_Key="k"))
    await asyncio.sleep(0.05)
    api.painter.gate.set()
    assert (await waiting).json()["id"] == created.json()["id"]


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
async def test_a_key_for_another_body_is_a_conflict(api: Api, path: str) -> None:
    await post(api, APPLE, path, Idempotency_Key="k")
    answer = await post(api, APPLE | {"seed": 8}, path, Idempotency_Key="k")
    assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("idempotency_key_reused", "Idempotency-Key")


async def test_the_sdk_does_not_retry_a_conflict(api: Api) -> None:
    async with AsyncOpenAI(api_key="x", base_url=f"{api.url}/v1", max_retries=3) as client:
        headers = {"Idempotency-Key": "k"}
        await client.images.generate(prompt="a red apple", extra_headers=headers)
        with pytest.raises(openai.ConflictError):
            await client.images.generate(prompt="a pear", extra_headers=headers)
    metrics = (await api.http.get("/metrics")).text
    assert 'fewstep_rejected_total{reason="idempotency_key_reused"} 1.0' in metrics


async def test_a_retry_after_a_broken_connection_draws_again(api: Api) -> None:
    """The client left, so its work was cancelled; its key is free for the retry."""
    api.painter.gate.clear()
    broken = asyncio.create_task(post(api, APPLE, Idempotency_Key="k"))
    async with asyncio.timeout(10):
        while not api.painter.deliveries:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    broken.cancel()
    async with asyncio.timeout(10):
        while not api.painter.endings:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    api.painter.gate.set()
    assert (await post(api, APPLE, Idempotency_Key="k")).status_code == 200


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\tkey"])
async def test_bad_keys(api: Api, key: str) -> None:
    answer = await post(api, APPLE, Idempotency_Key=key)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_a_picture_is_another_one_as_soon_as_its_entry_is() -> None:
    spec = load_catalog()["mini-lcm"]
    job = make_job(seed=3)
    names = {name_picture(job, changed) for changed in (spec, spec.model_copy(update={"revision": "another"}))}
    lora = StyleLora(name="ink", description="d", source="here", models=["mini-lcm"], license="MIT")
    for source in ("here", "there"):
        own = {"ink": lora.model_copy(update={"source": source})}
        names.add(name_picture(job, spec.model_copy(update={"loras": own})))
    assert len(names) == 4
