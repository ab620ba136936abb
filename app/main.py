"""The gateway as an application, and as a process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar, cast

import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from app.access.keys import KeyRing
from app.access.rates import Rates
from app.access.signing import Signer
from app.admission import Admission, new_request_id
from app.catalog import ServedCatalog
from app.errors import ErrorAnswer
from app.fleet import Fleet
from app.gateway import Gateway
from app.http.handlers import install_error_handlers
from app.http.middleware import EXPOSED_HEADERS, BodyDeadline, Guard, RequestContext, allowed_hosts
from app.http.protocol import make_protocol
from app.http.redaction import redact_logs
from app.metrics import Metrics
from app.openapi.document import describe
from app.policy import PromptPolicy, load_prompt_check
from app.process import prepare_process
from app.replies import Replies
from app.routes import generations, health, live, models, openai_images, page
from app.settings import GatewaySettings, check_exposure, check_room, is_loopback
from app.tasks import running
from broker.errors import BrokerUnavailable
from broker.redis_broker import RedisBroker
from broker.settings import SettingsError
from broker.terms import Limits

FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 3.0
REMIND_INTERVAL_S = 10.0
LIVE_GOODBYE_S = 1.0

T = TypeVar("T")

log = logging.getLogger(__name__)


# The application


@dataclass(frozen=True, slots=True)
class Setup:
    """What a gateway is made of before it connects to anything."""

    settings: GatewaySettings
    catalog: ServedCatalog
    keys: KeyRing
    metrics: Metrics
    policy: PromptPolicy


def make_setup(settings: GatewaySettings) -> Setup:
    """Raises SettingsError, or CatalogError where the catalog can't be read."""
    check_exposure(settings)
    check_room(settings)
    catalog = ServedCatalog(settings)
    metrics = Metrics()
    policy = PromptPolicy(load_prompt_check(settings.prompt_check), settings.prompt_check_timeout_s, metrics)
    return Setup(settings, catalog, KeyRing(settings), metrics, policy)


