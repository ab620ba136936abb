from __future__ import annotations

import json
import struct

import pytest

from app.errors import InvalidRequest
from app.live.protocol import CloseCode, Frame, check_origin, find_seq, pack_frame, parse_message, reconnect_reason
from app.schemas import LiveAck, LiveCancel, LiveGenerate
from broker.messages import Picture, Timings


def test_a_frame_is_length_header_and_image() -> None:
    picture = Picture(2, 9, "jpeg", 64, 48, b"bytes of a jpeg")
    timings = Timings(1, 2, 3, 4, 5, 15, (1.5, 1.5), 0.5)
    message = pack_frame(Frame("final", 7, "id", picture, 2, 2, timings=timings), number=3)
    (length,) = struct.unpack(">I", message[:4])
    assert message[4 + length :] == b"bytes of a jpeg"
    header = json.loads(message[4 : 4 + length])
    assert header == {
        "type": "final",
        "frame": 3,
        "seq": 7,
        "request_id": "id",
        "index": 2,
        "step": 2,
        "num_inference_steps": 2,
        "seed": 9,
        "format": "jpeg",
        "width": 64,
        "height": 48,
        "refined": False,
        "timings": {
            "queue_ms": 1,
            "text_ms": 2,
            "denoise_ms": 3,
            "decode_ms": 4,
            "check_ms": 0.5,
            "encode_ms": 5,
            "total_ms": 15,
        },
    }


def test_messages() -> None:
    generate = parse_message('{"type":"generate","seq":3,"prompt":"x","refine":{"after_ms":200}}')
    assert isinstance(generate, LiveGenerate)
    assert generate.refine is not None
    assert (generate.seq, generate.refine.after_ms) == (3, 200)
    assert parse_message('{"type":"cancel"}') == LiveCancel(type="cancel")
    assert parse_message('{"type":"ack","frame":5}') == LiveAck(type="ack", frame=5)


@pytest.mark.parametrize(
    ("text", "param", "words"),
    [
        ("not json", None, "not valid JSON"),
        ("[]", None, "body"),
        ("{}", "type", "generate, cancel, ack"),
        ('{"type":"dance"}', "type", "'dance' is not allowed"),
        ('{"type":"generate","seq":1}', "prompt", "is required"),
        ('{"type":"generate","prompt":"x"}', "seq", "is required"),
        ('{"type":"generate","seq":true,"prompt":"x"}', "seq", "integer"),
        ('{"type":"generate","seq":-1,"prompt":"x"}', "seq", "greater than or equal to 0"),
        ('{"type":"generate","seq":1,"prompt":"x","step":4}', "step", "unknown field"),
        ('{"type":"generate","seq":1,"prompt":"x","refine":{"after":4}}', "refine.after", "; it has to go"),
        ('{"type":"generate","seq":1,"prompt":"x","guidance_scale":NaN}', "guidance_scale", "finite"),
        ('{"type":"generate","seq":1,"prompt":"\\ud800"}', "prompt", "lone surrogates"),
        ('{"type":"cancel","type":"ack"}', None, "'type' comes twice"),
        ('{"type":"ack","frame":0}', "frame", "greater than or equal to 1"),
    ],
)
def test_bad_messages_are_named(text: str, param: str | None, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_message(text)
    assert caught.value.param == param
    assert words in str(caught.value)


def test_a_refused_message_keeps_its_seq() -> None:
    assert find_seq('{"type":"generate","seq":4,"x":1}') == 4
    for text in ("", "[]", '{"seq":true}', '{"seq":"4"}', "[" * 100_000, '{"seq":1e999}'):
        assert find_seq(text) is None


@pytest.mark.parametrize(
    ("origin", "host", "is_welcome"),
    [
        (None, "127.0.0.1:8000", True),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("http://localhost:8000", "127.0.0.1:8000", True),
        ("http://[::1]:8000", "localhost:8000", True),
        ("http://localhost:3000", "127.0.0.1:8000", False),
        ("https://pictures.example", "pictures.example", True),
        ("https://other.example", "pictures.example", False),
        ("https://friend.example", "pictures.example", True),
        ("null", "127.0.0.1:8000", False),
        ("file://", "127.0.0.1:8000", False),
        ("http://127.0.0.1.other.example:8000", "127.0.0.1:8000", False),
    ],
)
def test_origins(origin: str | None, host: str, is_welcome: bool) -> None:
    assert check_origin(origin, host, ("https://friend.example",)) is is_welcome


def test_close_codes_are_private_or_standard() -> None:
    assert all(code in (1000, 1009, 1012, 1013) or 4000 <= code < 5000 for code in CloseCode)
    assert len(reconnect_reason(60_000)) <= 123
