"""Clients that are slow, silent, too many or no HTTP: each gets its error or is closed, within the settings' limits."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from tests.app.conftest import Api, StartApi
from tests.app.test_generations import until

HOST = b"Host: 127.0.0.1\r\n"
POST = b"POST /v1/generations HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
UPGRADE = HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
PATIENCE_S = 20


async def talk(api: Api, *chunks: bytes, pause_s: float = 0) -> bytes:
    """Everything that the server says until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            for chunk in chunks:
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(pause_s)
            return await reader.read()
    finally:
        writer.close()


def parse(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of an answer in the one shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    assert b"x-request-id: " in head.lower()
    assert b"x-content-type-options: nosniff" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


async def test_a_connection_that_says_nothing_is_closed(start_api: StartApi) -> None:
    async with start_api(header_timeout_s=0.2) as api:
        assert await talk(api) == b""


async def test_headers_have_a_deadline_however_they_trickle(start_api: StartApi) -> None:
    async with start_api(header_timeout_s=0.3) as api:
        status, error = parse(await talk(api, *[b"G", b"E", b"T", b" ", b"/"], pause_s=0.02))
        assert (status, error["code"]) == (408, "request_timeout")
        assert "0.3 s" in error["message"]


@pytest.mark.parametrize("more", [b"GET /li", b"\r\n"], ids=["half a request", "a blank line"])
async def test_so_has_the_next_request_of_a_connection(start_api: StartApi, more: bytes) -> None:
    async with start_api(header_timeout_s=0.2) as api:
        answers = await talk(api, b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n", more, pause_s=0.1)
        assert answers.startswith(b"HTTP/1.1 200 OK")


async def test_a_body_has_a_deadline_however_it_trickles(start_api: StartApi) -> None:
    async with start_api(body_timeout_s=0.3) as api:
        status, error = parse(await talk(api, POST + b"Content-Length: 30\r\n\r\n", b"{", b'"', b"p", pause_s=0.02))
        assert (status, error["code"]) == (408, "request_timeout")
        assert not api.gateway.metrics._submitted


async def test_a_request_that_waits_for_its_picture_has_no_deadline_of_these(start_api: StartApi) -> None:
    async with start_api(header_timeout_s=0.1, body_timeout_s=0.1, keep_alive_s=1) as api:
        api.painter.gate.clear()
        drawing = asyncio.create_task(api.http.post("/v1/generations", json={"prompt": "a red apple"}))
        await until(lambda: bool(api.painter.deliveries))
        await asyncio.sleep(0.3)
        api.painter.gate.set()
        assert (await drawing).status_code == 200


async def test_an_answer_that_nobody_reads_is_dropped(start_api: StartApi) -> None:
    async with start_api(send_timeout_s=0.2, keep_alive_s=1) as api:
        answer = await api.http.post("/v1/generations", json={"prompt": "x", "num_images": 9, "output_format": "png"})
        url = answer.headers["X-Fewstep-Generation"]
        with socket.create_connection(("127.0.0.1", api.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            request = f"GET /v1/generations/{url}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
            await asyncio.to_thread(fill, client, request)
            await until(lambda: not api.server.server_state.connections)


def fill(client: socket.socket, request: bytes) -> None:
    """Asks for more answers than the buffers on the way can hold, until nobody takes the questions any more."""
    client.settimeout(2)
    try:
        for _ in range(100_000):
            client.sendall(request)
    except OSError:
        return


async def test_connections_above_the_limit_are_told_so(start_api: StartApi) -> None:
    async with start_api(max_connections=5, max_live_connections=5, header_timeout_s=2) as api:
        await api.http.get("/livez")
        idle = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(4)]
        await until(lambda: len(api.server.server_state.connections) == 5)
        status, error = parse(await talk(api, b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n"))
        assert (status, error["code"]) == (503, "too_many_connections")
        for _, writer in idle:
            writer.close()
        await until(lambda: len(api.server.server_state.connections) <= 1)
        assert (await api.http.get("/livez")).status_code == 200
        assert 'fewstep_rejected_total{reason="too_many_connections"} 1.0' in (await api.http.get("/metrics")).text


async def test_a_live_peer_that_vanished_is_closed(start_api: StartApi) -> None:
    async with start_api(live_ping_s=0.2) as api, api.connect(ping_interval=None, close_timeout=0.1) as websocket:
        await websocket.recv()
        websocket.transport.pause_reading()
        await until(lambda: not api.gateway.live_sockets)
        websocket.transport.resume_reading()
        with pytest.raises(ConnectionClosed):
            await websocket.recv()


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"\x16\x03\x01 a TLS hello\r\n\r\n", 400, "bad_request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad_request"),
        (b"CONNECT example.org:80 HTTP/1.1\r\n" + HOST + b"\r\n", 400, "bad_request"),
        (b"BREW /pot HTTP/1.1\r\n" + HOST + b"\r\n", 400, "bad_request"),
        (b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n", 400, "bad_request"),
        (b"GET /v1/live\xff HTTP/1.1\r\n" + UPGRADE + b"Sec-WebSocket-Key: " + b"A" * 22 + b"==\r\n\r\n", 400, None),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414, "url_too_long"),
        (b"GET /livez HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET /livez HTTP/1.1\r\n" + b"X: a\r\n" * 7_000 + b"\r\n", 431, "headers_too_large"),
        (b"GET /livez HTTP/1.1\r\nX: " + b"a" * 900_000, 431, "headers_too_large"),
        (POST + b"Content-Length: -1\r\n\r\n{}", 400, "bad_request"),
        (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400, "bad_request"),
        (POST + b"Content-Length: 99999999999999999999999\r\n\r\n{}", 400, "bad_request"),
        (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400, "bad_request"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}", 400, "bad_request"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_what_is_no_http_gets_the_one_shape(
    api: Api, request_bytes: bytes, status: int, code: str | None
) -> None:
    got, error = parse(await talk(api, request_bytes))
    assert got == status
    assert code is None or error["code"] == code
    assert len(error["message"]) < 200


async def test_a_large_body_that_is_refused_gets_its_answer_and_an_end(start_api: StartApi) -> None:
    async with start_api(header_timeout_s=0.2, keep_alive_s=1) as api:
        status, error = parse(await talk(api, POST + b"Content-Length: 900000\r\n\r\n", *[b"x" * 9000] * 100))
        assert (status, error["code"]) == (413, "body_too_large")


async def test_garbage_behind_a_request_doesnt_spoil_its_answer(api: Api) -> None:
    answer = await talk(api, b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n\x00\x01\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b'{"status":"alive"}')


async def test_an_upgrade_to_http_2_that_loses_the_body_is_told_so(start_api: StartApi) -> None:
    """What Java's client sends unless it is told not to."""
    async with start_api(keep_alive_s=1) as api:
        body = b'{"prompt": "a red apple"}'
        headers = b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(body)
        status, error = parse(await talk(api, POST + headers + body))
        assert (status, error["code"]) == (400, "missing_body")
        assert "Upgrade: h2c" in error["message"]
