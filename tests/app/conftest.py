"""A whole gateway on a real Redis for every test: own key prefix, own port, own worker."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import websockets

from app.catalog import read_catalog
from app.gateway import Gateway
from app.live.protocol import SUBPROTOCOL
from app.main import GatewayServer, bind, make_server
from app.settings import GatewaySettings
from app.tasks import running
from tests.app.keys import Keys
from tests.app.peers import Painter


@dataclass(frozen=True, slots=True)
class Api:
    """A running gateway, its worker, and a client of both."""

    settings: GatewaySettings
    server: GatewayServer
    port: int
    painter: Painter
    http: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def gateway(self) -> Gateway:
        return cast(Gateway, self.server.lifespan.state["gateway"])

    def connect(self, **options: Any) -> websockets.connect:
        options.setdefault("subprotocols", [SUBPROTOCOL])
        return websockets.connect(f"ws://127.0.0.1:{self.port}/v1/live", max_size=None, **options)


StartApi = Callable[..., AbstractAsyncContextManager[Api]]


@pytest.fixture(scope="session")
def start_api(redis_url: str) -> StartApi:
    """Starts a gateway with other settings than `api` has."""

    @asynccontextmanager
    async def start(*, has_worker: bool = True, prefix: str | None = None, **overrides: Any) -> AsyncIterator[Api]:
        prefix = prefix or f"test-{uuid.uuid4().hex[:8]}"
        has_keys = "api_keys" in overrides or "api_keys_file" in overrides
        defaults = {"port": 0, "log_level": "warning", "redis_url": redis_url, "allow_anonymous": not has_keys}
        # Without the cache: most tests ask for the same picture again, and want it drawn again.
        options = defaults | {"cache_s": 0} | overrides
        settings = GatewaySettings.load(redis_prefix=prefix, **options)
        painter = Painter(settings.redis_url, prefix, read_catalog(settings))
        async with contextlib.AsyncExitStack() as stack:
            if has_worker:
                await stack.enter_async_context(running(painter.run()))
            server = make_server(settings)
            listener = stack.enter_context(bind(settings))
            await stack.enter_async_context(_serving(server, listener))
            port = listener.getsockname()[1]
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30))
            api = Api(settings, server, port, painter, http)
            if has_worker:
                await _until_ready(api)
            yield api

    return start


@pytest.fixture
async def api(start_api: StartApi) -> AsyncIterator[Api]:
    async with start_api() as api:
        yield api


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@asynccontextmanager
async def _serving(server: GatewayServer, listener: socket.socket) -> AsyncIterator[None]:
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        if serving.done():
            serving.result()
        await asyncio.sleep(0.005)
    try:
        yield
    finally:
        server.should_exit = True
        await serving


async def _until_ready(api: Api) -> None:
    async with asyncio.timeout(20):
        while (await api.http.get("/readyz")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
