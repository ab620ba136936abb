"""uvicorn's HTTP protocol with an end to everything that a client can leave undone.

By itself uvicorn waits for ever for a request's headers, takes headers of any size, and keeps a response for a client
that doesn't read; and what it refuses before a route is asked, it refuses in plain text. The body's own deadline is
`app.http.middleware.BodyDeadline`; pings over live sockets are uvicorn's.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import ClassVar

from starlette.datastructures import MutableHeaders
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.admission import new_request_id
from app.errors import ErrorAnswer, http_error
from app.gateway import Gateway
from app.http.middleware import add_headers
from app.settings import GatewaySettings

LINGER_S = 1.0
MAX_STRAY_BYTES = 2**20  # of a body that was refused before its end


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    max_connections: int
    max_header_bytes: int
    header_timeout_s: float
    send_timeout_s: float


def make_protocol(settings: GatewaySettings) -> type[BoundedProtocol]:
    """The protocol class for a server with these settings."""
    limits = ConnectionLimits(
        max_connections=settings.max_connections,
        max_header_bytes=settings.max_header_bytes,
        header_timeout_s=settings.header_timeout_s,
        send_timeout_s=settings.send_timeout_s,
    )
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})


class BoundedProtocol(HttpToolsProtocol):
    """One connection. Its headers have a deadline and a size, its output a reader, and the server so many of them."""

    limits: ClassVar[ConnectionLimits]

    _awaits_headers = True
    _is_deaf = False
    _num_unclaimed_bytes = 0
    _deadline: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, f"all {self.limits.max_connections} connections of this server are in use")
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        self._cancel_stall()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel_stall()
        self._stall = self.loop.call_later(self.limits.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel_stall()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        if self._deadline is None and self._is_idle:
            self._expect_headers()
        super().data_received(data)
        if self._awaits_headers or self._is_idle:
            self._claim(len(data))

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for anything that isn't HTTP."""
        del msg
        self._refuse(400, "this is not a valid HTTP request")

    # The parser's callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._awaits_headers = True

    def on_headers_complete(self) -> None:
        if self._is_deaf:
            return
        num_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if num_bytes > self.limits.max_header_bytes:
            self._refuse_headers(num_bytes)
            return
        if not self.url.isascii():
            raise ValueError("the URL has bytes that are not ASCII")  # ends in send_400_response
        super().on_headers_complete()
        self._awaits_headers, self._num_unclaimed_bytes = False, 0
        self._cancel_deadline()

    def on_body(self, body: bytes) -> None:
        if not self._is_deaf:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_deaf:
            super().on_message_complete()

    # The limits

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being served."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_headers(self) -> None:
        self._cancel_deadline()
        self._deadline = self.loop.call_later(self.limits.header_timeout_s, self._give_up)

    def _give_up(self) -> None:
        """Nobody is told that nothing came."""
        if self._awaits_headers and self._num_unclaimed_bytes:
            self._refuse(408, f"the headers didn't arrive within {self.limits.header_timeout_s:g} s")
        else:
            self.transport.close()

    def _claim(self, num_bytes: int) -> None:
        """Counts what belongs to no request that is being served."""
        self._num_unclaimed_bytes += num_bytes
        if not self._awaits_headers and self._num_unclaimed_bytes > MAX_STRAY_BYTES:
            self.transport.close()
        elif self._awaits_headers and self._num_unclaimed_bytes > self.limits.max_header_bytes:
            self._refuse_headers(self._num_unclaimed_bytes)

    def _refuse_headers(self, num_bytes: int) -> None:
        is_url = len(self.url) * 2 > num_bytes
        what = "the URL is too long" if is_url else "the headers are too large"
        self._refuse(414 if is_url else 431, f"{what}: together they may have {self.limits.max_header_bytes} bytes")

    def _refuse(self, status: int, detail: str) -> None:
        """Answers without a route, then listens a little longer, deaf: a connection that is closed with unread bytes
        is reset, and the client may lose the answer. A response under way is finished first."""
        if self._is_deaf or self.transport.is_closing():
            return
        self._is_deaf = True
        if not self._is_idle and not self.cycle.more_body:
            self.cycle.keep_alive = False
            return
        answer = http_error(status, detail)
        self._count(answer)
        if self._is_idle or not self.cycle.response_started:
            self.transport.write(format_answer(answer))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._cancel_deadline()
        self._deadline = self.loop.call_later(LINGER_S, self.transport.abort)

    def _count(self, answer: ErrorAnswer) -> None:
        gateway: Gateway = self.app_state["gateway"]
        gateway.metrics.rejected.labels(answer.code).inc()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cancel_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


def format_answer(answer: ErrorAnswer) -> bytes:
    """An error as it goes over the wire where no framework writes it."""
    body = json.dumps(answer.body).encode()
    headers = MutableHeaders(answer.headers | {"Content-Type": "application/json", "Content-Length": str(len(body))})
    headers["Connection"] = "close"
    add_headers(headers, new_request_id())
    lines = b"".join(b"%s: %s\r\n" % pair for pair in headers.raw)
    return STATUS_LINE[answer.status] + lines + b"\r\n" + body
