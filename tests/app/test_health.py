from __future__ import annotations

import re

import pytest

from broker.messages import ModelStatus
from tests.app.conftest import Api, StartApi

METRICS = {
    "fewstep_request_duration_seconds",
    "fewstep_queue_wait_seconds",
    "fewstep_first_preview_seconds",
    "fewstep_stage_seconds",
    "fewstep_generation_seconds",
    "fewstep_queue_depth",
    "fewstep_running_requests",
    "fewstep_warm_workers",
    "fewstep_outcomes_total",
    "fewstep_superseded_total",
    "fewstep_rejected_total",
    "fewstep_live_connections",
    "fewstep_live_frames_total",
    "fewstep_live_dropped_frames_total",
    "fewstep_live_ack_seconds",
    "fewstep_redis_up",
    "fewstep_gateway_process_resident_memory_bytes",
}


async def test_ready_and_not(start_api: StartApi) -> None:
    async with start_api(has_worker=False) as api:
        answer = await api.http.get("/readyz")
        assert answer.status_code == 503
        assert answer.json() == {"ready": False, "redis": "ok", "models": [], "failed": {}, "workers": []}
        assert (await api.http.get("/livez")).status_code == 200

        async with api.painter._broker:
            await api.painter.register("starting", "warming 64x64, batch 8")
            answer = await api.http.get("/readyz")
            [worker] = answer.json()["workers"]
            assert answer.status_code == 503
            assert (worker["state"], worker["detail"]) == ("starting", "warming 64x64, batch 8")
            await api.painter.register()
            answer = await api.http.get("/readyz")
            assert (answer.status_code, answer.json()["models"]) == (200, ["mini-lcm"])
            await api.painter.register(statuses=(ModelStatus("sd15-lcm", "failed", "no such folder"),))
            answer = await api.http.get("/readyz")
            assert (answer.status_code, answer.json()["models"]) == (200, ["mini-lcm"]), "others go on"
            assert answer.json()["failed"] == {"sd15-lcm": {api.painter.worker_id: "no such folder"}}
            assert answer.json()["workers"][0]["models"] == [
                {"model": "sd15-lcm", "state": "failed", "detail": "no such folder"}
            ]
            await api.painter.unregister()
            assert (await api.http.get("/readyz")).status_code == 503


@pytest.mark.parametrize(
    ("worker", "statuses", "state", "words"),
    [
        ("ready", (), "cold", "no worker has it in its FEWSTEP_MODELS"),
        ("ready", (ModelStatus("sd15-lcm", "waiting"),), "loading", "w has yet to load it"),
        ("ready", (ModelStatus("sd15-lcm", "loading", "loading"),), "loading", "w loads it"),
        ("ready", (ModelStatus("sd15-lcm", "warming", "64x64, batch 8"),), "loading", "w warms it"),
        ("starting", (ModelStatus("sd15-lcm", "warm"),), "loading", "w is about to serve it"),
        ("draining", (ModelStatus("sd15-lcm", "waiting"),), "cold", "w is ending"),
        ("draining", (ModelStatus("sd15-lcm", "warming"),), "cold", "w is ending"),
        ("draining", (ModelStatus("sd15-lcm", "warm"),), "cold", "w is ending"),
        (
            *("ready", (ModelStatus("sd15-lcm", "failed", "no such folder"),)),
            *("failed", "w failed to load it: no such folder"),
        ),
    ],
)
async def test_a_model_that_is_not_warm_is_refused_with_words(
    api: Api, worker: str, statuses: tuple[ModelStatus, ...], state: str, words: str
) -> None:
    await api.painter.register(worker, statuses=statuses)
    api.gateway.fleet._fresh_until = 0
    words = words.replace("w ", f"{api.painter.worker_id} ", 1) if words.startswith("w ") else words
    others = "mini-lcm" if worker == "ready" else "none"
    card = (await api.http.get("/v1/models/sd15-lcm")).json()
    assert (card["ready"], card["state"], card["state_detail"]) == (False, state, words)
    answer = await api.http.post("/v1/generations", json={"prompt": "a", "model": "sd15-lcm"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")
    assert answer.json()["error"]["message"] == f"no worker keeps sd15-lcm warm: {words}; warm now: {others}"
    assert int(answer.headers["retry-after-ms"]) > 0


async def test_models(api: Api) -> None:
    models = (await api.http.get("/v1/models")).json()
    assert (models["object"], models["default"]) == ("list", "mini-lcm")
    card = (await api.http.get("/v1/models/mini-lcm")).json()
    assert (card["guidance"], card["tested_with"]) == ("classifier-free", "published weights")
    assert card == models["data"][0]
    assert (card["ready"], card["state"]) == (True, "warm")
    assert api.painter.worker_id in card["state_detail"]
    assert card["num_inference_steps"] == {"default": 4, "min": 1, "max": 20}
    assert (card["sizes"], card["default_size"]) == (["64x64"], "64x64")
    schedulers = ["lcm", "ddim", "euler-ancestral", "dpm-solver", "tcd"]
    assert (card["schedulers"], card["default_scheduler"]) == (schedulers, "lcm")
    assert card["license"] == "Apache-2.0"
    assert card["example_prompts"]
    [worker] = card["workers"]
    [costs] = worker["sizes"]
    assert (costs["size"], costs["max_rows"], costs["step_ms"]) == ("64x64", 8, {"1": 10.0, "8": 40.0})
    assert models["data"][1]["ready"] is False


async def test_metrics(api: Api) -> None:
    body = {"prompt": "a red apple", "previews": True}
    await api.http.post("/v1/generations", json=body)
    await api.http.post("/v1/generations", json={"prompt": ""})
    answer = await api.http.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    text = answer.text
    names = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    assert names >= METRICS
    assert all(name.startswith("fewstep_") for name in names)
    for line in (
        'fewstep_outcomes_total{model="mini-lcm",outcome="completed"} 1.0',
        'fewstep_rejected_total{reason="invalid_value"} 1.0',
        'fewstep_queue_wait_seconds_count{model="mini-lcm"} 1.0',
        'fewstep_first_preview_seconds_count{model="mini-lcm"} 1.0',
        'fewstep_stage_seconds_count{model="mini-lcm",stage="denoise"} 1.0',
        'fewstep_request_duration_seconds_count{route="/v1/generations",status="200"} 1.0',
        'fewstep_request_duration_seconds_count{route="/v1/generations",status="400"} 1.0',
        'fewstep_warm_workers{model="mini-lcm"} 1.0',
        'fewstep_queue_depth{model="mini-lcm"} 0.0',
        "fewstep_redis_up 1.0",
    ):
        assert line in text
    assert 'le="0.001"' in text


async def test_the_page_and_its_policy(api: Api) -> None:
    for path, kind in [("/", "text/html"), ("/static/app.js", "text/javascript"), ("/static/style.css", "text/css")]:
        answer = await api.http.get(path)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"].startswith(kind)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert len(answer.headers["X-Request-Id"]) == 32


async def test_nothing_is_fetched_from_elsewhere(api: Api) -> None:
    assert (await api.http.get("/docs")).status_code == 404
    assert (await api.http.get("/openapi.json")).json()["info"]["title"] == "fewstep"
