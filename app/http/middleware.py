"""Around every request: its id, its time, the headers that protect browsers, and what is refused at the door."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access.rates import RATE_HEADERS, noted_usages, rate_headers
from app.admission import new_request_id
from app.errors import ErrorAnswer, UnsupportedBody, WrongHost, http_error, render, shorten
from app.metrics import Metrics
from app.settings import LOOPBACK_NAMES

log = logging.getLogger(__name__)

UNMATCHED = "unmatched"

# What a page elsewhere may read of an answer, where CORS lets it read any.
EXPOSED_HEADERS = (
    "X-Request-Id",
    "Server-Timing",
    "Location",
    "Preference-Applied",
    "Cache-Status",
    "Idempotent-Replayed",
    "Retry-After",
    "retry-after-ms",
    "x-should-retry",
    *RATE_HEADERS,
    "X-Fewstep-Generation",
    "X-Fewstep-Model",
    "X-Fewstep-Model-Revision",
    "X-Fewstep-Seed",
    "Deprecation",
    "Sunset",
)


class RequestContext:
    """Gives every HTTP request and live socket its id, and every response `X-Request-Id`; measures how long it took.

    A client that leaves an SSE stream while an event is being written ends quietly here: it is no fault of ours.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        if scope["type"] == "websocket":
            return await self.app(scope, receive, send)
        return await self._serve_http(request_id, scope, receive, send)

    async def _serve_http(self, request_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        started, status = time.perf_counter(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                add_headers(headers, request_id)
                headers.update(rate_headers(usages))
            await send(message)

        try:
            with noted_usages() as usages:
                await self.app(scope, receive, send_with_headers)
        except* anyio.BrokenResourceError:
            log.debug("request %s: the client left in the middle of an event", request_id)
        finally:
            duration_s = time.perf_counter() - started
            self.metrics.request_duration.labels(find_route(scope), str(status)).observe(duration_s)


def add_headers(headers: MutableHeaders, request_id: str) -> None:
    headers.setdefault("X-Request-Id", request_id)
    headers.setdefault("X-Content-Type-Options", "nosniff")
    headers.setdefault("Referrer-Policy", "no-referrer")
    headers.setdefault("X-Frame-Options", "DENY")


def find_route(scope: Scope) -> str:
    """The path template, so that ids don't become label values."""
    return getattr(scope.get("route"), "path", UNMATCHED)


class Guard:
    """Refuses what needs no look inside: a Host that names another server, a body that declares itself too large or
    compressed.

    A page elsewhere can point its own domain at 127.0.0.1 (DNS rebinding); the Host header gives it away. `hosts` None
    allows any. A body without a declared length is cut by the framework when it gets too long.
    """

    def __init__(
        self, app: ASGIApp, hosts: frozenset[str] | None, max_body_bytes: int, on_refusal: Callable[[ErrorAnswer], None]
    ) -> None:
        self.app, self.hosts, self.max_body_bytes, self.on_refusal = app, hosts, max_body_bytes, on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None if scope["type"] == "lifespan" else self._find_fault(Headers(scope=scope), scope.get("method"))
        if refusal is None:
            return await self.app(scope, receive, send)
        self.on_refusal(refusal)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        response = JSONResponse(refusal.body, refusal.status)
        return await response(scope, receive, send)

    def _find_fault(self, headers: Headers, method: str | None) -> ErrorAnswer | None:
        host = headers.get("host", "")
        if self.hosts is not None and host_name(host) not in self.hosts:
            message = f"Host: {shorten(host)} is not this server; see FEWSTEP_ALLOWED_HOSTS"
            return render(WrongHost(message, param="Host"))
        encoding = headers.get("content-encoding", "identity")
        if method == "POST" and encoding.strip().lower() != "identity":
            message = f"Content-Encoding: {shorten(encoding)} is not allowed; send the body as it is"
            return render(UnsupportedBody(message, param="Content-Encoding"))
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            return http_error(413, f"the body has {length[:20]} bytes, {self.max_body_bytes} are allowed")
        return None


class BodyDeadline:
    """A request's body arrives within `timeout_s` or is answered with 408."""

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self.app, self.timeout_s = app, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        deadline = asyncio.get_running_loop().time() + self.timeout_s
        is_complete = False

        async def receive_in_time() -> Message:
            nonlocal is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            is_complete = not message.get("more_body", False)
            return message

        return await self.app(scope, receive_in_time, send)

    def _too_slow(self) -> HTTPException:
        detail = f"the body didn't arrive within {self.timeout_s:g} s"
        return HTTPException(408, detail, {"Connection": "close"})


def host_name(host: str) -> str:
    """The name in a Host header: without its port, without IPv6 brackets."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if ":" in name else name


def allowed_hosts(is_on_loopback: bool, extra: tuple[str, ...]) -> frozenset[str] | None:
    """Loopback names for a loopback server; any name for others, unless the settings list some."""
    if not is_on_loopback and not extra:
        return None
    return LOOPBACK_NAMES | {name.lower() for name in extra}
