from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Awaitable, Callable

import httpx
import pytest

from broker.messages import Cancelled, JobError
from tests.app.conftest import Api, StartApi
from tests.app.peers import color_of, open_image

APPLE = {"prompt": "a red apple", "seed": 7}
SERVER_TIMING = re.compile(r"(queue|text|denoise|decode|encode|total);dur=\d+\.\d+")


async def until(condition: Callable[[], bool], timeout_s: float = 15) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def until_state(api: Api, path: str, state: str) -> httpx.Response:
    async with asyncio.timeout(15):
        while (answer := await api.http.get(path)).json()["state"] != state:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return answer


async def test_json_is_the_default(api: Api) -> None:
    answer = await api.http.post("/v1/generations", json=APPLE)
    body = answer.json()
    assert answer.status_code == 200
    assert (body["state"], body["model"], body["model_revision"]) == ("completed", "mini-lcm", "1")
    assert body["id"] == answer.headers["X-Request-Id"]
    assert (body["parameters"]["seed"], body["parameters"]["scheduler"]) == (7, "lcm")
    assert body["timings"]["steps_ms"] == [2.0] * 4
    assert body["queue"] == {"position": 0, "predicted_start_ms": 0}
    assert "error" not in body
    [image] = body["images"]
    picture = open_image(base64.b64decode(image["b64_json"]))
    assert (picture.format, picture.size) == ("JPEG", (64, 64))
    assert image["url"] == f"/v1/generations/{body['id']}/images/0"


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
async def test_bytes_by_accept(api: Api, format: str) -> None:
    answer = await api.http.post("/v1/generations", json=APPLE, headers={"Accept": f"image/{format}"})
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == f"image/{format}"
    assert open_image(answer.content).format == format.upper()
    assert answer.headers["X-Fewstep-Seed"] == "7"
    assert answer.headers["X-Fewstep-Model"] == "mini-lcm"
    assert answer.headers["X-Fewstep-Model-Revision"] == "1"
    assert len(SERVER_TIMING.findall(answer.headers["Server-Timing"])) == 6


async def test_bytes_by_output_format(api: Api) -> None:
    answer = await api.http.post("/v1/generations", json={**APPLE, "output_format": "png"})
    assert answer.headers["Content-Type"] == "image/png"
    assert open_image(answer.content).getpixel((0, 0)) == (7, 11, 4)


async def test_accept_wins_over_output_format(api: Api) -> None:
    body = {**APPLE, "output_format": "png"}
    answer = await api.http.post("/v1/generations", json=body, headers={"Accept": "image/webp"})
    assert answer.headers["Content-Type"] == "image/webp"
    answer = await api.http.post("/v1/generations", json=body, headers={"Accept": "application/json"})
    assert answer.json()["images"][0]["format"] == "png"


async def test_several_pictures(api: Api) -> None:
    body = {**APPLE, "num_images": 3, "output_format": "png"}
    answer = await api.http.post("/v1/generations", json=body)
    images = answer.json()["images"]
    assert [image["seed"] for image in images] == [7, 8, 9]
    params = api.painter.deliveries[0].job.params
    for image in images:
        inline = open_image(base64.b64decode(image["b64_json"])).getpixel((0, 0))
        linked = await api.http.get(image["url"])
        assert linked.headers["X-Fewstep-Seed"] == str(image["seed"])
        assert inline == open_image(linked.content).getpixel((0, 0)) == color_of(params, image["index"])
    refused = await api.http.post("/v1/generations", json=body, headers={"Accept": "image/png"})
    assert refused.status_code == 406
    assert "holds one picture and 3 are asked for" in refused.json()["error"]["message"]


