"""What pages of other sites may do over HTTP, and whose word on the caller's address counts."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.types import Scope

from app.http.middleware import EXPOSED_HEADERS
from app.main import make_server
from app.settings import GatewaySettings
from tests.app.conftest import Api, StartApi

PAGE = "https://shop.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
}


def cors_headers(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("access-control-")}


async def test_cors_is_off_unless_asked_for(api: Api) -> None:
    for answer in (
        await api.http.get("/v1/models", headers={"Origin": PAGE}),
        await api.http.options("/v1/generations", headers=PREFLIGHT),
    ):
        assert cors_headers(answer.headers) == {}


async def test_a_page_that_is_named_may_ask_and_read(start_api: StartApi) -> None:
    async with start_api(cors_origins=f"{PAGE}, https://other.example/") as api:
        allowed = await api.http.options("/v1/generations", headers=PREFLIGHT)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in allowed.headers
        answer = await api.http.post("/v1/generations", json={"prompt": "a red apple"}, headers={"Origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == PAGE
        exposed = set(answer.headers["access-control-expose-headers"].split(", "))
        assert exposed == set(EXPOSED_HEADERS)
        ours = {name for name in answer.headers if name.startswith("x-fewstep-")} | {"x-request-id", "server-timing"}
        assert ours <= {name.lower() for name in exposed}


async def test_errors_can_be_read_too(start_api: StartApi) -> None:
    async with start_api(cors_origins=PAGE, has_worker=False, max_body_bytes=1024) as api:
        for path, body in (("/v1/generations", {}), ("/v1/nothing", {}), ("/v1/generations", {"prompt": "x" * 2000})):
            answer = await api.http.post(path, json=body, headers={"Origin": PAGE})
            assert answer.status_code >= 400
            assert answer.headers["access-control-allow-origin"] == PAGE


async def test_a_page_that_is_not_named_may_not(start_api: StartApi) -> None:
    async with start_api(cors_origins=PAGE, has_worker=False) as api:
        evil = {"Origin": "https://evil.example"}
        assert (await api.http.options("/v1/generations", headers=PREFLIGHT | evil)).status_code == 400
        assert "access-control-allow-origin" not in (await api.http.get("/v1/models", headers=evil)).headers


@pytest.mark.parametrize(
    ("proxies", "seen"),
    [("", ("127.0.0.1", "http")), ("10.0.0.1", ("127.0.0.1", "http")), ("127.0.0.0/8", ("192.0.2.7", "https"))],
)
async def test_forwarded_headers_count_from_trusted_proxies_only(proxies: str, seen: tuple[str, str]) -> None:
    config = make_server(GatewaySettings.load(trusted_proxies=proxies, allow_anonymous=True)).config
    scopes: list[Scope] = []

    async def app(scope: Scope, *_: object) -> None:
        scopes.append(scope)

    config.app = app
    config.load()
    headers = [(b"x-forwarded-for", b"192.0.2.7"), (b"x-forwarded-proto", b"https")]
    scope = {"type": "http", "client": ("127.0.0.1", 5000), "scheme": "http", "headers": headers}
    await config.loaded_app(scope, None, None)
    assert (scopes[0]["client"][0], scopes[0]["scheme"]) == seen
