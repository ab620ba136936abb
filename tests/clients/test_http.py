"""`AsyncClient` against a real gateway, and through a network that breaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import httpx
import pytest

from broker.messages import JobError
from fewstep_client import (
    ApiError,
    AsyncClient,
    BadRequest,
    NotDrawn,
    NotFound,
    Picture,
    Preview,
    ServerError,
    TooBusy,
    Unauthorized,
    Unreachable,
)
from fewstep_client.errors import error_class
from fewstep_client.http import choose_pause, read_error, read_retry_after_s
from tests.app.conftest import Api, StartApi
from tests.app.keys import Keys
from tests.app.peers import color_of, open_image
from tests.app.test_generations import until
from tests.clients.cutting_proxy import CuttingProxy
from tests.service import free_port

PROMPT = "a red apple on a blue background"


@pytest.fixture
async def client(api: Api) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(api.url) as client:
        yield client


@asynccontextmanager
async def through_proxy(api: Api, *words: bytes) -> AsyncIterator[tuple[AsyncClient, CuttingProxy]]:
    proxy = CuttingProxy(api.port)
    proxy.words = list(words)
    async with proxy.running(), AsyncClient(proxy.url) as client:
        yield client, proxy


# At once


async def test_a_picture(api: Api, client: AsyncClient) -> None:
    picture = await client.generate(PROMPT, seed=7, output_format="png", negative_prompt="a pear")
    params = api.painter.deliveries[0].job.params
    assert open_image(picture.data).getpixel((0, 0)) == color_of(params, 0)
    assert (picture.seed, picture.format, picture.width, picture.height) == (7, "png", 64, 64)
    assert (picture.index, picture.model, picture.generation_id) == (
        0,
        "mini-lcm",
        api.painter.deliveries[0].job.request_id,
    )
    assert picture.timings.total_ms > picture.timings.denoise_ms > 0
    assert ["negative_prompt" in warning for warning in picture.warnings] == [True]


async def test_a_picture_that_takes_longer_than_the_service_waits(start_api: StartApi) -> None:
    async with start_api(sync_wait_s=0.1) as api, AsyncClient(api.url) as client:
        api.painter.gate.clear()
        drawing = asyncio.create_task(client.generate(PROMPT))
        await until(lambda: len(api.painter.deliveries) == 1)
        await asyncio.sleep(0.3)
        assert not drawing.done()
        api.painter.gate.set()
        assert open_image((await drawing).data).size == (64, 64)


async def test_a_call_that_is_cancelled_cancels_the_drawing(api: Api, client: AsyncClient) -> None:
    api.painter.gate.clear()
    drawing = asyncio.create_task(client.generate(PROMPT))
    await until(lambda: len(api.painter.deliveries) == 1)
    drawing.cancel()
    await until(lambda: [ending.type for ending in api.painter.endings] == ["cancelled"])


async def test_what_is_refused_names_the_field(client: AsyncClient) -> None:
    with pytest.raises(BadRequest, match="num_inference_steps: 999 is not allowed") as caught:
        await client.generate(PROMPT, num_inference_steps=999)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_value", "num_inference_steps")
    assert error.type == "invalid_request_error"
    assert error.request_id


async def test_an_unknown_model_and_an_unknown_generation(client: AsyncClient) -> None:
    with pytest.raises(NotFound) as caught:
        await client.generate(PROMPT, model="nothing")
    assert caught.value.code == "model_not_found"
    for ask in (client.wait, client.cancel):
        with pytest.raises(NotFound) as caught:
            await ask("nothing")
        assert caught.value.code == "generation_not_found"


async def test_a_failed_drawing_is_told_at_once(api: Api, client: AsyncClient) -> None:
    api.painter.fail_with = JobError("generation_failed", "it broke")
    with pytest.raises(ServerError, match="it broke"):
        await client.generate(PROMPT)
    assert len(api.painter.deliveries) == 1, "the service says that it would break again"


async def test_a_failure_that_may_pass_is_tried_again(api: Api, client: AsyncClient) -> None:
    api.painter.fail_with = JobError("worker_lost", "the worker went away", is_retryable=True)
    drawing = asyncio.create_task(client.generate(PROMPT))
    await until(lambda: len(api.painter.endings) == 1)
    api.painter.fail_with = None
    assert (await drawing).data


# Who it is


async def test_keys(start_api: StartApi, keys: Keys) -> None:
    key = keys.make(models=["mini-lcm"])
    async with start_api(api_keys_file=keys.path) as api:
        async with AsyncClient(api.url, key=key) as client:
            assert (await client.generate(PROMPT)).data
            with pytest.raises(Unauthorized) as caught:
                await client.generate(PROMPT, model="sd15-lcm")
            assert (caught.value.status, caught.value.code) == (403, "model_not_allowed")
        for wrong in ("fs_wrong", None):
            async with AsyncClient(api.url, key=wrong) as client:
                with pytest.raises(Unauthorized) as caught:
                    await client.generate(PROMPT)
                assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


async def test_a_live_token(start_api: StartApi, keys: Keys) -> None:
    key, page = keys.make(), "https://shop.example"
    async with start_api(api_keys_file=keys.path, has_worker=False) as api, AsyncClient(api.url, key=key) as client:
        token = await client.live_token(page, ttl_s=60, user="customer-17")
        assert (token.origin, token.expires_in_s, token.model) == (page, 60, "mini-lcm")
        assert 0 < token.expires_at - time.time() <= 60
        with pytest.raises(BadRequest, match="ttl_s") as caught:
            await client.live_token(page, ttl_s=10**6)
        assert caught.value.param == "ttl_s"


# Previews on the way


async def test_a_stream_gives_previews_and_then_the_pictures(api: Api, client: AsyncClient) -> None:
    items = [item async for item in client.stream(PROMPT, num_images=2, seed=5, num_inference_steps=6)]
    previews = [item for item in items if isinstance(item, Preview)]
    pictures = [item for item in items if isinstance(item, Picture)]
    assert items == [*previews, *pictures]
    assert [(picture.index, picture.seed) for picture in pictures] == [(0, 5), (1, 6)]
    assert [preview.step for preview in previews if preview.index == 0] == [1, 2, 3, 4, 5]
    assert {open_image(item.data).size for item in items} == {(64, 64)}
    assert len(api.painter.deliveries) == 1


async def test_a_stream_that_is_left_cancels_the_drawing(api: Api, client: AsyncClient) -> None:
    api.painter.step_s = 0.1
    async with aclosing(client.stream(PROMPT, num_inference_steps=20)) as items:
        async for item in items:
            assert isinstance(item, Preview)
            break
    await until(lambda: [ending.type for ending in api.painter.endings] == ["cancelled"])


async def test_a_stream_goes_on_where_the_network_broke(api: Api) -> None:
    async with through_proxy(api, b"event: started", b"event: completed") as (client, proxy):
        items = [item async for item in client.stream(PROMPT)]
        assert isinstance(items[-1], Picture)
        attempts = [request for request in proxy.asked if b"/events" in request]
        assert len(attempts) == 3
        assert [b"last-event-id" in request.lower() for request in attempts] == [False, True, True]
        assert len(api.painter.deliveries) == 1


# Later


async def test_submit_and_wait(client: AsyncClient) -> None:
    generation_id = await client.submit(PROMPT, num_images=3, seed=1)
    pictures = await client.wait(generation_id)
    assert [(picture.generation_id, picture.seed) for picture in pictures] == [
        (generation_id, seed) for seed in (1, 2, 3)
    ]
    assert await client.wait(generation_id) == pictures


async def test_cancel_ends_the_wait(api: Api, client: AsyncClient) -> None:
    api.painter.gate.clear()
    generation_id = await client.submit(PROMPT)
    with pytest.raises(TimeoutError):
        await client.wait(generation_id, timeout_s=0.1)
    assert await client.cancel(generation_id) in ("running", "cancelled")
    with pytest.raises(NotDrawn, match="cancelled") as caught:
        await client.wait(generation_id)
    assert (caught.value.generation_id, caught.value.state) == (generation_id, "cancelled")


async def test_a_generation_that_failed(api: Api, client: AsyncClient) -> None:
    api.painter.fail_with = JobError("out_of_memory", "it was too much")
    with pytest.raises(NotDrawn, match="it was too much") as caught:
        await client.wait(await client.submit(PROMPT))
    assert (caught.value.state, caught.value.code) == ("failed", "out_of_memory")


async def test_a_submit_whose_answer_was_lost_is_the_same_generation(api: Api) -> None:
    async with through_proxy(api, b"HTTP/1.1 202") as (client, proxy):
        await client.wait(await client.submit(PROMPT))
        assert len([request for request in proxy.asked if request.startswith(b"POST")]) == 2
        assert len(api.painter.deliveries) == 1


async def test_an_idempotency_key_of_ones_own(client: AsyncClient) -> None:
    one = await client.submit(PROMPT, idempotency_key="order-17")
    await client.wait(one)
    assert await client.submit(PROMPT, idempotency_key="order-17") == one
    with pytest.raises(BadRequest) as caught:
        await client.submit("another", idempotency_key="order-17")
    assert (caught.value.status, caught.value.code) == (409, "idempotency_key_reused")


# Trying again


async def test_a_full_queue_is_tried_again_after_the_time_that_the_service_names(start_api: StartApi) -> None:
    async with start_api(max_depth=1) as api, AsyncClient(api.url) as client:
        api.painter.gate.clear()
        running = await client.submit(PROMPT)
        await until(lambda: len(api.painter.deliveries) == 1)
        waiting = asyncio.create_task(client.submit("another"))
        await until_rejected(api)
        api.painter.gate.set()
        await client.wait(running)
        assert await client.wait(await waiting)


async def until_rejected(api: Api) -> None:
    async with asyncio.timeout(15):
        while 'fewstep_rejected_total{reason="queue_full"}' not in (await api.http.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_without_retries_it_says_when_to_come_back(start_api: StartApi) -> None:
    async with start_api(max_depth=1) as api, AsyncClient(api.url, max_retries=0) as client:
        api.painter.gate.clear()
        await client.submit(PROMPT)
        with pytest.raises(TooBusy) as caught:
            await client.submit("another")
        assert caught.value.code == "queue_full"
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s > 0


async def test_a_rate_whose_time_is_long_is_told_at_once(start_api: StartApi, keys: Keys) -> None:
    key = keys.make(max_requests_per_minute=1)
    async with start_api(api_keys_file=keys.path) as api, AsyncClient(api.url, key=key, max_retries=0) as client:
        await client.generate(PROMPT)
        with pytest.raises(TooBusy) as caught:
            await client.generate(PROMPT)
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.retry_after_s is not None
        assert 50 < caught.value.retry_after_s <= 60


async def test_a_service_that_comes_up_late(start_api: StartApi) -> None:
    port = free_port()
    async with AsyncClient(f"http://127.0.0.1:{port}") as client:
        drawing = asyncio.create_task(client.generate(PROMPT))
        await asyncio.sleep(0.2)
        async with start_api(port=port):
            assert (await drawing).data


async def test_nobody_there() -> None:
    async with AsyncClient(f"http://127.0.0.1:{free_port()}", max_retries=1) as client:
        with pytest.raises(Unreachable, match="POST /v1/generations: ConnectError") as caught:
            await client.generate(PROMPT)
        assert isinstance(caught.value.__cause__, httpx.ConnectError)


async def test_events_that_break_off_again_and_again(api: Api) -> None:
    async with (
        through_proxy(api, *[b"event: queued"] * 2) as (_, proxy),
        AsyncClient(proxy.url, max_retries=1) as client,
    ):
        with pytest.raises(Unreachable, match="break off again and again"):
            await client.wait(await client.submit(PROMPT))


# Pure


def answer(status: int, headers: dict[str, str] | None = None, content: bytes = b"") -> httpx.Response:
    return httpx.Response(status, headers=headers, content=content)


@pytest.mark.parametrize(
    ("headers", "retry_after_s"),
    [
        ({"retry-after-ms": "150", "Retry-After": "1"}, 0.15),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], retry_after_s: float | None) -> None:
    assert read_retry_after_s(httpx.Headers(headers)) == retry_after_s


@pytest.mark.parametrize(
    ("status", "headers", "is_tried"),
    [
        (408, {}, True),
        (429, {}, True),
        (503, {"retry-after-ms": "60000"}, True),
        (503, {"retry-after-ms": "60001"}, False),
        (500, {"x-should-retry": "false"}, False),
        (429, {"x-should-retry": "false"}, False),
        (409, {"x-should-retry": "true"}, True),
        (409, {}, False),
        (400, {}, False),
    ],
)
def test_what_is_tried_again(status: int, headers: dict[str, str], is_tried: bool) -> None:
    pause_s = choose_pause(answer(status, headers), failures=0)
    assert (pause_s is not None) == is_tried
    assert pause_s is None or pause_s >= (read_retry_after_s(httpx.Headers(headers)) or 0)


@pytest.mark.parametrize("content", [b"<html>bad gateway</html>", b"[]", b'{"error": null}', b'{"error": "text"}', b""])
def test_an_answer_of_something_in_between(content: bytes) -> None:
    error = read_error(answer(502, content=content))
    assert isinstance(error, ServerError)
    assert str(error).startswith("HTTP 502 Bad Gateway")
    assert (error.code, error.request_id) == (None, None)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, BadRequest), (403, Unauthorized), (410, NotFound), (409, BadRequest), (429, TooBusy), (504, ServerError)],
)
def test_kinds_of_errors(status: int, kind: type[ApiError]) -> None:
    assert error_class(status) is kind


@pytest.mark.parametrize("base_url", ["", "127.0.0.1:8000", "ws://example.org", "http://"])
def test_a_wrong_address_is_named(base_url: str) -> None:
    with pytest.raises(ValueError, match=f"base_url: '{base_url}' is not allowed"):
        AsyncClient(base_url)


def test_a_key_that_no_header_carries_is_not_shown() -> None:
    with pytest.raises(ValueError, match=r"^key: letters, digits") as caught:
        AsyncClient(key="fs_geheimniß")
    assert "geheim" not in str(caught.value)
