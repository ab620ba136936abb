"""OpenAI's contract, through the official client as it is."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from app.routes.openai_images import PartialPicker
from broker.messages import Cancelled, JobError
from models.catalog import load_catalog
from tests.app.conftest import Api, StartApi
from tests.app.peers import open_image
from tests.app.test_generations import until


@pytest.fixture
async def client(api: Api) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key="unused", base_url=f"{api.url}/v1", max_retries=0) as client:
        yield client


def decode(b64_json: str | None) -> Any:
    assert b64_json is not None
    return open_image(base64.b64decode(b64_json))


async def test_one_picture(client: AsyncOpenAI) -> None:
    result = await client.images.generate(prompt="a red apple", extra_body={"seed": 7})
    assert result.data is not None
    picture = decode(result.data[0].b64_json)
    assert (picture.format, picture.size) == ("PNG", (64, 64))
    assert picture.getpixel((0, 0)) == (7, 11, 4)
    assert (result.size, result.output_format, result.background) == ("64x64", "png", "opaque")
    assert result.created > 1_600_000_000


async def test_the_synchronous_client(api: Api) -> None:
    def draw() -> Any:
        with OpenAI(api_key="unused", base_url=f"{api.url}/v1", max_retries=0) as client:
            return client.images.generate(prompt="a red apple", model="mini-lcm", n=2, size="64x64")

    result = await asyncio.to_thread(draw)
    assert [decode(item.b64_json).size for item in result.data] == [(64, 64)] * 2
    assert result.data[1].seed == result.data[0].seed + 1


async def test_every_field_of_openai_is_accepted(client: AsyncOpenAI) -> None:
    result = await client.images.generate(
        prompt="a red apple",
        model="mini-lcm",
        n=1,
        size="auto",
        quality="high",
        background="auto",
        output_format="webp",
        output_compression=60,
        moderation="low",
        response_format="b64_json",
        style="vivid",
        user="someone",
        partial_images=0,
        stream=False,
        extra_body={"safety_identifier": "abc"},
    )
    assert result.data is not None
    assert decode(result.data[0].b64_json).format == "WEBP"
    assert result.quality == "high"


async def test_our_parameters_by_extra_body(api: Api, client: AsyncOpenAI) -> None:
    extra = {
        "seed": 9,
        "num_inference_steps": 2,
        "guidance_scale": 1.5,
        "negative_prompt": "blurry",
        "scheduler": "ddim",
    }
    await client.images.generate(prompt="a red apple", extra_body=extra)
    params = api.painter.deliveries[0].job.params
    assert {name: getattr(params, name) for name in extra} == extra


async def test_the_request_id_is_the_generation(api: Api, client: AsyncOpenAI) -> None:
    raw = await client.images.with_raw_response.generate(prompt="a red apple")
    assert raw.headers["server-timing"].startswith("queue;dur=")
    assert raw.headers["x-request-id"] == api.painter.deliveries[0].job.request_id


async def test_error_classes(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.images.generate(prompt="a red apple", size="1024x1024")
    assert (bad.value.code, bad.value.param, bad.value.type) == ("unsupported_size", "size", "invalid_request_error")
    assert bad.value.request_id is not None
    with pytest.raises(openai.NotFoundError) as missing:
        await client.images.generate(prompt="a red apple", model="dall-e-3")
    assert missing.value.code == "model_not_found"


async def test_failures(api: Api, client: AsyncOpenAI) -> None:
    api.painter.fail_with = JobError("nan_latents", "the picture came out as noise")
    with pytest.raises(openai.InternalServerError, match="came out as noise") as failed:
        await client.with_options(max_retries=2).images.generate(prompt="a red apple")
    assert failed.value.code == "nan_latents"
    assert len(api.painter.deliveries) == 1, "x-should-retry: false keeps the client from trying again"


async def test_a_retryable_failure_is_tried_again(api: Api, client: AsyncOpenAI) -> None:
    api.painter.fail_with = JobError("worker_lost", "its worker went away", is_retryable=True)
    trying = asyncio.create_task(client.with_options(max_retries=1).images.generate(prompt="a red apple"))
    await until(lambda: bool(api.painter.endings))
    api.painter.fail_with = None
    result = await trying
    assert result.data is not None
    assert len(api.painter.deliveries) == 2


async def test_overload(start_api: StartApi) -> None:
    async with start_api(max_depth=1) as api, AsyncOpenAI(api_key="x", base_url=f"{api.url}/v1") as client:
        api.painter.gate.clear()
        first = asyncio.create_task(client.images.generate(prompt="a red apple"))
        await until(lambda: bool(api.painter.deliveries))
        with pytest.raises(openai.RateLimitError) as full:
            await client.with_options(max_retries=0).images.generate(prompt="a red apple")
        assert full.value.code == "queue_full"
        assert "retry-after-ms" in full.value.response.headers
        api.painter.gate.set()
        await first


async def test_not_ready(start_api: StartApi) -> None:
    async with start_api(has_worker=False) as api, AsyncOpenAI(api_key="x", base_url=f"{api.url}/v1") as client:
        with pytest.raises(openai.InternalServerError) as not_ready:
            await client.with_options(max_retries=0).images.generate(prompt="a red apple")
        assert (not_ready.value.status_code, not_ready.value.code) == (503, "model_not_ready")


async def test_a_client_that_goes_away_cancels(api: Api, client: AsyncOpenAI) -> None:
    api.painter.gate.clear()
    drawing = asyncio.create_task(client.images.generate(prompt="a red apple"))
    await until(lambda: bool(api.painter.deliveries))
    drawing.cancel()
    await until(lambda: bool(api.painter.endings))
    assert isinstance(api.painter.endings[0], Cancelled)


async def test_a_client_that_times_out_cancels(api: Api, client: AsyncOpenAI) -> None:
    api.painter.gate.clear()
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.3, max_retries=0).images.generate(prompt="a red apple")
    await until(lambda: bool(api.painter.endings))
    assert isinstance(api.painter.endings[0], Cancelled)


async def test_the_synchronous_client_streams(api: Api) -> None:
    def draw() -> list[str]:
        with OpenAI(api_key="unused", base_url=f"{api.url}/v1", max_retries=0) as client:
            stream = client.images.generate(prompt="a red apple", stream=True, partial_images=2)
            return [event.type for event in stream]

    types = await asyncio.to_thread(draw)
    assert types == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


async def test_a_wait_that_is_too_long_ends(start_api: StartApi) -> None:
    async with start_api(sync_wait_s=0.1) as api, AsyncOpenAI(api_key="x", base_url=f"{api.url}/v1") as client:
        api.painter.gate.clear()
        with pytest.raises(openai.InternalServerError) as late:
            await client.with_options(max_retries=2).images.generate(prompt="a red apple")
        assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        await until(lambda: bool(api.painter.endings))


async def test_models_as_openai_lists_them(client: AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == list(load_catalog())
    model = await client.models.retrieve("mini-lcm")
    assert (model.object, model.owned_by) == ("model", "fewstep")


# Streaming


async def test_a_stream_has_real_previews_and_the_picture(api: Api, client: AsyncOpenAI) -> None:
    api.painter.step_s = 0.02
    stream = await client.images.generate(
        prompt="a red apple", stream=True, partial_images=2, output_format="png", extra_body={"seed": 7}
    )
    events = [event async for event in stream]
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    assert decode(events[0].b64_json).getpixel((0, 0)) == (2, 2, 2)
    assert (events[0].output_format, events[-1].output_format) == ("jpeg", "png")
    assert decode(events[-1].b64_json).getpixel((0, 0)) == (7, 11, 4)
    assert events[-1].size == "64x64"


async def test_a_stream_on_the_wire(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.routes.openai_images.KEEP_ALIVE_S", 0.02)
    api.painter.gate.clear()
    asyncio.get_running_loop().call_later(0.1, api.painter.gate.set)
    answer = await api.http.post("/v1/images/generations", json={"prompt": "x", "stream": True, "partial_images": 1})
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    lines = [line.partition(":")[0] for line in answer.text.splitlines() if line]
    assert set(lines) == {"", "event", "data"}, "no id: and no retry: lines, comments keep the connection alive"
    assert answer.text.count("event: image_generation.completed") == 1


async def test_the_client_reads_over_keep_alives(
    api: Api, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.routes.openai_images.KEEP_ALIVE_S", 0.01)
    api.painter.step_s = 0.05
    stream = await client.images.generate(prompt="a red apple", stream=True, partial_images=3)
    assert [event.type async for event in stream][-1] == "image_generation.completed"


async def test_a_failure_in_mid_stream_is_raised(api: Api, client: AsyncOpenAI) -> None:
    api.painter.fail_with = JobError("nan_latents", "the picture came out as noise")
    stream = await client.images.generate(prompt="a red apple", stream=True)
    with pytest.raises(openai.APIError, match="came out as noise") as failed:
        async for _ in stream:
            pass
    assert failed.value.code == "nan_latents"


async def test_a_stream_that_is_refused_has_a_status(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        await client.images.generate(prompt="", stream=True)


async def test_leaving_a_stream_cancels(api: Api) -> None:
    api.painter.gate.clear()
    async with api.http.stream("POST", "/v1/images/generations", json={"prompt": "x", "stream": True}):
        await until(lambda: bool(api.painter.deliveries))
    await until(lambda: bool(api.painter.endings))
    assert isinstance(api.painter.endings[0], Cancelled)


@pytest.mark.parametrize(
    ("num_partials", "num_steps", "expected"),
    [(0, 4, []), (1, 4, [2]), (2, 4, [2, 3]), (3, 4, [1, 2, 3]), (3, 2, [1]), (2, 9, [3, 6])],
)
def test_partials_are_spread_over_the_steps(num_partials: int, num_steps: int, expected: list[int]) -> None:
    picker = PartialPicker(num_partials, num_steps)
    assert [step for step in range(1, num_steps) if picker.pick(step) is not None] == expected


@pytest.mark.parametrize(
    ("quality", "steps"),
    [
        (None, 4),
        ("auto", 4),
        ("low", 2),
        ("medium", 4),
        ("standard", 4),
        ("high", 8),
        ("hd", 8),
        ("xhigh", 12),
        ("max", 20),
    ],
)
async def test_quality_is_steps(api: Api, client: AsyncOpenAI, quality: Any, steps: int) -> None:
    await client.images.generate(prompt="a red apple", quality=quality)
    assert api.painter.deliveries[-1].job.params.num_inference_steps == steps


async def test_steps_win_over_quality(api: Api, client: AsyncOpenAI) -> None:
    await client.images.generate(prompt="a red apple", quality="max", extra_body={"num_inference_steps": 1})
    assert api.painter.deliveries[-1].job.params.num_inference_steps == 1
