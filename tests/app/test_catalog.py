"""The catalog of a running gateway is read again: what requests, sessions and the OpenAPI document see."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.live.protocol import SUBPROTOCOL
from app.live.session import LiveSession
from broker.messages import ModelStatus
from models.catalog import ModelSpec, StepRange, StyleLora, load_catalog
from tests.app.conftest import Api, StartApi
from tests.app.keys import Keys
from tests.app.live.test_access import PAGE, is_refused, make_token, with_credential
from tests.app.live.test_session import closed, go_live
from tests.app.test_generations import until
from tests.small_models import write_catalog

SHIPPED = load_catalog()["mini-lcm"]
INK = StyleLora(name="ink", description="ink drawings", source="nobody/ink", models=["mini-lcm"], license="MIT")


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
    write_catalog(extra, [with_steps(8, loras={"ink": INK})])
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


@pytest.mark.parametrize(
    ("rewritten", "param"),
    [
        (with_steps(4, loras={"ink": INK}), "refine.num_inference_steps"),
        (with_steps(8, sizes=[(64, 96)], warm_sizes=[(64, 96)]), "height"),
        (with_steps(8, schedulers={"lcm": SHIPPED.schedulers["lcm"]}), "scheduler"),
        (with_steps(8, loras={}), "loras.0.name"),
        (None, "model"),
    ],
)
async def test_the_better_picture_goes_by_the_catalog_of_its_time(
    start_api: StartApi, tmp_path: Path, rewritten: ModelSpec | None, param: str
) -> None:
    """What the pause has made impossible is refused by its seq, and the session goes on."""
    fixed = write_catalog(tmp_path / "catalog.toml", [SHIPPED.model_copy(update={"loras": {}, "name": "other"})])
    extra = write_catalog(tmp_path / "extra.toml", [with_steps(8, loras={"ink": INK})])
    async with start_api(catalog=fixed, extra_catalog=extra, default_model="other") as api, go_live(api) as live:
        wish: dict[str, Any] = {
            "model": "mini-lcm",
            "width": 64,
            "height": 64,
            "scheduler": "ddim",
            "loras": [{"name": "ink"}],
        }
        api.painter.gate.clear()
        await live.generate(1, num_inference_steps=1, refine={"after_ms": 0, "num_inference_steps": 8}, **wish)
        await until(lambda: bool(api.painter.deliveries))
        write_catalog(extra, [] if rewritten is None else [rewritten])
        api.server.handle_hangup()
        api.painter.gate.set()
        refused = await live.until_message("error")
        assert (refused["seq"], refused["error"]["param"]) == (1, param)
        await live.send(type="generate", seq=2, prompt="a", model="nothing")
        assert (await live.until_message("error"))["seq"] == 2
    assert len(api.painter.deliveries) == 1


async def test_a_model_that_goes_while_its_prompt_waits_for_its_turn(api: Api, extra: Path) -> None:
    write_catalog(extra, [SHIPPED.model_copy(update={"name": "mine"})])
    api.server.handle_hangup()
    async with go_live(api) as live:
        [session] = api.gateway.live_sockets
        assert isinstance(session, LiveSession)
        async with session._submitting:
            await live.generate(1, model="mine")
            await until(lambda: session._num_under_way == 1)
            rewrite(extra, "")
            api.server.handle_hangup()
        refused = await live.until_message("error")
        assert (refused["seq"], refused["error"]["code"]) == (1, "model_not_found")
        await live.generate(2)
        await live.until_final(2)


async def test_a_token_of_a_model_that_is_gone_opens_nothing(start_api: StartApi, extra: Path, keys: Keys) -> None:
    write_catalog(extra, [SHIPPED.model_copy(update={"name": "mine"})])
    key = keys.make()
    async with start_api(extra_catalog=extra, api_keys_file=keys.path) as api:
        options = {"subprotocols": with_credential(await make_token(api, key, model="mine")), "origin": PAGE}
        async with go_live(api, **options) as live:
            rewrite(extra, "")
            api.server.handle_hangup()
            assert (await is_refused(api, **options)).startswith("unknown model 'mine'")
            keys.make()  # whoever is in is looked at again
            code, reason = await closed(live.socket)
        assert (code, (reason or "").startswith("unknown model 'mine'")) == (4401, True)


async def test_the_gauges_of_a_model_end_with_it(api: Api, extra: Path) -> None:
    write_catalog(extra, [SHIPPED.model_copy(update={"name": name}) for name in ("gone", "kept")])
    api.server.handle_hangup()
    await api.painter.register(statuses=(ModelStatus("kept", "warm"),))
    before = (await api.http.get("/metrics")).text
    rewrite(extra, "")
    api.server.handle_hangup()
    after = (await api.http.get("/metrics")).text
    for gauge in ("queue_depth", "running_requests", "warm_workers"):
        assert f'fewstep_{gauge}{{model="gone"}}' in before
        assert f'fewstep_{gauge}{{model="gone"}}' not in after
        assert f'fewstep_{gauge}{{model="kept"}}' in after, "a worker has it yet"


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