async def test_async_and_poll(api: Api) -> None:
    api.painter.gate.clear()
    answer = await api.http.post("/v1/generations", json=APPLE, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202
    assert answer.headers["Preference-Applied"] == "respond-async"
    location = answer.headers["Location"]
    assert answer.json()["state"] == "queued"
    assert location == f"/v1/generations/{answer.json()['id']}"

    await until_state(api, location, "running")
    early = await api.http.get(f"{location}/image")
    assert (early.status_code, early.json()["error"]["code"]) == (404, "image_not_ready")
    assert "retry-after-ms" in early.headers

    api.painter.gate.set()
    done = await until_state(api, location, "completed")
    assert "b64_json" not in done.json()["images"][0]
    assert "Server-Timing" in done.headers
    image = await api.http.get(f"{location}/image")
    assert image.headers["Content-Type"] == "image/jpeg"
    assert "immutable" in image.headers["Cache-Control"]
    missing = await api.http.get(f"{location}/images/1")
    assert (missing.status_code, missing.json()["error"]["message"]) == (
        404,
        "there is no image 1: the generation has 1",
    )


async def test_a_short_wait_becomes_202(api: Api) -> None:
    api.painter.gate.clear()
    answer = await api.http.post("/v1/generations", json=APPLE, headers={"Prefer": "wait=0"})
    assert answer.status_code == 202
    assert answer.json()["queue"] == {"position": 0, "predicted_start_ms": 0}
    api.painter.gate.set()
    await until_state(api, answer.headers["Location"], "completed")


async def test_async_with_a_wait_may_answer_at_once(api: Api) -> None:
    answer = await api.http.post("/v1/generations", json=APPLE, headers={"Prefer": "respond-async, wait=5"})
    assert (answer.status_code, answer.json()["state"]) == (200, "completed")


async def test_the_synchronous_wait_is_capped(start_api: StartApi) -> None:
    async with start_api(sync_wait_s=0.05) as api:
        api.painter.gate.clear()
        answer = await api.http.post("/v1/generations", json=APPLE, headers={"Prefer": "wait=30"})
        assert answer.status_code == 202


async def test_cancel_is_idempotent(api: Api) -> None:
    api.painter.gate.clear()
    created = await api.http.post("/v1/generations", json=APPLE, headers={"Prefer": "respond-async"})
    location = created.headers["Location"]
    assert (await api.http.delete(location)).status_code == 200
    await until_state(api, location, "cancelled")
    again = await api.http.delete(location)
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")
    assert again.json()["error"]["code"] == "cancelled"
    image = await api.http.get(f"{location}/image")
    assert (image.status_code, image.headers["x-should-retry"]) == (409, "false")


async def test_what_has_completed_stays_so(api: Api) -> None:
    done = await api.http.post("/v1/generations", json=APPLE)
    after = await api.http.delete(f"/v1/generations/{done.json()['id']}")
    assert after.json()["state"] == "completed"


async def test_a_waiting_caller_hears_of_the_cancel(api: Api) -> None:
    api.painter.gate.clear()
    waiting = asyncio.create_task(api.http.post("/v1/generations", json=APPLE))
    await until(lambda: bool(api.painter.deliveries))
    await api.http.delete(f"/v1/generations/{api.painter.deliveries[0].job.request_id}")
    answer = await waiting
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cancelled")
    assert answer.headers["x-should-retry"] == "false"


async def leave(api: Api, request: Awaitable[httpx.Response]) -> None:
    """Starts a request, waits until a worker has it, and closes the connection."""
    task = asyncio.ensure_future(request)
    await until(lambda: bool(api.painter.deliveries))
    task.cancel()
    await asyncio.wait((task,))


async def test_a_client_that_goes_away_cancels_its_request(api: Api) -> None:
    api.painter.gate.clear()
    await leave(api, api.http.post("/v1/generations", json=APPLE))
    await until(lambda: bool(api.painter.endings))
    assert isinstance(api.painter.endings[0], Cancelled)
    metrics = (await api.http.get("/metrics")).text
    assert 'fewstep_request_duration_seconds_count{route="/v1/generations",status="499"} 1.0' in metrics


async def test_an_async_one_goes_on(api: Api) -> None:
    api.painter.gate.clear()
    await leave(api, api.http.post("/v1/generations", json=APPLE, headers={"Prefer": "respond-async, wait=10"}))
    await asyncio.sleep(0.05)
    api.painter.gate.set()
    await until(lambda: bool(api.painter.endings))
    assert api.painter.endings[0].type == "completed"


async def test_warnings(api: Api) -> None:
    answer = await api.http.post("/v1/generations", json={**APPLE, "negative_prompt": "blurry"})
    assert answer.json()["warnings"] == ["negative_prompt has no effect: guidance_scale is 0 and must be above 1"]


async def test_a_failure_tells_its_reason(api: Api) -> None:
    api.painter.fail_with = JobError("nan_latents", "the picture came out as noise")
    answer = await api.http.post("/v1/generations", json=APPLE)
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "the picture came out as noise",
        "type": "server_error",
        "param": None,
        "code": "nan_latents",
    }
    state = (await api.http.get(f"/v1/generations/{answer.headers['X-Request-Id']}")).json()
    assert (state["state"], state["error"]["code"]) == ("failed", "nan_latents")