def create_app(settings: GatewaySettings) -> FastAPI:
    """Raises what `make_setup` does. Connects to nothing before startup."""
    setup = make_setup(settings)
    app = FastAPI(
        title="fewstep",
        summary="Real-time text-to-image",
        lifespan=partial(lifespan, setup=setup),
        docs_url=None,  # Swagger's page is fetched from elsewhere
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    add_middleware(app, settings, setup.metrics)
    install_error_handlers(app, setup.metrics)
    for routes in (generations, openai_images, live, models, health, page):
        app.include_router(routes.router, max_body_size=settings.max_body_bytes)
    app.mount("/static", page.PageFiles(), name="static")
    app.state.catalog = setup.catalog
    describe_app = partial(describe, app, setup.catalog, settings, has_keys=setup.keys.is_used)
    describe_version = lru_cache(maxsize=1)(lambda _version: describe_app())
    app.openapi = lambda: describe_version(setup.catalog.version)  # type: ignore[method-assign]
    return app


def add_middleware(app: FastAPI, settings: GatewaySettings, metrics: Metrics) -> None:
    """The last one added is the outermost: every response passes RequestContext."""
    hosts = allowed_hosts(is_loopback(settings.host), settings.allowed_hosts)

    def count_refusal(answer: ErrorAnswer) -> None:
        metrics.rejected.labels(answer.code).inc()

    app.add_middleware(BodyDeadline, timeout_s=settings.body_timeout_s)
    app.add_middleware(Guard, hosts=hosts, max_body_bytes=settings.max_body_bytes, on_refusal=count_refusal)
    if settings.cors_origins:
        add_cors(app, settings.cors_origins)
    app.add_middleware(RequestContext, metrics=metrics)


def add_cors(app: FastAPI, origins: tuple[str, ...]) -> None:
    """Lets pages of other sites call the API. Credentials travel in Authorization alone, never in cookies."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )


@asynccontextmanager
async def lifespan(app: FastAPI, *, setup: Setup) -> AsyncIterator[dict[str, Any]]:
    """Connected, reading replies, alive; then everything in reverse."""
    del app
    async with connect(setup.settings) as broker, Rates(setup.settings) as rates:
        gateway = build_gateway(setup, broker, rates, await make_signer(setup.settings, broker))
        replies = gateway.replies
        async with running(replies.read_forever(), replies.keep_alive_forever(), setup.keys.watch_forever()):
            yield {"gateway": gateway}
        with contextlib.suppress(BrokerUnavailable):
            await broker.drop_gateway(gateway.replies.gateway_id)


def build_gateway(setup: Setup, broker: RedisBroker, rates: Rates, signer: Signer) -> Gateway:
    settings, fleet = setup.settings, Fleet(broker)
    limits = Limits(max_depth=settings.max_depth, max_result_bytes=settings.max_result_bytes)
    return Gateway(
        settings=settings,
        catalog=setup.catalog,
        broker=broker,
        replies=Replies(broker, f"gateway-{new_request_id()}", setup.metrics.observe),
        fleet=fleet,
        admission=Admission(broker, fleet, setup.catalog, limits, setup.metrics, setup.policy, rates),
        metrics=setup.metrics,
        keys=setup.keys,
        signer=signer,
    )


async def make_signer(settings: GatewaySettings, broker: RedisBroker) -> Signer:
    """With the secret of the settings, or the one that all gateways share through Redis."""
    if settings.secret is not None:
        return Signer(settings.secret.get_secret_value())
    return Signer(await patiently(broker.shared_secret))


@asynccontextmanager
async def connect(settings: GatewaySettings) -> AsyncIterator[RedisBroker]:
    """Waits for Redis for as long as it takes, saying so. Raises RedisTooOld."""
    async with contextlib.AsyncExitStack() as stack:
        yield await patiently(lambda: stack.enter_async_context(make_broker(settings)))


def make_broker(settings: GatewaySettings) -> RedisBroker:
    return RedisBroker(settings.redis_url, prefix=settings.redis_prefix)


async def patiently(ask: Callable[[], Awaitable[T]]) -> T:
    """Asks Redis until it answers, saying what it waits for."""
    pause_s, said_at = FIRST_PAUSE_S, float("-inf")
    while True:
        try:
            return await ask()
        except BrokerUnavailable as error:
            if time.monotonic() - said_at > REMIND_INTERVAL_S:
                log.warning("waiting for Redis (FEWSTEP_REDIS_URL): %s", error)
                said_at = time.monotonic()
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(MAX_PAUSE_S, pause_s * 2)


# The process


class GatewayServer(uvicorn.Server):
    """Tells open live sockets when to come back before uvicorn closes them. SIGHUP reads the catalog again, unless
    `has_hung_up` says that it came with the end of the terminal."""

    has_hung_up: Callable[[], bool] = staticmethod(lambda: False)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        if threading.current_thread() is not threading.main_thread():  # where uvicorn takes no signals either
            return await super().serve(sockets)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.handle_hangup)
        try:
            await super().serve(sockets)
        finally:
            loop.remove_signal_handler(signal.SIGHUP)

    def handle_hangup(self) -> None:
        if self.has_hung_up():
            self.should_exit = True
        else:
            cast(FastAPI, self.config.app).state.catalog.reload()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if gateway := cast("Gateway | None", self.lifespan.state.get("gateway")):
            await say_goodbye(gateway)
        await super().shutdown(sockets)


async def say_goodbye(gateway: Gateway) -> None:
    goodbyes = [live_socket.go_away() for live_socket in gateway.live_sockets]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LIVE_GOODBYE_S):
            await asyncio.gather(*goodbyes)


def make_server(settings: GatewaySettings) -> GatewayServer:
    """A server for this app with the limits that the settings name."""
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        http=make_protocol(settings),
        timeout_keep_alive=settings.keep_alive_s,
        log_config=None,
        access_log=settings.log_level == "debug",
        ws_max_size=settings.live_max_message_bytes,
        ws_per_message_deflate=False,  # pictures are compressed already
        ws_ping_interval=settings.live_ping_s,
        ws_ping_timeout=settings.live_ping_s,
        timeout_graceful_shutdown=settings.shutdown_s,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
    )
    return GatewayServer(config)


def run(settings: GatewaySettings, has_hung_up: Callable[[], bool]) -> None:
    """Serves until a signal comes; `has_hung_up` says whether a SIGHUP is one that ends it. Raises SettingsError,
    CatalogError or RedisTooOld, KeyboardInterrupt while it waits for Redis."""
    configure_logging(settings)
    server = make_server(settings)
    server.has_hung_up = has_hung_up
    # It may wait for Redis for long. A shell's background job has SIGINT ignored, which uvicorn doesn't mind either.
    signal.signal(signal.SIGHUP, lambda *_: _heed_hangup(server))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    listener = bind(settings)
    asyncio.run(check_redis(settings))
    prepare_process(settings.max_connections)
    with listener, contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when all is closed
        host, port = listener.getsockname()[:2]
        log.info("the gateway serves http://%s:%d", f"[{host}]" if ":" in host else host, port)
        server.run(sockets=[listener])


def _heed_hangup(server: GatewayServer) -> None:
    """Before the server has a loop of its own to hear it."""
    if server.has_hung_up():
        raise KeyboardInterrupt
    server.handle_hangup()


def bind(settings: GatewaySettings) -> socket.socket:
    """Raises SettingsError where the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Without its protocol named, asyncio leaves Nagle's algorithm on: 40 ms for every answer on a kept connection.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        listener.close()
        message = f"can't listen on {settings.host}:{settings.port}: {error.strerror}; choose another FEWSTEP_PORT"
        raise SettingsError(message) from error
    return listener


async def check_redis(settings: GatewaySettings) -> None:
    """So that a Redis that is too old ends the process with one line, not with a traceback of the server."""
    async with connect(settings):
        pass


def configure_logging(settings: GatewaySettings) -> None:
    """Leaves a program that has set up its logs already as it is."""
    logging.basicConfig(format="%(asctime)s %(levelname)-8s %(name)s: %(message)s", datefmt="%H:%M:%S")
    level = settings.log_level.upper()
    for name in ("app", "broker"):
        logging.getLogger(name).setLevel(level)
    redact_logs()
    logging.getLogger("uvicorn").setLevel("WARNING" if level == "INFO" else level)  # it tells of every step
