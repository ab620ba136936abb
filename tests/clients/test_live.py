"""`AsyncLive` against a real gateway, and against servers that fall silent."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from app.live.protocol import SUBPROTOCOL, CloseCode
from app.tasks import running
from broker.messages import JobError
from fewstep_client import (
    AsyncClient,
    AsyncLive,
    Authenticated,
    Cancelled,
    Closed,
    Error,
    FinalFrame,
    LiveClosed,
    LiveEvent,
    PreviewFrame,
    Queued,
    Ready,
    Reconnecting,
    Refine,
    Superseded,
    TooBusy,
    connection,
)
from fewstep_client.live import FINAL_CODES, backoff_s, live_url, wished_delay_s
from tests.app.conftest import Api, StartApi
from tests.app.keys import Keys
from tests.app.peers import Painter, color_of, open_image
from tests.app.test_generations import until
from tests.service import free_port, spawn

PAGE = "https://shop.example"
PROMPT = "a red apple on a blue background"
E = TypeVar("E")


async def first(live: AsyncLive, kind: type[E], is_it: Callable[[E], bool] = lambda _: True) -> E:
    """The next event of a kind; takes those before it."""
    async with asyncio.timeout(30):
        async for event in live:
            if isinstance(event, kind) and is_it(event):
                return event
    raise AssertionError(f"the client closed before a {kind.__name__}")


async def final_of(live: AsyncLive, seq: int, *, refined: bool = False) -> FinalFrame:
    return await first(live, FinalFrame, lambda frame: (frame.seq, frame.refined) == (seq, refined))


async def rest(live: AsyncLive) -> list[LiveEvent]:
    async with asyncio.timeout(20):
        return [event async for event in live]


# Drawing


async def test_a_prompt_gives_previews_and_a_final(api: Api) -> None:
    async with AsyncLive(api.url) as live:
        seq = live.generate(PROMPT, num_inference_steps=4, output_format="png")
        events: list[LiveEvent] = []
        async for event in live:
            events.append(event)
            if isinstance(event, FinalFrame):
                break
    ready, queued, *previews, final = events
    assert isinstance(ready, Ready)
    assert isinstance(queued, Queued)
    assert (queued.seq, queued.warnings, queued.refined) == (seq, (), False)
    frames = [event for event in previews if isinstance(event, PreviewFrame)]
    assert frames == previews
    steps = [frame.step for frame in frames]
    assert steps == sorted(set(steps)) != []
    assert {open_image(frame.data).size for frame in frames} == {(64, 64)}
    assert isinstance(final, FinalFrame)
    assert (final.seed, final.seq, final.request_id) == (ready.seed, seq, queued.request_id)
    assert final.timings.total_ms > 0
    params = api.painter.deliveries[0].job.params
    assert open_image(final.data).getpixel((0, 0)) == color_of(params, 0)


async def test_newer_words_supersede(api: Api) -> None:
    async with AsyncLive(api.url) as live:
        await first(live, Ready)
        api.painter.gate.clear()
        running = live.generate("a")
        await first(live, Queued)
        waiting = live.generate("a red")
        await first(live, Queued)
        newest = live.generate("a red apple")
        superseded = await first(live, Superseded)
        assert (superseded.seq, superseded.refined) == (waiting, False)
        api.painter.gate.set()
        await final_of(live, running)
        assert (await final_of(live, newest)).seq == newest


async def test_words_that_the_socket_had_no_time_for_are_not_sent(api: Api) -> None:
    async with AsyncLive(api.url) as live:
        await first(live, Ready)
        for length in range(1, len(PROMPT) + 1):
            live.generate(PROMPT[:length])
        await final_of(live, len(PROMPT))
        assert [delivery.job.params.prompt for delivery in api.painter.deliveries] == [PROMPT]


async def test_a_pause_gives_the_better_picture_of_the_same_seed(api: Api) -> None:
    async with AsyncLive(api.url) as live:
        refine = Refine(after_ms=20, num_inference_steps=6, decoder="full")
        seq = live.generate(PROMPT, num_inference_steps=1, refine=refine)
        quick = await final_of(live, seq)
        better = await final_of(live, seq, refined=True)
        assert (better.seed, better.num_inference_steps, quick.num_inference_steps) == (quick.seed, 6, 1)


async def test_a_grid_is_one_request(api: Api) -> None:
    async with AsyncLive(api.url) as live:
        live.generate(PROMPT, num_images=4, seed=10, previews=False)
        frames = [await first(live, FinalFrame) for _ in range(4)]
        assert sorted((frame.index, frame.seed) for frame in frames) == [(0, 10), (1, 11), (2, 12), (3, 13)]


async def test_a_refused_field_is_an_error_event_and_the_next_request_is_drawn(api: Api) -> None:
    async with AsyncLive(api.url) as live:
        seq = live.generate(PROMPT, num_inference_steps=999)
        error = await first(live, Error)
        assert (error.seq, error.param, error.code, error.retry_after_ms) == (
            seq,
            "num_inference_steps",
            "invalid_value",
            None,
        )
        await final_of(live, live.generate(PROMPT))


async def test_a_failure_that_may_pass_tells_when_to_come_back(api: Api) -> None:
    api.painter.fail_with = JobError("worker_lost", "the worker went away", is_retryable=True)
    async with AsyncLive(api.url) as live:
        live.generate(PROMPT)
        error = await first(live, Error)
        assert (error.code, error.type) == ("worker_lost", "server_error")
        assert error.retry_after_ms is not None
        api.painter.fail_with = None
        await final_of(live, live.generate(PROMPT))


async def test_cancel_takes_back_what_is_not_drawn(api: Api) -> None:
    async with AsyncLive(api.url) as live:
        api.painter.gate.clear()
        seq = live.generate(PROMPT)
        await first(live, Queued)
        await until(lambda: len(api.painter.deliveries) == 1)
        live.cancel()
        assert (await first(live, Cancelled)).seq == seq
        api.painter.gate.set()
        await final_of(live, live.generate("another"))


async def test_leaving_cancels_what_is_under_way(api: Api) -> None:
    api.painter.gate.clear()
    async with AsyncLive(api.url) as live:
        live.generate(PROMPT)
        await until(lambda: len(api.painter.deliveries) == 1)
    assert [type(event) for event in await rest(live)] == [Ready, Queued, Closed]
    await until(lambda: len(api.painter.endings) == 1)
    assert api.painter.endings[0].type == "cancelled"


async def test_a_closed_client_says_so(api: Api) -> None:
    live = AsyncLive(api.url)
    with pytest.raises(LiveClosed, match="isn't open yet"):
        live.generate(PROMPT)
    async with live:
        await first(live, Ready)
    for call in (live.cancel, lambda: live.generate(PROMPT)):
        with pytest.raises(LiveClosed, match="the connection is closed: closed by this client"):
            call()
    assert await rest(live) == [Closed(1000, "closed by this client")]


# A slow reader


async def test_a_slow_reader_gets_the_newest_and_not_all(api: Api) -> None:
    """The server waits for acknowledgements, which are sent once a picture was dealt with."""
    async with AsyncLive(api.url) as live:
        await first(live, Ready)
        live.generate(PROMPT, num_inference_steps=20)
        await first(live, PreviewFrame)  # and no further event is asked for
        await until(lambda: len(api.painter.endings) == 1)
        await asyncio.sleep(0.1)
        frames: list[LiveEvent] = []
        async for event in live:
            frames.append(event)
            if isinstance(event, FinalFrame):
                break
        assert len(frames) <= 2, "one that was on the way, and the final"
        await final_of(live, live.generate("the acknowledgements came: there is room again"))


# Coming back


async def test_the_newest_prompt_is_sent_again_after_a_restart(start_api: StartApi) -> None:
    port = free_port()
    async with AsyncLive(f"http://127.0.0.1:{port}") as live:
        async with start_api(port=port, live_reconnect_in_ms=400) as api:
            api.painter.gate.clear()
            live.generate("the older one")
            await first(live, Queued)
            seq = live.generate(PROMPT)
            await first(live, Queued, lambda queued: queued.seq == seq)
        going_away = await first(live, Reconnecting, lambda event: event.code is not None)
        assert going_away.code == CloseCode.GOING_AWAY
        assert going_away.delay_s is not None
        assert going_away.delay_s >= 0.4
        async with start_api(port=port) as api:
            frame = await final_of(live, seq)
            assert frame.frame <= 4, "each connection counts its own"
            assert [delivery.job.params.prompt for delivery in api.painter.deliveries] == [PROMPT]


async def assert_nothing_is_sent_again(start_api: StartApi, port: int, live: AsyncLive) -> None:
    """To another server: only what is asked for from now on."""
    async with start_api(port=port) as api:
        await first(live, Ready)
        await final_of(live, live.generate("another"))
        assert [delivery.job.params.prompt for delivery in api.painter.deliveries] == ["another"]


async def test_a_finished_prompt_is_not_sent_again(start_api: StartApi) -> None:
    port = free_port()
    async with AsyncLive(f"http://127.0.0.1:{port}") as live:
        async with start_api(port=port, live_reconnect_in_ms=1):
            await final_of(live, live.generate(PROMPT, num_images=2))
            await first(live, FinalFrame)
        await assert_nothing_is_sent_again(start_api, port, live)


async def test_a_better_picture_that_did_not_come_is_asked_for_again(start_api: StartApi) -> None:
    port = free_port()
    async with AsyncLive(f"http://127.0.0.1:{port}") as live:
        seq = live.generate(PROMPT, num_inference_steps=1, refine=Refine(after_ms=500, num_inference_steps=2))
        async with start_api(port=port, live_reconnect_in_ms=1):
            await final_of(live, seq)
        async with start_api(port=port):
            await final_of(live, seq, refined=True)
        await assert_nothing_is_sent_again(start_api, port, live)


async def test_it_waits_for_a_server_that_is_not_there_yet(start_api: StartApi) -> None:
    port = free_port()
    async with AsyncLive(f"http://127.0.0.1:{port}") as live:
        seq = live.generate(PROMPT)
        away = await first(live, Reconnecting)
        assert away.code is None
        assert "ConnectionRefusedError" in away.reason
        async with start_api(port=port):
            await final_of(live, seq)


async def test_a_full_server_says_when(start_api: StartApi) -> None:
    async with start_api(max_live_connections=1, live_reconnect_in_ms=300) as api, AsyncLive(api.url) as one:
        await first(one, Ready)
        async with AsyncLive(api.url) as two:
            full = await first(two, Reconnecting)
            assert full.code == CloseCode.TRY_LATER
            assert full.delay_s is not None
            assert full.delay_s >= 0.3
            await one.close()
            await first(two, Ready)


async def test_an_idle_client_connects_again_when_there_is_something_to_draw(start_api: StartApi) -> None:
    async with start_api(live_idle_s=0.2) as api, AsyncLive(api.url) as live:
        idle = await first(live, Reconnecting)
        assert (idle.code, idle.delay_s) == (CloseCode.IDLE, None)
        await final_of(live, live.generate(PROMPT, refine=Refine(after_ms=60_000, num_inference_steps=2)))
        idle = await first(live, Reconnecting)
        assert idle.delay_s is None, "the better picture alone is no reason to connect"


async def test_a_message_that_is_too_big_is_not_sent_again(start_api: StartApi) -> None:
    async with start_api(live_max_message_bytes=1024) as api, AsyncLive(api.url) as live:
        live.generate("a" * 1100)
        assert (await first(live, Reconnecting)).code == CloseCode.TOO_BIG
        await first(live, Ready)
        seq = live.generate(PROMPT)
        await final_of(live, seq)


async def test_the_gateway_is_killed_while_somebody_types(redis_url: str, prefix: str, tmp_path: Path) -> None:
    port, painter = free_port(), Painter(redis_url, prefix)

    def start_gateway() -> subprocess.Popen[bytes]:
        environment = {"FEWSTEP_PORT": str(port), "FEWSTEP_REDIS_URL": redis_url, "FEWSTEP_REDIS_PREFIX": prefix}
        return spawn("gateway", log=tmp_path / "log", FEWSTEP_ALLOW_ANONYMOUS="1", **environment)

    async with running(painter.run()), AsyncLive(f"http://127.0.0.1:{port}") as live:
        gateway = start_gateway()
        try:
            await final_of(live, live.generate(PROMPT))
            painter.gate.clear()
            seq = live.generate("a fox on a green background")
            await until(lambda: len(painter.deliveries) == 2)
            gateway.kill()
            assert (await first(live, Reconnecting)).code in (None, 1006)
            gateway.wait(10)
            gateway = start_gateway()
            await first(live, Ready)
            painter.gate.set()
            await final_of(live, seq)
        finally:
            gateway.kill()
            gateway.wait(10)


# Who it is


async def test_a_key_opens(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api, AsyncLive(api.url, key=key) as live:
        await final_of(live, live.generate(PROMPT))


async def test_a_wrong_key_closes_for_good_and_says_why(start_api: StartApi, keys: Keys) -> None:
    keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api, AsyncLive(api.url, key="fs_wrong") as live:
        [closed] = await rest(live)
        assert isinstance(closed, Closed)
        assert closed.code == CloseCode.AUTH
        assert "API key" in closed.reason
        with pytest.raises(LiveClosed, match="API key"):
            live.generate(PROMPT)


async def test_a_revoked_key_closes_for_good(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api, AsyncLive(api.url, key=key) as live:
        await first(live, Ready)
        keys.revoke(key)
        events = await rest(live)
        assert [(type(event), getattr(event, "code", None)) for event in events] == [(Closed, CloseCode.AUTH)]


def token_source(api: Api, key: str, ttl_s: int) -> Callable[[], Awaitable[str]]:
    async def token() -> str:
        async with AsyncClient(api.url, key=key) as client:
            return (await client.live_token(PAGE, ttl_s=ttl_s)).token

    return token


async def test_a_token_is_refreshed_before_it_ends(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path) as api:
        token = token_source(api, key, ttl_s=1)
        async with AsyncLive(api.url, token=token, origin=PAGE) as live:
            ready = await first(live, Ready)
            assert ready.token_expires_in_s is not None
            assert ready.token_expires_in_s <= 1
            for _ in range(2):
                fresh = await first(live, Authenticated)
                assert fresh.token_expires_in_s is not None
            await final_of(live, live.generate(PROMPT))


async def test_a_token_that_comes_too_late_costs_a_connection(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        token, asked = token_source(api, key, ttl_s=1), 0

        async def unsteady() -> str:
            nonlocal asked
            asked += 1
            if asked == 2:
                raise OSError("the backend is away")
            return await token()

        async with AsyncLive(api.url, token=unsteady, origin=PAGE) as live:
            await first(live, Ready)
            assert (await first(live, Reconnecting)).code == CloseCode.AUTH
            await first(live, Ready)


async def test_a_refused_token_closes_for_good(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        token = token_source(api, key, ttl_s=9)
        async with AsyncLive(api.url, token=token, origin="https://elsewhere.example") as live:
            [closed] = await rest(live)
            assert closed == Closed(CloseCode.AUTH, f"the live token is for pages of {PAGE}")


async def test_a_mistake_in_the_token_source_comes_out_of_the_iterator(api: Api) -> None:
    async def broken() -> str:
        raise ZeroDivisionError("a mistake")

    async with AsyncLive(api.url, token=broken) as live:
        with pytest.raises(ZeroDivisionError, match="a mistake"):
            await rest(live)


async def test_a_mistake_while_it_is_connected_comes_out_as_it_is(start_api: StartApi, keys: Keys) -> None:
    key = keys.make()
    async with start_api(api_keys_file=keys.path, has_worker=False) as api:
        tokens = [await token_source(api, key, ttl_s=1)()]

        async def broken() -> str:
            return tokens.pop()

        async with AsyncLive(api.url, token=broken, origin=PAGE) as live:
            with pytest.raises(IndexError):
                await rest(live)


async def test_a_token_source_whose_backend_is_away_is_asked_again(api: Api) -> None:
    failures: list[Exception] = [httpx.ConnectError("away"), TimeoutError(), busy()]

    async def unsteady() -> str:
        if failures:
            raise failures.pop()
        return "whatever"

    async with AsyncLive(api.url, token=unsteady) as live:
        reasons = [(await first(live, Reconnecting)).reason for _ in range(3)]
        assert [reason.partition(":")[0] for reason in reasons] == ["TooBusy", "TimeoutError", "ConnectError"]
        await first(live, Ready)


def busy() -> TooBusy:
    return TooBusy(429, {"message": "too many"}, retry_after_s=None, request_id=None)


async def test_a_page_of_another_origin_is_refused_for_good(api: Api) -> None:
    async with AsyncLive(api.url, origin="https://elsewhere.example") as live:
        assert await rest(live) == [Closed(None, "the handshake was refused with HTTP 403")]


def test_a_key_and_a_token_are_too_much() -> None:
    async def token() -> str:
        return ""

    with pytest.raises(ValueError, match="only one of them"):
        AsyncLive(key="fs_x", token=token)


@pytest.mark.parametrize("credential", ["fs_a b", "", "ä", "x\n"])
async def test_a_credential_that_no_handshake_carries_is_not_shown(credential: str) -> None:
    with pytest.raises(ValueError, match=r"^key: letters, digits") as caught:
        AsyncLive(key=credential)
    assert credential == "" or credential not in str(caught.value)

    async def token() -> str:
        return credential

    async with AsyncLive(token=token) as live:
        with pytest.raises(ValueError, match=r"^token: letters, digits"):
            await rest(live)


# Servers that misbehave


@asynccontextmanager
async def serving(handle: Any, **options: Any) -> AsyncIterator[str]:
    async with serve(handle, "127.0.0.1", 0, subprotocols=[Subprotocol(SUBPROTOCOL)], **options) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def ready_message() -> str:
    numbers = {"seed": 1, "max_unacked": 2, "max_message_bytes": 65536, "idle_s": 300}
    texts = {"type": "ready", "session": "s", "model": "m", "newer": "field", "token_expires_in_s": None}
    return json.dumps(numbers | texts)


@pytest.mark.parametrize("says_ready", [True, False])
async def test_silence_is_a_lost_connection(monkeypatch: pytest.MonkeyPatch, says_ready: bool) -> None:
    monkeypatch.setattr(connection, "MAX_SILENCE_S", 0.2)

    async def fall_silent(socket: ServerConnection) -> None:
        if says_ready:
            await socket.send(ready_message())
        await socket.wait_closed()

    async with serving(fall_silent) as url, AsyncLive(url) as live:
        live.generate(PROMPT)
        for _ in range(2):
            assert (await first(live, Reconnecting)).reason == "no answer for 0.2 s"


@pytest.mark.parametrize(("status", "is_final"), [(400, True), (404, True), (408, False), (429, False), (503, False)])
async def test_a_refused_handshake(status: int, is_final: bool) -> None:
    async def refuse(socket: ServerConnection, _: Request) -> Response:
        return socket.respond(HTTPStatus(status), "no")

    async def never(_: ServerConnection) -> None:
        raise AssertionError("it was refused")

    async with serving(never, process_request=refuse) as url, AsyncLive(url) as live:
        event = await anext(live)
        assert isinstance(event, Closed if is_final else Reconnecting)
        assert event.reason == f"the handshake was refused with HTTP {status}"


@pytest.mark.parametrize("code", sorted(FINAL_CODES))
async def test_codes_after_which_nothing_helps(code: int) -> None:
    async def refuse(socket: ServerConnection) -> None:
        await socket.close(code, "no")

    async with serving(refuse) as url, AsyncLive(url) as live:
        assert await rest(live) == [Closed(code, "no")]


async def test_a_connection_that_is_lost_at_the_very_moment_of_closing(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio's task groups swallow a cancellation then."""
    closing: list[asyncio.Task[None]] = []

    def be_lost(_: str | bytes) -> None:
        monkeypatch.undo()
        asyncio.get_running_loop().call_soon(lambda: closing.append(asyncio.create_task(live.close())))
        raise TimeoutError

    monkeypatch.setattr(connection, "read_event", be_lost)
    async with AsyncLive(api.url) as live, asyncio.timeout(5):
        assert await rest(live) == [Closed(1000, "closed by this client")]
        await asyncio.gather(*closing)
        assert len(closing) == 1