async def test_unknown_generations(api: Api) -> None:
    for method, path in [("GET", ""), ("GET", "/image"), ("GET", "/images/0"), ("GET", "/events"), ("DELETE", "")]:
        answer = await api.http.request(method, f"/v1/generations/{'0' * 32}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "generation_not_found")


async def test_pictures_are_kept_for_their_time(start_api: StartApi) -> None:
    async with start_api(keep_sync_s=0) as api:
        done = (await api.http.post("/v1/generations", json=APPLE)).json()
        gone = await api.http.get(done["images"][0]["url"])
        assert gone.status_code in (404, 410)


async def test_queue_full_says_when_to_come_back(start_api: StartApi) -> None:
    async with start_api(max_depth=2) as api:
        api.painter.gate.clear()
        for _ in range(2):
            await api.http.post("/v1/generations", json=APPLE, headers={"Prefer": "respond-async"})
        answer = await api.http.post("/v1/generations", json=APPLE)
        assert answer.status_code == 429
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert "2 unfinished requests" in error["message"]
        assert 10 <= int(answer.headers["retry-after-ms"]) <= 60_000
        assert int(answer.headers["Retry-After"]) >= 1
        metrics = (await api.http.get("/metrics")).text
        assert 'fewstep_rejected_total{reason="queue_full"} 1.0' in metrics
        assert 'fewstep_running_requests{model="mini-lcm"} 2.0' in metrics
        api.painter.gate.set()


async def test_no_warm_worker_is_503(start_api: StartApi) -> None:
    async with start_api(has_worker=False) as api:
        answer = await api.http.post("/v1/generations", json=APPLE)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_not_ready"
        assert "no worker is running" in answer.json()["error"]["message"]
        assert (answer.headers["Retry-After"], answer.headers["retry-after-ms"]) == ("5", "5000")


async def test_a_model_that_no_worker_holds(api: Api) -> None:
    answer = await api.http.post("/v1/generations", json={**APPLE, "model": "sd15-lcm"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")


async def test_two_gateways_share_a_queue(start_api: StartApi) -> None:
    async with start_api() as first, start_api(has_worker=False, prefix=first.settings.redis_prefix) as second:
        done = (await first.http.post("/v1/generations", json=APPLE)).json()
        seen = (await second.http.get(f"/v1/generations/{done['id']}")).json()
        assert seen["state"] == "completed"
        assert seen["images"][0]["url"] == done["images"][0]["url"]
        assert (await second.http.get(seen["images"][0]["url"])).status_code == 200


async def test_many_at_once(api: Api) -> None:
    prompts = ["x" * length for length in range(1, 41)]
    body = {"output_format": "png", "seed": 7}
    answers = await asyncio.gather(*(api.http.post("/v1/generations", json={**body, "prompt": p}) for p in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert open_image(answer.content).getpixel((0, 0)) == (7, len(prompt), 4)


async def test_the_trace_context_travels(api: Api) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    await api.http.post("/v1/generations", json=APPLE, headers={"traceparent": trace})
    await api.http.post("/v1/generations", json=APPLE, headers={"traceparent": "nonsense"})
    assert [delivery.job.traceparent for delivery in api.painter.deliveries] == [trace, None]


async def test_the_json_is_everywhere_the_same(api: Api) -> None:
    created = await api.http.post("/v1/generations", json=APPLE, headers={"Prefer": "respond-async"})
    location = created.headers["Location"]
    polled = await until_state(api, location, "completed")
    deleted = await api.http.delete(location)
    synchronous = await api.http.post("/v1/generations", json=APPLE)
    bodies = [json.loads(answer.text) for answer in (created, polled, deleted, synchronous)]
    assert len({tuple(body) for body in bodies}) == 1
