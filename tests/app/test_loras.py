"""Style LoRAs at the gateway: what a request may ask for, what it is told, and what reaches the worker."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.errors import InvalidRequest
from app.loras import check_loras, lora_warnings
from app.schemas import LoraChoice
from broker.messages import LoraWeight
from models.catalog import ModelSpec, get_spec, load_catalog
from tests.app.conftest import Api, StartApi
from tests.jobs import make_params

CATALOG = """
[loras.ink]
description = "ink drawings"
source = "somewhere"
models = ["mini-lcm"]
weight = { default = 0.8, min = -0.5, max = 1.2 }
trigger = "ink style"
license = "Apache-2.0"
license_note = "of its own"

[loras.clay]
description = "clay"
source = "somewhere"
models = ["mini-lcm"]
license = "MIT"
"""
PROMPT = "a red apple in Ink Style"


@pytest.fixture(scope="module")
def extra_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catalog") / "loras.toml"
    path.write_text(CATALOG, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def spec(extra_catalog: Path) -> ModelSpec:
    return get_spec(load_catalog(extra=extra_catalog), "mini-lcm")


@pytest.fixture
async def api(start_api: StartApi, extra_catalog: Path) -> AsyncIterator[Api]:
    async with start_api(extra_catalog=extra_catalog) as api:
        yield api


def choices(*loras: dict[str, Any]) -> list[LoraChoice]:
    return [LoraChoice(**lora) for lora in loras]


def test_the_entry_gives_the_weight_that_the_request_does_not(spec: ModelSpec) -> None:
    assert check_loras(choices({"name": "ink"}), spec) == (LoraWeight("ink", 0.8),)


def test_the_same_wish_is_the_same_batch_in_whatever_order_it_came(spec: ModelSpec) -> None:
    wish = [{"name": "ink", "weight": 1.0}, {"name": "clay", "weight": 0.5}]
    expected = (LoraWeight("clay", 0.5), LoraWeight("ink", 1.0))
    assert check_loras(choices(*wish), spec) == check_loras(choices(*reversed(wish)), spec) == expected


def test_a_weight_of_nothing_is_left_out(spec: ModelSpec) -> None:
    assert check_loras(choices({"name": "ink", "weight": 0.0}, {"name": "clay"}), spec) == (LoraWeight("clay", 1.0),)


@pytest.mark.parametrize(
    ("loras", "param", "allowed", "code"),
    [
        ([{"name": "oil"}], "loras.0.name", "'oil' is not allowed; mini-lcm has clay, ink, ", "lora_not_found"),
        ([{"name": "clay"}, {"name": "ink", "weight": 1.3}], "loras.1.weight", "ink allows -0.5 to 1.2", None),
        ([{"name": "ink", "weight": -0.6}], "loras.0.weight", "-0.6 is not allowed; ink allows -0.5 to 1.2", None),
        ([{"name": "ink"}, {"name": "clay"}, {"name": "ink"}], "loras.2.name", "can be given once", None),
    ],
)
def test_what_the_model_does_not_allow(
    spec: ModelSpec, loras: list[dict[str, Any]], param: str, allowed: str, code: str | None
) -> None:
    with pytest.raises(InvalidRequest, match=allowed) as caught:
        check_loras(choices(*loras), spec)
    assert (caught.value.param, caught.value.code) == (param, code or "invalid_value")


def test_a_model_without_any_names_the_field_in_the_same_way(spec: ModelSpec) -> None:
    with pytest.raises(InvalidRequest, match="'ink' is not allowed; mini-lcm has no style LoRAs") as caught:
        check_loras(choices({"name": "ink"}), spec.model_copy(update={"loras": {}}))
    assert (caught.value.param, caught.value.code) == ("loras.0.name", "lora_not_found")


def test_a_prompt_without_the_trigger_is_told(spec: ModelSpec) -> None:
    both = (LoraWeight("clay", 1.0), LoraWeight("ink", 1.0))
    assert lora_warnings(make_params(prompt=PROMPT, loras=both), spec) == ()
    (warning,) = lora_warnings(make_params(prompt="a red apple", loras=both), spec)
    assert warning == "loras: ink works best with 'ink style' in the prompt"


async def test_the_answer_tells_what_was_used(api: Api) -> None:
    body = {"prompt": "a red apple", "loras": [{"name": "ink"}, {"name": "clay", "weight": 0.5}]}
    answer = (await api.http.post("/v1/generations", json=body)).json()
    assert answer["state"] == "completed", answer
    assert answer["parameters"]["loras"] == [{"name": "clay", "weight": 0.5}, {"name": "ink", "weight": 0.8}]
    assert answer["warnings"] == ["loras: ink works best with 'ink style' in the prompt"]


async def test_one_that_no_worker_took_over_is_refused_with_words(api: Api) -> None:
    painter, spec = api.painter, api.painter.catalog["mini-lcm"]
    painter.catalog = {"mini-lcm": spec.model_copy(update={"loras": {"clay": spec.loras["clay"]}})}
    await painter.register()
    api.gateway.fleet._fresh_until = 0
    answers = [
        await api.http.post("/v1/generations", json={"prompt": PROMPT, "loras": [{"name": name} for name in names]})
        for names in ([], ["clay"], ["ink", "clay"])
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 503]
    error = answers[-1].json()["error"]
    assert (error["code"], error["param"]) == ("model_not_ready", "loras")
    assert error["message"].startswith("no worker that keeps mini-lcm warm has taken over the LoRAs clay, ink: ")
    assert "SIGHUP" in error["message"]
    assert int(answers[-1].headers["retry-after-ms"]) > 0


async def test_what_is_wrong_is_named(api: Api) -> None:
    for loras, param in (([{"name": "oil"}], "loras.0.name"), ([{"name": "ink", "weight": 11}], "loras.0.weight")):
        answer = await api.http.post("/v1/generations", json={"prompt": "a", "loras": loras})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_model_lists_its_loras(api: Api) -> None:
    models = {model["id"]: model for model in (await api.http.get("/v1/models")).json()["data"]}
    loras = {lora["name"]: lora for lora in models["mini-lcm"]["loras"]}
    assert loras.keys() == {"neon", "sketch", "ink", "clay"}
    ink, clay = loras["ink"], loras["clay"]
    assert ink == {
        "name": "ink",
        "description": "ink drawings",
        "weight": {"default": 0.8, "min": -0.5, "max": 1.2},
        "trigger": "ink style",
        "license": "Apache-2.0",
        "license_note": "of its own",
    }
    assert (clay["name"], clay["trigger"]) == ("clay", "")
    assert models["sd15-lcm"]["loras"] == []


async def test_openais_route_takes_them_too(api: Api) -> None:
    body = {"prompt": PROMPT, "loras": [{"name": "ink", "weight": 0.5}]}
    assert (await api.http.post("/v1/images/generations", json=body)).status_code == 200
    assert api.painter.deliveries[-1].job.params.loras == (LoraWeight("ink", 0.5),)
    bad = await api.http.post("/v1/images/generations", json=body | {"loras": [{"name": "oil"}]})
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "lora_not_found")


async def test_a_live_socket_takes_them_too(api: Api) -> None:
    async with api.connect() as socket:
        ask = {"type": "generate", "seq": 1, "prompt": PROMPT, "loras": [{"name": "ink"}]}
        await socket.send(json.dumps(ask))
        async for message in socket:
            if isinstance(message, bytes):
                break
        assert api.painter.deliveries[-1].job.params.loras == (LoraWeight("ink", 0.8),)
