"""Picture links of OpenAI's `response_format: url`: they need no key, and open one picture."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from app.access.links import PURPOSE
from tests.app.access.test_auth import openai_client
from tests.app.conftest import Api, StartApi
from tests.app.keys import Keys, bearer
from tests.app.peers import open_image

URL: Any = {"prompt": "a red apple", "response_format": "url"}


async def make_links(client: AsyncOpenAI, n: int = 1) -> list[str]:
    images = await client.images.generate(**URL, n=n)
    return [str(image.url) for image in images.data or []]


async def open_link(url: str) -> httpx.Response:
    async with httpx.AsyncClient() as stranger:
        return await stranger.get(url)


async def test_a_link_needs_no_key(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api, openai_client(api, key) as client:
        for url in await make_links(client, n=2):
            answer = await open_link(url)
            assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/png")
            assert open_image(answer.content).size == (64, 64)
            assert (await open_link(url.partition("?")[0])).status_code == 401


async def test_a_link_opens_nothing_else(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api, openai_client(api, key) as client:
        first, second = await make_links(client, n=2)
        [other] = await make_links(client)
        token = first.partition("?")[2]
        for path in (second.partition("?")[0], other.partition("?")[0]):
            answer = await open_link(f"{path}?{token}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_token")
        for path in ("", "/image", "/events"):
            generation = first.partition("/images/")[0]
            assert (await open_link(f"{generation}{path}?{token}")).status_code == 401


@pytest.mark.parametrize("change", ["", "x", "%00", "a" * 2000])
async def test_forged_links(api: Api, change: str) -> None:
    async with AsyncOpenAI(api_key="x", base_url=f"{api.url}/v1") as client:
        [url] = await make_links(client)
    assert (await open_link(url[:-4] + change)).status_code in (400, 401)


async def test_a_link_ends(api: Api) -> None:
    async with AsyncOpenAI(api_key="x", base_url=f"{api.url}/v1") as client:
        [url] = await make_links(client)
    generation = url.split("/")[5]
    old = api.gateway.signer.sign(PURPOSE, {"generation": generation, "index": 0}, ttl_s=-1)
    answer = await open_link(f"{url.partition('?')[0]}?token={old}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "token_expired")


async def test_links_begin_as_the_settings_say(start_api: StartApi) -> None:
    async with start_api(public_url="https://images.example.org/fewstep/") as api:
        answer = await api.http.post("/v1/images/generations", json=URL, headers=bearer("x"))
    assert answer.json()["data"][0]["url"].startswith("https://images.example.org/fewstep/v1/generations/")
    assert "b64_json" not in answer.json()["data"][0]


async def test_a_link_lives_as_long_as_an_asynchronous_result(start_api: StartApi) -> None:
    async with start_api(keep_sync_s=0, keep_async_s=60) as api:
        answer = await api.http.post("/v1/images/generations", json=URL)
        assert (await open_link(answer.json()["data"][0]["url"])).status_code == 200
