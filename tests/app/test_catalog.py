"""The catalog of a running gateway is read again: what requests, sessions and the OpenAPI document see."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from app.live.protocol import SUBPROTOCOL
from models.catalog import ModelSpec, StepRange, StyleLora, load_catalog
from tests.app.conftest import Api, StartApi
from tests.small_models import write_catalog

SHIPPED = load_catalog()["mini-lcm"]


def with_steps(most: int, **changes: Any) -> ModelSpec:
    return SHIPPED.model_copy(update={"num_inference_steps": StepRange(default=4, min=1, max=most)} | changes)


@pytest.fixture
def extra(tmp_path: Path) -> Path:
    return write_catalog(tmp_path / "extra.toml", [with_steps(8)])


@pytest.fixture
async def api(start_api: StartApi, extra: Path) -> AsyncIterator[Api]:
    async with start_api(extra_catalog=extra) as api:
        yield api


def rewrite(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def draw(api: Api, **fields: Any) -> int:
    return (await api.http.post("/v1/generations", json={"prompt": "a", **fields})).status_code


async def test_new_limits_and_entries_count_from_the_next_request_on(api: Api, extra: Path) -> None:
    assert await draw(api, num_inference_steps=9) == 400
    write_catalog(extra, [with_steps(9), SHIPPED.model_copy(update={"name": "another"})])
    api.server.handle_hangup()
    assert await draw(api, num_inference_steps=9) == 200
    assert await draw(api, num_inference_steps=10) == 400
    assert await draw(api, model="another") == 503, "no worker has it yet"
    card = (await api.http.get("/v1/models/another")).json()
    assert (card["state"], card["state_detail"]) == ("cold", "no worker has it in its FEWSTEP_MODELS")
    assert 'fewstep_queue_depth{model="another"} 0.0' in (await api.http.get("/metrics")).text


async def test_the_document_follows(api: Api, extra: Path) -> None:
    async def fields() -> dict[str, Any]:
        document = (await api.http.get("/openapi.json")).json()
        properties: dict[str, Any] = document["components"]["schemas"]["GenerationRequest"]["properties"]
        return properties

    assert "another" not in str((await fields())["model"])
    write_catalog(extra, [SHIPPED.model_copy(update={"name": "another"})])
    api.server.handle_hangup()
    assert "another" in str((await fields())["model"])


async def test_a_style_lora_is_known_without_a_restart(api: Api, extra: Path) -> None:
    lora = StyleLora(name="ink", description="ink drawings", source="nobody/ink", models=["mini-lcm"], license="MIT")
    write_catalog(extra, [with_steps(8, loras={"ink": lora})])
    api.server.handle_hangup()
    card = (await api.http.get("/v1/models/mini-lcm")).json()
    assert "ink" in [lora["name"] for lora in card["loras"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[mini-lcm\n", "extra.toml: "),
        ("[mini-lcm]\nfamily = 3\n", "[mini-lcm] "),
        ("", None),
    ],
)
async def test_a_broken_file_changes_nothing_and_is_told_in_one_line(
    api: Api, extra: Path, caplog: pytest.LogCaptureFixture, text: str, words: str | None
) -> None:
    rewrite(extra, text)
    with caplog.at_level(logging.INFO, "app.catalog"):
        api.server.handle_hangup()
    [record] = [record for record in caplog.records if record.name == "app.catalog"]
    if words is None:
        assert record.getMessage() == "the catalog was read again, changed: mini-lcm"
        assert await draw(api, num_inference_steps=9) == 200, "the shipped entry again"
        return
    assert record.getMessage().startswith("the catalog stays as it was: ")
    assert words in record.getMessage()
    assert "\n" not in record.getMessage()
    assert (await draw(api, num_inference_steps=8), await draw(api, num_inference_steps=9)) == (200, 400)


async def test_the_default_model_must_stay(start_api: StartApi, extra: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_catalog(extra, [SHIPPED.model_copy(update={"name": "mine"})])
    async with start_api(extra_catalog=extra, default_model="mine", has_worker=False) as api:
        rewrite(extra, "")
        api.server.handle_hangup()
        assert "mine" in api.gateway.catalog
    assert "the catalog stays as it was: FEWSTEP_DEFAULT_MODEL='mine': unknown model" in caplog.text


async def test_open_sessions_and_running_requests_go_on(api: Api, extra: Path) -> None:
    """Even where their model is gone: what runs is drawn, new words are refused."""
    write_catalog(extra, [SHIPPED.model_copy(update={"name": "mine"})])
    api.server.handle_hangup()
    api.painter.gate.clear()
    await api.painter.unregister()
    api.painter.model = "mine"
    await api.painter.register()
    api.gateway.fleet._fresh_until = 0
    async with api.connect(subprotocols=[SUBPROTOCOL]) as socket:
        await socket.recv()
        await socket.send(json.dumps({"type": "generate", "seq": 1, "prompt": "a", "model": "mine"}))
        await until(lambda: any(delivery.job.model == "mine" for delivery in api.painter.deliveries))
        rewrite(extra, "")
        api.server.handle_hangup()
        api.painter.gate.set()
        kinds: list[Any] = []
        while not kinds or not isinstance(kinds[-1], bytes):
            kinds.append(await asyncio.wait_for(socket.recv(), 10))
        await socket.send(json.dumps({"type": "generate", "seq": 2, "prompt": "b", "model": "mine"}))
        while "model_not_found" not in str(answer := await asyncio.wait_for(socket.recv(), 10)):
            assert answer


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals come to the main thread")
async def test_a_sighup_is_the_order_to_read_it_again(api: Api, extra: Path) -> None:
    write_catalog(extra, [with_steps(9)])
    os.kill(os.getpid(), signal.SIGHUP)
    await until(lambda: api.gateway.catalog.version == 2)
    assert await draw(api, num_inference_steps=9) == 200


async def test_a_sighup_with_the_terminals_end_ends_it(api: Api) -> None:
    api.server.has_hung_up = lambda: True
    api.server.handle_hangup()
    assert api.server.should_exit
    assert api.gateway.catalog.version == 1
