"""API keys over HTTP, with the official client where it has a word for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest
from openai import AsyncOpenAI

from app.access.keys import RELOAD_S
from tests.app.conftest import Api, StartApi
from tests.app.keys import Keys, bearer, id_of

BODY = {"prompt": "a red apple"}


@asynccontextmanager
async def openai_client(api: Api, key: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{api.url}/v1", api_key=key, max_retries=0) as client:
        yield client


async def test_openais_client_with_a_key(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api, openai_client(api, key) as client:
        images = await client.images.generate(prompt="a red apple", model="mini-lcm")
        assert images.data
        assert api.painter.deliveries[0].job.owner == id_of(key)


async def test_openais_client_with_a_wrong_key(start_api: StartApi, keys: Keys) -> None:
    keys.make()
    async with start_api(api_keys_file=keys.path) as api, openai_client(api, "sk-wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.images.generate(prompt="a red apple", model="mini-lcm")
        assert caught.value.code == "invalid_api_key"
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        assert api.painter.deliveries == []


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Basic dXNlcjpwYXNz",
        "Bearer fs_x",
        "Bearer a b",
        "fs_aaaaaaaaaaaa_x",
        "\u00e9",
        "Bearer " + "x" * 7000,
    ],
)
async def test_rubbish_in_authorization_is_401(start_api: StartApi, keys: Keys, value: str) -> None:
    keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        headers = [(b"authorization", value.encode("latin-1"))]
        response = await api.http.post("/v1/generations", json=BODY, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }


async def test_two_authorization_headers_are_refused(start_api: StartApi, keys: Keys) -> None:
    value = f"Bearer {keys.make()}"
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        headers = [("authorization", value), ("authorization", value)]
        assert (await api.http.get("/v1/models", headers=headers)).status_code == 401
        assert (await api.http.get("/v1/models", headers=headers[:1])).status_code == 200


async def test_a_key_in_the_query_string_opens_nothing(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        for name in ("api_key", "key", "token", "access_token"):
            assert (await api.http.get("/v1/models", params={name: key})).status_code == 401


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/generations"),
        ("GET", "/v1/generations/x"),
        ("GET", "/v1/generations/x/image"),
        ("GET", "/v1/generations/x/images/0"),
        ("GET", "/v1/generations/x/events"),
        ("DELETE", "/v1/generations/x"),
        ("POST", "/v1/images/generations"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/mini-lcm"),
    ],
)
async def test_every_route_of_the_api_asks_for_a_key(start_api: StartApi, keys: Keys, method: str, path: str) -> None:
    keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        response = await api.http.request(method, path, json=BODY if method == "POST" else None)
    assert response.status_code == 401


async def test_health_metrics_and_the_page_stay_open(start_api: StartApi, keys: Keys) -> None:
    keys.make()
    async with start_api(api_keys_file=keys.path) as api:
        for path in ("/livez", "/readyz", "/metrics", "/", "/static/live.js", "/openapi.json"):
            assert (await api.http.get(path)).status_code == 200, path


async def test_without_keys_the_header_means_nothing(api: Api) -> None:
    for headers in ({}, bearer("none"), {"Authorization": "Basic x"}):
        assert (await api.http.get("/v1/models", headers=headers)).status_code == 200


async def test_anonymous_callers_beside_keys_only_where_allowed(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, allow_anonymous=True, has_worker=False) as api:
        assert (await api.http.get("/v1/models")).status_code == 200
        assert (await api.http.get("/v1/models", headers=bearer(key))).status_code == 200
        assert (await api.http.get("/v1/models", headers=bearer("wrong"))).status_code == 401


async def test_a_key_sees_and_uses_its_models_only(start_api: StartApi, keys: Keys) -> None:
    mine, other = keys.make(models=["mini-lcm"]), keys.make(models=["sd15-lcm"])
    async with start_api(api_keys_file=keys.path) as api, openai_client(api, other) as client:
        listed = (await api.http.get("/v1/models", headers=bearer(mine))).json()
        assert [card["id"] for card in listed["data"]] == ["mini-lcm"]
        assert [model.id async for model in client.models.list()] == ["sd15-lcm"]
        assert (await api.http.get("/v1/models", headers=bearer(other))).json()["default"] == "sd15-lcm"
        with pytest.raises(openai.PermissionDeniedError, match="it may use: sd15-lcm") as caught:
            await client.images.generate(prompt="a red apple", model="mini-lcm")
        assert (caught.value.code, caught.value.param) == ("model_not_allowed", "model")
        with pytest.raises(openai.NotFoundError, match="sd15-lcm") as missing:
            await client.models.retrieve("nope")
        assert "mini-lcm" not in str(missing.value)


async def test_a_key_without_the_api_lane_draws_nothing_over_http(start_api: StartApi, keys: Keys) -> None:
    key = keys.make(lanes=["live"])
    async with start_api(api_keys_file=keys.path) as api, openai_client(api, key) as client:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await client.images.generate(prompt="a red apple", model="mini-lcm")
        assert caught.value.code == "lane_not_allowed"
        assert api.painter.deliveries == []


async def test_a_generation_belongs_to_its_key(start_api: StartApi, keys: Keys) -> None:
    mine, other = keys.make(), keys.make()
    async with start_api(api_keys_file=keys.path) as api:
        path = f"/v1/generations/{await draw(api, mine)}"
        for part in ("", "/image", "/images/0", "/events"):
            assert (await api.http.get(path + part, headers=bearer(mine))).status_code == 200, part
            assert (await api.http.get(path + part, headers=bearer(other))).status_code == 404, part
        assert (await api.http.delete(path, headers=bearer(other))).status_code == 404


async def draw(api: Api, key: str) -> str:
    response = await api.http.post("/v1/generations", json=BODY, headers=bearer(key))
    assert response.status_code == 200, response.text
    request_id: str = response.json()["id"]
    return request_id


async def test_keys_come_and_go_while_the_gateway_runs(start_api: StartApi, keys: Keys) -> None:
    first = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        second = keys.make()
        await until_status(api, second, 200)
        keys.revoke(first)
        await until_status(api, first, 401)
        keys.path.write_text("[[[ broken")
        api.gateway.keys.reload()
        await until_status(api, second, 200)


async def until_status(api: Api, key: str, status: int) -> None:
    async with asyncio.timeout(RELOAD_S + 10):
        while (await api.http.get("/v1/models", headers=bearer(key))).status_code != status:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_refusals_are_counted(start_api: StartApi, keys: Keys) -> None:
    keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        await api.http.post("/v1/generations", json=BODY)
        assert 'fewstep_rejected_total{reason="invalid_api_key"} 1.0' in (await api.http.get("/metrics")).text
