"""`fewstep.live.v1` on the wire: what a client may say, what it hears, and why a socket closes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, TypeAdapter, ValidationError

from app.errors import ErrorAnswer, GatewayError, InvalidRequest, invalid, invalid_from, render
from app.http import strict_json
from app.http.middleware import host_name
from app.schemas import LiveAck, LiveAuth, LiveCancel, LiveGenerate
from app.settings import is_loopback
from broker.messages import Picture, Timings

SUBPROTOCOL = "fewstep.live.v1"
AUTH_PREFIX = "fewstep.auth."  # before a key or a token, offered beside SUBPROTOCOL and never selected
HEADER_LENGTH = struct.Struct(">I")

ClientMessage = LiveGenerate | LiveCancel | LiveAck | LiveAuth
FrameType = Literal["preview", "final"]

_client_message: TypeAdapter[ClientMessage] = TypeAdapter(Annotated[ClientMessage, Field(discriminator="type")])
_fields: dict[str, frozenset[str]] = {
    "generate": frozenset(LiveGenerate.model_fields),
    "cancel": frozenset(LiveCancel.model_fields),
    "ack": frozenset(LiveAck.model_fields),
    "auth": frozenset(LiveAuth.model_fields),
}


class CloseCode(IntEnum):
    """Why the server closes a live socket. The first four are RFC 6455's own."""

    NORMAL = 1000
    TOO_BIG = 1009  # a message above the size limit told in `ready`
    GOING_AWAY = 1012  # the gateway restarts; the reason is JSON with `reconnect_in_ms`
    TRY_LATER = 1013  # as many live sockets are open as the gateway allows; the reason as above
    AUTH = 4401  # the key or token is missing, wrong or has ended
    IDLE = 4408  # no message for the idle limit told in `ready`
    RATE = 4429  # messages came faster than the gateway reads
    SLOW = 4430  # the client didn't read for the send timeout


class SessionEnd(Exception):
    """The session is over; `code` is None when the client closed it."""

    def __init__(self, code: CloseCode | None, reason: str = "") -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture for the client. `rank` orders what is newer: by seq, and within one seq the refined final last."""

    type: FrameType
    seq: int
    request_id: str
    picture: Picture
    step: int
    num_inference_steps: int
    is_refined: bool = False
    timings: Timings | None = None

    @property
    def rank(self) -> tuple[int, bool]:
        return self.seq, self.is_refined


def pack_frame(frame: Frame, number: int) -> bytes:
    """4-byte big-endian length of the header, the header as JSON, the bytes of the image."""
    header = json.dumps(_frame_header(frame, number), separators=(",", ":")).encode()
    return HEADER_LENGTH.pack(len(header)) + header + frame.picture.data


def _frame_header(frame: Frame, number: int) -> dict[str, Any]:
    picture = frame.picture
    return {
        "type": frame.type,
        "frame": number,
        "seq": frame.seq,
        "request_id": frame.request_id,
        "index": picture.index,
        "step": frame.step,
        "num_inference_steps": frame.num_inference_steps,
        "seed": picture.seed,
        "format": picture.format,
        "width": picture.width,
        "height": picture.height,
        "refined": frame.is_refined,
        "timings": _show_timings(frame.timings),
    }


def _show_timings(timings: Timings | None) -> dict[str, float] | None:
    if timings is None:
        return None
    stages = ("queue", "text", "denoise", "decode", "check", "encode", "total")
    return {f"{stage}_ms": round(getattr(timings, f"{stage}_ms"), 3) for stage in stages}


def parse_message(text: str) -> ClientMessage:
    """Raises InvalidRequest that names the field."""
    try:
        return _client_message.validate_python(strict_json.parse(text))
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the message is not valid JSON: {error.msg}", code="invalid_json") from None
    except ValidationError as error:
        details = error.errors()[0]
        match details["type"]:
            case "union_tag_not_found" | "union_tag_invalid":
                tag = details.get("ctx", {}).get("tag")
                raise invalid("type", tag, f"it must be one of {', '.join(_fields)}") from None
            case "model_attributes_type" | "dataclass_type":
                raise invalid_from(details, (), skip=len(details["loc"])) from None
            case _:
                kind = str(details["loc"][0]) if details["loc"] else ""
                raise invalid_from(details, _fields.get(kind, ()), skip=1) from None


def find_seq(text: str) -> int | None:
    """The seq of a message that was refused, so that its error can carry it."""
    try:
        message = strict_json.parse(text)
    except json.JSONDecodeError:
        return None
    seq = message.get("seq") if isinstance(message, dict) else None
    return seq if isinstance(seq, int) and not isinstance(seq, bool) and abs(seq) < 2**53 else None


def show_error(error: Exception, seq: int | None, request_id: str | None = None) -> dict[str, Any]:
    """An `error` message: OpenAI's shape inside, plus when to try again."""
    answer: ErrorAnswer = render(error)
    retry_after_ms = error.retry_after_ms if isinstance(error, GatewayError) else None
    message = {"type": "error", "seq": seq, "request_id": request_id, **answer.body}
    return message if retry_after_ms is None else message | {"retry_after_ms": retry_after_ms}


def reconnect_reason(reconnect_in_ms: int) -> str:
    return json.dumps({"reconnect_in_ms": reconnect_in_ms})


def check_origin(origin: str | None, host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a page of `origin` may open a socket here; browsers let any page try.

    No Origin is no browser. The same host and port pass, loopback names counting as one host, and what the settings
    allow.
    """
    if origin is None or origin.rstrip("/") in allowed:
        return True
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return False
    if parts.netloc.lower() == host.lower():
        return True
    own = urlsplit(f"//{host}")
    both_loopback = is_loopback(host_name(parts.netloc)) and is_loopback(host_name(host))
    return both_loopback and _port(parts.netloc) == _port(own.netloc)


def _port(netloc: str) -> str:
    _, separator, port = netloc.rpartition(":")
    return port if separator and port.isdigit() else "80"


def show_ready(session: str, seed: int, model: str, limits: Mapping[str, float | None]) -> dict[str, Any]:
    return {
        "type": "ready",
        "seq": None,
        "request_id": None,
        "protocol": SUBPROTOCOL,
        "session": session,
        "seed": seed,
        "model": model,
        **limits,
    }


def show_authenticated(token_expires_in_s: float | None) -> dict[str, Any]:
    """The answer to `auth` on a socket that is open already."""
    return {"type": "authenticated", "seq": None, "request_id": None, "token_expires_in_s": token_expires_in_s}
