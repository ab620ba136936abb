from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import websockets
from starlette.websockets import WebSocket, WebSocketState
from websockets.asyncio.client import ClientConnection

from app.live.access import Door
from app.live.protocol import SUBPROTOCOL, CloseCode
from app.live.session import LiveSession
from broker.messages import JobError
from tests.app.conftest import Api, StartApi
from tests.app.peers import LiveFrame, open_image, unpack
from tests.app.test_generations import until


class Live:
    """A client of the live protocol. Acknowledges every picture unless told otherwise."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.acks = True
        self.frames: list[LiveFrame] = []
        self.messages: list[dict[str, Any]] = []
        self.ready: dict[str, Any] = {}

    async def send(self, **message: Any) -> None:
        await self.socket.send(json.dumps(message))

    async def generate(self, seq: int, prompt: str = "a red apple", **fields: Any) -> None:
        await self.send(type="generate", seq=seq, prompt=prompt, **fields)

    async def next(self) -> LiveFrame | dict[str, Any]:
        data = await asyncio.wait_for(self.socket.recv(), 20)
        if isinstance(data, str):
            message: dict[str, Any] = json.loads(data)
            self.messages.append(message)
            return message
        frame = unpack(data)
        self.frames.append(frame)
        if self.acks:
            await self.send(type="ack", frame=frame.header["frame"])
        return frame

    async def until(self, is_it: Callable[[LiveFrame | dict[str, Any]], bool]) -> Any:
        while not is_it(item := await self.next()):
            pass
        return item

    async def until_message(self, type: str) -> dict[str, Any]:
        message: dict[str, Any] = await self.until(lambda item: isinstance(item, dict) and item["type"] == type)
        return message

    async def until_final(self, seq: int, *, refined: bool = False) -> LiveFrame:
        wanted = {"type": "final", "seq": seq, "refined": refined}
        frame: LiveFrame = await self.until(
            lambda item: isinstance(item, LiveFrame) and item.header.items() >= wanted.items()
        )
        return frame

    async def hears_nothing(self, for_s: float = 0.2) -> bool:
        try:
            await asyncio.wait_for(self.socket.recv(), for_s)
        except TimeoutError:
            return True
        return False


@asynccontextmanager
async def go_live(api: Api, **options: Any) -> AsyncIterator[Live]:
    async with api.connect(**options) as socket:
        live = Live(socket)
        live.ready = await live.until_message("ready")
        yield live


async def closed(socket: ClientConnection) -> tuple[int | None, str | None]:
    async with asyncio.timeout(15):
        await socket.wait_closed()
    return socket.close_code, socket.close_reason


async def test_ready_tells_the_rules(api: Api) -> None:
    async with go_live(api) as live:
        assert live.socket.subprotocol == SUBPROTOCOL
        assert live.ready["protocol"] == SUBPROTOCOL
        assert live.ready["model"] == "mini-lcm"
        assert (live.ready["max_unacked"], live.ready["max_message_bytes"]) == (2, 65_536)
        assert isinstance(live.ready["seed"], int)


async def test_previews_and_final(api: Api) -> None:
    api.painter.step_s = 0.02
    async with go_live(api) as live:
        await live.generate(1)
        queued = await live.until_message("queued")
        final = await live.until_final(1)
    assert (queued["seq"], queued["position"]) == (1, 0)
    previews = [frame.header for frame in live.frames if frame.header["type"] == "preview"]
    assert [header["step"] for header in previews] == [1, 2, 3]
    assert {header["request_id"] for header in previews} == {queued["request_id"], final.header["request_id"]}
    assert [frame.header["frame"] for frame in live.frames] == [1, 2, 3, 4]
    picture = open_image(final.data)
    assert (picture.format, picture.size) == ("JPEG", (64, 64))
    assert final.header["timings"]["total_ms"] > 0
    assert (final.header["format"], final.header["width"], final.header["step"]) == ("jpeg", 64, 4)


async def test_one_seed_for_the_session(api: Api) -> None:
    async with go_live(api) as live:
        await live.generate(1)
        await live.until_final(1)
        await live.generate(2, "a red apple on a table")
        await live.until_final(2)
        await live.generate(3, seed=5)
        await live.until_final(3)
    finals = [frame.header["seed"] for frame in live.frames if frame.header["type"] == "final"]
    assert finals == [live.ready["seed"], live.ready["seed"], 5]


async def test_newer_prompts_supersede_older_ones(api: Api) -> None:
    api.painter.gate.clear()
    async with go_live(api) as live:
        await live.generate(1)
        await until(lambda: bool(api.painter.deliveries))
        for seq in range(2, 6):
            await live.generate(seq, "a red apple" + "!" * seq)
            await asyncio.sleep(0.01)
        api.painter.gate.set()
        final = await live.until_final(5)
    superseded = [message["seq"] for message in live.messages if message["type"] == "superseded"]
    assert sorted(superseded) == [2, 3, 4]
    assert len(api.painter.deliveries) == 2
    assert final.header["seq"] == 5


async def test_someone_who_never_stops_typing_sees_pictures(api: Api) -> None:
    async with go_live(api) as live:
        looking = asyncio.create_task(live.until_final(59))
        for seq in range(1, 60):
            await live.generate(seq)
            await asyncio.sleep(0.01)
        await looking
    finals = [frame.header["seq"] for frame in live.frames if frame.header["type"] == "final"]
    assert len(finals) > 5
    assert finals == sorted(finals)


async def test_a_grid_is_one_request(api: Api) -> None:
    async with go_live(api) as live:
        await live.generate(1, num_images=4, previews=False)
        await live.until(lambda item: isinstance(item, LiveFrame) and item.header["index"] == 3)
    assert [frame.header["index"] for frame in live.frames] == [0, 1, 2, 3]
    assert [frame.header["seed"] - live.ready["seed"] for frame in live.frames] == [0, 1, 2, 3]


async def test_at_most_two_unacknowledged_frames(api: Api) -> None:
    async with go_live(api) as live:
        live.acks = False
        for seq in range(1, 5):
            await live.generate(seq)
            await until(lambda seq=seq: len(api.painter.endings) >= seq)  # type: ignore[misc]
        await live.until_message("queued")
        while len(live.frames) < 2:
            await live.next()
        while not await live.hears_nothing(0.1):
            pass
        assert len(live.frames) == 2
        live.acks = True
        await live.send(type="ack", frame=2)
        final = await live.until_final(4)
        assert final.header["frame"] == 3, "all in between were dropped, the newest final never"
    metrics = (await api.http.get("/metrics")).text
    assert "fewstep_live_ack_seconds_count 2.0" in metrics or "fewstep_live_ack_seconds_count 3.0" in metrics
    assert 'fewstep_live_dropped_frames_total{type="final"}' in metrics


async def test_refine_after_a_pause(api: Api) -> None:
    refine = {"after_ms": 50, "num_inference_steps": 8}
    async with go_live(api) as live:
        await live.generate(1, num_inference_steps=1, refine=refine)
        quick = await live.until_final(1)
        refined = await live.until_final(1, refined=True)
    first, second = (delivery.job.params for delivery in api.painter.deliveries)
    assert (first.num_inference_steps, first.decoder) == (1, "tiny")
    assert (second.num_inference_steps, second.decoder, second.previews) == (8, "full", False)
    assert first.seed == second.seed == live.ready["seed"]
    assert (quick.header["num_inference_steps"], refined.header["num_inference_steps"]) == (1, 8)
    assert quick.header["request_id"] != refined.header["request_id"]


async def test_typing_on_takes_the_refinement_back(api: Api) -> None:
    refine = {"after_ms": 150, "num_inference_steps": 8}
    async with go_live(api) as live:
        for seq in (1, 2, 3):
            await live.generate(seq, num_inference_steps=1, refine=refine)
            await live.until_final(seq)
        await live.until_final(3, refined=True)
    steps = [delivery.job.params.num_inference_steps for delivery in api.painter.deliveries]
    assert steps == [1, 1, 1, 8]


async def test_nothing_to_refine(api: Api) -> None:
    same = {"after_ms": 0, "num_inference_steps": 4, "decoder": "full"}
    async with go_live(api) as live:
        await live.generate(1, num_inference_steps=4, decoder="full", refine=same)
        await live.until_final(1)
        assert await live.hears_nothing()


async def test_cancel(api: Api) -> None:
    api.painter.gate.clear()
    async with go_live(api) as live:
        await live.generate(1)
        await until(lambda: bool(api.painter.deliveries))
        await live.generate(2)
        await live.until(lambda item: isinstance(item, dict) and item["type"] == "queued" and item["seq"] == 2)
        await live.send(type="cancel")
        cancelled = [(await live.until_message("cancelled"))["seq"] for _ in range(2)]
        assert sorted(cancelled) == [1, 2]
        api.painter.gate.set()
        await live.generate(3)
        await live.until_final(3)


async def test_a_closed_socket_cancels_its_work(api: Api) -> None:
    api.painter.gate.clear()
    async with go_live(api) as live:
        await live.generate(1)
        await until(lambda: bool(api.painter.deliveries))
    await until(lambda: bool(api.painter.endings))
    assert api.painter.endings[0].type == "cancelled"
    await until(lambda: not api.gateway.live_sockets)
    assert "fewstep_live_connections 0.0" in (await api.http.get("/metrics")).text


async def test_errors_do_not_close_the_socket(api: Api) -> None:
    async with go_live(api) as live:
        await live.socket.send("not json")
        assert (await live.until_message("error"))["error"]["code"] == "invalid_json"
        await live.socket.send(b"\x00binary")
        assert "JSON text frames" in (await live.until_message("error"))["error"]["message"]
        await live.send(type="generate", seq=4, prompt="x", num_inference_steps=51)
        error = await live.until_message("error")
        assert (error["seq"], error["error"]["param"]) == (4, "num_inference_steps")
        assert error["error"]["type"] == "invalid_request_error"
        await live.generate(5, model="sd15-lcm")
        error = await live.until_message("error")
        assert (error["seq"], error["error"]["code"], error["retry_after_ms"]) == (5, "model_not_ready", 5000)
        await live.generate(5)
        assert "above 5" in (await live.until_message("error"))["error"]["message"]
        await live.send(type="ack", frame=9)
        assert (await live.until_message("error"))["error"]["param"] == "frame"
        await live.generate(6, refine={"num_inference_steps": 99})
        assert (await live.until_message("error"))["error"]["param"] == "refine.num_inference_steps"
        api.painter.fail_with = JobError("nan_latents", "it came out as noise")
        await live.generate(7)
        error = await live.until_message("error")
        assert (error["seq"], error["error"]["code"]) == (7, "nan_latents")
        api.painter.fail_with = None
        await live.generate(8)
        await live.until_final(8)


async def test_two_sockets_never_see_each_others_frames(api: Api) -> None:
    async with go_live(api) as first, go_live(api) as second:
        assert first.ready["seed"] != second.ready["seed"]
        for seq in range(1, 8):
            await asyncio.gather(first.generate(seq, "x"), second.generate(seq, "xx"))
            await asyncio.gather(first.until_final(seq), second.until_final(seq))
    for live in (first, second):
        assert {frame.header["seed"] for frame in live.frames} == {live.ready["seed"]}


@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:1", "null"])
async def test_a_foreign_origin_is_refused(api: Api, origin: str) -> None:
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with api.connect(origin=origin):
            pass
    assert refused.value.response.status_code == 403


async def test_origins_that_are_welcome(start_api: StartApi) -> None:
    async with start_api(allowed_origins="https://friend.example") as api:
        for origin in (f"http://127.0.0.1:{api.port}", f"http://localhost:{api.port}", "https://friend.example"):
            async with go_live(api, origin=origin):
                pass


async def test_subprotocols(api: Api) -> None:
    async with go_live(api, subprotocols=None) as live:
        assert live.socket.subprotocol is None
    with pytest.raises(websockets.InvalidStatus):
        async with api.connect(subprotocols=["fewstep.live.v9"]):
            pass


async def test_too_big_a_message_closes(api: Api) -> None:
    async with go_live(api) as live:
        await live.generate(1, "x" * 70_000)
        assert (await closed(live.socket))[0] == CloseCode.TOO_BIG


async def test_idle_and_rate(start_api: StartApi) -> None:
    async with start_api(live_idle_s=0.1, live_max_messages_per_s=5) as api:
        async with go_live(api) as live:
            assert (await closed(live.socket))[0] == CloseCode.IDLE
        async with go_live(api) as live:
            for _ in range(12):
                await live.send(type="cancel")
            assert (await closed(live.socket))[0] == CloseCode.RATE


async def test_as_many_sockets_as_allowed(start_api: StartApi) -> None:
    async with start_api(max_live_connections=1) as api, go_live(api), api.connect() as second:
        code, reason = await closed(second)
        assert code == CloseCode.TRY_LATER
        assert json.loads(reason or "") == {"reconnect_in_ms": 1000}


async def test_shutdown_says_when_to_come_back(start_api: StartApi) -> None:
    async with start_api() as api:
        socket = await api.connect()
        api.server.should_exit = True
        code, reason = await closed(socket)
    assert code == CloseCode.GOING_AWAY
    assert json.loads(reason or "") == {"reconnect_in_ms": 1000}


async def test_a_reader_that_stops_is_dropped(start_api: StartApi) -> None:
    """Acknowledgements keep little under way, so a real socket's buffers hardly fill: this one never takes a byte."""

    async def never(_: object = None) -> Any:
        await asyncio.Event().wait()

    async with start_api(live_send_timeout_s=0.1) as api:
        websocket = WebSocket(
            {"type": "websocket", "path": "/v1/live", "headers": [], "query_string": b""}, never, never
        )
        websocket.client_state = websocket.application_state = WebSocketState.CONNECTED
        async with asyncio.timeout(10):
            await LiveSession(websocket, api.gateway, "session", Door(websocket, api.gateway)).run()
        assert not api.gateway.live_sockets
