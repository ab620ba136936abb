"""What is drawn is checked before it leaves: a real worker and a real gateway, models with a safety checker that blocks
nothing ("open") or everything ("shut")."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI

from tests.app.conftest import Api, StartApi, start_api
from tests.app.live.test_session import go_live
from tests.app.peers import open_image
from tests.small_models import make_safety_folder, small_spec, write_catalog
from workers.settings import WorkerSettings
from workers.worker import Worker

__all__ = ["start_api"]  # a fixture
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("content policy")]
APPLE = {"prompt": "a red apple", "seed": 7}


@dataclass(frozen=True)
class Both:
    api: Api
    worker: Worker


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(start_api: StartApi, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Both]:
    root: Path = tmp_path_factory.mktemp("checked")
    for name, threshold in (("open", 2.0), ("shut", -2.0)):
        make_safety_folder(root / name, threshold)
    specs = [
        small_spec(root, name=name, max_batch_size=8, safety_checker=str(root / name)) for name in ("open", "shut")
    ]
    catalog, prefix = write_catalog(root / "catalog.toml", specs), f"test-{uuid.uuid4().hex}"
    worker = Worker(WorkerSettings(redis_url=redis_url, redis_prefix=prefix, catalog=catalog, models="open,shut"))
    async with (
        asyncio.timeout(60),
        asyncio.TaskGroup() as tasks,
        start_api(has_worker=False, prefix=prefix, catalog=catalog, default_model="open") as api,
    ):
        tasks.create_task(worker.serve())
        while not (await api.http.get("/v1/models/shut")).json()["ready"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        yield Both(api, worker)
        worker.request_stop()


@pytest.fixture
def api(both: Both) -> Api:
    return both.api


@pytest_asyncio.fixture(loop_scope="module")
async def client(api: Api) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key="unused", base_url=f"{api.url}/v1", max_retries=0) as client:
        yield client


async def test_a_picture_that_passes(api: Api) -> None:
    answer = await api.http.post("/v1/generations", json={**APPLE, "previews": True})
    done = answer.json()
    assert done["state"] == "completed"
    assert done["timings"]["check_ms"] > 0
    assert f"check;dur={done['timings']['check_ms']:.3f}" in answer.headers["server-timing"]
    stages = sum(done["timings"][f"{s}_ms"] for s in ("queue", "text", "denoise", "decode", "check", "encode"))
    assert stages <= done["timings"]["total_ms"] + 1
    assert done["warnings"] == [
        "previews has no effect: a safety checker judges the pictures of open when they are finished"
    ]
    events = (await api.http.get(f"/v1/generations/{done['id']}/events")).text
    assert [line for line in events.splitlines() if line.startswith("event:")] == [
        "event: queued",
        "event: started",
        "event: completed",
    ]


@pytest.mark.parametrize("num_images", [1, 2])
async def test_a_blocked_picture_ends_the_request_without_any(api: Api, num_images: int) -> None:
    body = {**APPLE, "model": "shut", "previews": True, "num_images": num_images}
    answer = await api.http.post("/v1/generations", json=body)
    error = answer.json()["error"]
    what = "the picture" if num_images == 1 else "2 of 2 pictures, so none is shown"
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["code"] == "content_policy_violation"
    assert error["message"] == f"the model's safety checker blocked {what}; another seed or other words may pass"

    created = await api.http.post("/v1/generations", json=body, headers={"Prefer": "respond-async"})
    location = created.headers["location"]
    events = (await api.http.get(f"{location}/events")).text
    assert "event: failed" in events
    assert "event: preview" not in events
    assert "b64_json" not in events
    seen = (await api.http.get(location)).json()
    assert (seen["state"], seen["images"], seen["error"]["code"]) == ("failed", [], "content_policy_violation")
    assert (await api.http.get(f"{location}/image")).status_code == 400


async def test_the_official_client(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="safety checker blocked") as blocked:
        await client.images.generate(model="shut", prompt="a red apple")
    assert blocked.value.code == "content_policy_violation"
    passed = await client.images.generate(model="open", prompt="a red apple")
    assert passed.data


async def test_a_stream_of_the_official_client_has_no_partial_images(client: AsyncOpenAI) -> None:
    wish: Any = {"prompt": "a red apple", "stream": True, "partial_images": 3}
    stream: Any = await client.images.generate(model="open", **wish)
    assert [event.type async for event in stream] == ["image_generation.completed"]
    stream = await client.images.generate(model="shut", **wish)
    with pytest.raises(openai.APIError, match="safety checker blocked") as blocked:
        async for event in stream:
            raise AssertionError(f"{event.type} came through")
    assert blocked.value.code == "content_policy_violation"


async def test_a_live_session_refines_what_passes_and_is_told_what_does_not(api: Api) -> None:
    refine = {"after_ms": 1, "num_inference_steps": 8, "decoder": "full"}
    async with go_live(api) as live:
        await live.generate(1, num_inference_steps=2, refine=refine)
        assert (await live.until_message("queued"))["warnings"] == []
        quick = await live.until_final(1)
        refined = await live.until_final(1, refined=True)
        assert open_image(refined.data).size == (32, 32)
        assert quick.header["timings"]["check_ms"] > 0
        assert [frame.header["type"] for frame in live.frames] == ["final", "final"]

        await live.generate(2, model="shut", refine=refine, previews=True)
        assert "previews has no effect" in (await live.until_message("queued"))["warnings"][0]
        message = await live.until_message("error")
        assert (message["seq"], message["error"]["code"]) == (2, "content_policy_violation")
        assert "retry_after_ms" not in message
        assert await live.hears_nothing(), "what is blocked is not refined"

        await live.generate(3)
        await live.until_final(3)
        assert len(live.frames) == 3


async def test_the_check_is_measured(both: Both) -> None:
    await both.api.http.post("/v1/generations", json=APPLE)
    await both.api.http.post("/v1/generations", json={**APPLE, "model": "shut"})
    card = (await both.api.http.get("/v1/models/shut")).json()
    assert card["has_safety_checker"]
    assert list(card["workers"][0]["sizes"][0]["check_ms"]) == ["1", "2", "4", "8"]
    gateway = (await both.api.http.get("/metrics")).text
    assert 'fewstep_stage_seconds_count{model="open",stage="check"}' in gateway
    assert 'fewstep_outcomes_total{model="shut",outcome="failed"}' in gateway
    assert 'fewstep_rejected_total{reason="content_policy_violation"}' not in gateway, "it was not refused at the door"
    registry = both.worker.metrics.registry
    assert registry.get_sample_value("fewstep_blocked_requests_total", {"model": "shut"})
    assert registry.get_sample_value("fewstep_blocked_requests_total", {"model": "open"}) is None
    assert registry.get_sample_value("fewstep_check_seconds_count", {"rows": "1"})