async def test_what_a_newer_server_says_is_passed_over() -> None:
    async def speak(socket: ServerConnection) -> None:
        header = json.dumps({"type": "film", "frame": 1}).encode()
        await socket.send(json.dumps({"type": "weather", "seq": None}))
        await socket.send(len(header).to_bytes(4, "big") + header)
        await socket.send(ready_message())
        await socket.close(1008)

    async with serving(speak) as url, AsyncLive(url) as live:
        assert [type(event) for event in await rest(live)] == [Ready, Closed]


async def test_what_a_newer_server_adds_to_an_error_is_passed_over() -> None:
    async def speak(socket: ServerConnection) -> None:
        error = {"message": "no", "type": "t", "param": None, "code": "c", "newer": "field"}
        await socket.send(json.dumps({"type": "error", "seq": 1, "request_id": None, "error": error}))
        await socket.close(1008)

    async with serving(speak) as url, AsyncLive(url) as live:
        assert await rest(live) == [Error(1, None, "no", "t", None, "c"), Closed(1008, "")]


# Pure


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("http://127.0.0.1:8000", "ws://127.0.0.1:8000/v1/live"),
        ("https://pictures.example/", "wss://pictures.example/v1/live"),
        ("https://example.org/fewstep/", "wss://example.org/fewstep/v1/live"),
        ("wss://pictures.example/v1/live", "wss://pictures.example/v1/live"),
    ],
)
def test_the_address(base_url: str, expected: str) -> None:
    assert live_url(base_url) == expected


@pytest.mark.parametrize("base_url", ["", "127.0.0.1:8000", "ftp://example.org", "http://"])
def test_a_wrong_address_is_named(base_url: str) -> None:
    with pytest.raises(ValueError, match=f"base_url: '{base_url}' is not allowed"):
        AsyncLive(base_url)


def test_the_pause_doubles_up_to_ten_seconds_and_is_never_the_same() -> None:
    for failures, longest_s in ((0, 0.25), (1, 0.5), (3, 2.0), (9, 10.0), (5000, 10.0)):
        pauses = {backoff_s(failures) for _ in range(50)}
        assert longest_s / 2 <= min(pauses) <= max(pauses) <= longest_s
        assert len(pauses) > 1


@pytest.mark.parametrize(
    ("reason", "delay_s"),
    [('{"reconnect_in_ms": 1500}', 1.5), ("", 0), ("[]", 0), ('{"reconnect_in_ms": null}', 0), ("bye", 0)],
)
def test_the_pause_that_the_server_wishes(reason: str, delay_s: float) -> None:
    assert wished_delay_s(reason) == delay_s
