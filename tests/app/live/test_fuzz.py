"""Whatever comes in over a live socket is answered or closes it with a code of the protocol; nothing kills it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from app.errors import InvalidRequest
from app.live.protocol import CloseCode, parse_message
from app.schemas import LiveAck, LiveCancel, LiveGenerate
from tests.app.conftest import Api, StartApi
from tests.app.peers import unpack

MAX_BYTES = 4096
ANSWERS = {"error", "queued", "superseded", "cancelled"}
QUICK = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))

names = st.sampled_from([*LiveGenerate.model_fields, "frame", "", "a", "__proto__"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4))
objects = st.dictionaries(names, values, max_size=6)
messages = st.builds(
    lambda type, fields: {**fields, "type": type}, st.sampled_from(["generate", "cancel", "ack"]), objects
)
surrogates = st.text(st.characters(categories=["Cs", "L"]), min_size=1, max_size=5)
texts = st.one_of(
    (messages | values).map(json.dumps),
    st.text(max_size=200),
    st.builds(lambda depth, unit: unit * depth, st.integers(1, 1000), st.sampled_from(["[", '{"a":', "9", "-", '"'])),
    surrogates.map(lambda text: json.dumps({"type": "generate", "seq": 1, "prompt": text})),
)


@given(texts | st.integers(10_000, 30_000).map(lambda depth: '{"refine":' * depth))
@QUICK
def test_the_parser_gives_a_message_or_names_the_fault(text: str) -> None:
    try:
        outcome: object = parse_message(text)
    except InvalidRequest as error:
        outcome = error
    if isinstance(outcome, InvalidRequest):
        assert 0 < len(str(outcome)) < 600
    else:
        assert isinstance(outcome, LiveGenerate | LiveCancel | LiveAck)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(start_api: StartApi) -> AsyncIterator[Api]:
    async with start_api(live_max_message_bytes=MAX_BYTES, live_max_messages_per_s=100_000) as api:
        yield api


async def draw(websocket: ClientConnection, seq: int) -> None:
    """Raises TimeoutError unless a picture comes."""
    await websocket.send(json.dumps({"type": "generate", "seq": seq, "prompt": "a red apple", "num_images": 1}))
    async for message in websocket:
        if isinstance(message, bytes):
            header = unpack(message).header
            await websocket.send(json.dumps({"type": "ack", "frame": header["frame"]}))
            if (header["seq"], header["type"]) == (seq, "final"):
                return
        else:
            assert json.loads(message)["type"] in ANSWERS | {"ready"}


@pytest.mark.asyncio(loop_scope="module")
async def test_a_socket_survives_any_message_and_still_draws(api: Api) -> None:
    """One socket for all: each rubbish message gets an `error` with its reason before the next is sent."""
    rubbish: list[Any] = []

    @given(st.lists(texts | st.binary(max_size=200), min_size=100, max_size=100))
    @settings(max_examples=1, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    def collect(messages: list[Any]) -> None:
        rubbish[:] = [message for message in messages if is_sendable(message)]

    collect()
    assert len(rubbish) > 50
    async with api.connect() as websocket:
        await websocket.recv()
        for message in rubbish:
            await websocket.send(message)
            assert json.loads(await websocket.recv())["type"] == "error", message
        await draw(websocket, seq=2**52)


def is_sendable(message: Any) -> bool:
    """Rubbish only: neither a message that is right nor one that closes the socket."""
    if isinstance(message, bytes):
        return True
    try:
        parse_message(message)
    except InvalidRequest:
        return len(message.encode("utf-8", "surrogatepass")) <= MAX_BYTES and is_text(message)
    return False


def is_text(message: str) -> bool:
    return message.isascii() or message.encode("utf-8", "ignore").decode() == message


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\x81\xfe\x20\x00" + b"\x00" * 4 + b"[" * 0x2000, CloseCode.TOO_BIG),
        (b"\x81\xff" + b"\x7f" + b"\xff" * 7 + b"\x00" * 4, CloseCode.TOO_BIG),
        (b"\x01\xfe\x0f\x00" + b"\x00" * 4 + b"[" * 0xF00 + b"\x80\xfe\x0f\x00" + b"\x00" * 4 + b"[" * 0xF00, 1009),
        (b"\x81\x82" + b"\x00" * 4 + b"\xff\xfe", 1007),
        (b"\x81\x83" + b"\x00" * 4 + b"\xed\xa0\x80", 1007),
        (b"\x81\x02{}", 1002),
        (b"\xf1\x82" + b"\x00" * 4 + b"{}", 1002),
        (b"\x83\x80" + b"\x00" * 4, 1002),
        (b"\x09\x80" + b"\x00" * 4, 1002),
        (b"\x80\x82" + b"\x00" * 4 + b"{}", 1002),
    ],
    ids=[
        "too long",
        "2^63 long",
        "too long in pieces",
        "not UTF-8",
        "a surrogate",
        "not masked",
        "reserved bits",
        "a reserved kind",
        "a ping in pieces",
        "a piece of nothing",
    ],
)
async def test_frames_against_the_protocol_close_with_their_code(api: Api, frame: bytes, code: int) -> None:
    async with api.connect() as websocket:
        await websocket.recv()
        websocket.transport.write(frame)
        with pytest.raises(ConnectionClosed) as closed:
            await websocket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == code
    async with api.connect() as again:
        await draw(again, seq=1)
