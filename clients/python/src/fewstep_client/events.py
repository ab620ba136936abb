"""What a live connection tells, and how its frames are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fewstep_client.results import Timings, build


@dataclass(frozen=True, slots=True)
class Ready:
    """A connection is open. It draws with `seed` and `model` where a request names none."""

    session: str
    seed: int
    model: str
    max_unacked: int
    max_message_bytes: int
    idle_s: float
    token_expires_in_s: float | None


@dataclass(frozen=True, slots=True)
class Authenticated:
    """A fresh token was taken."""

    token_expires_in_s: float | None


@dataclass(frozen=True, slots=True)
class Queued:
    """A request has its place. `refined`, here as below: it is the better picture after a pause."""

    seq: int
    request_id: str
    position: int
    predicted_start_ms: int | None
    warnings: tuple[str, ...]
    refined: bool


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of request `seq`, after `step` of its steps. `data` is an image file; `seed` draws it again."""

    frame: int
    seq: int
    request_id: str
    index: int
    step: int
    num_inference_steps: int
    seed: int
    format: str
    width: int
    height: int
    refined: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class PreviewFrame(Frame):
    """What the model predicts on the way."""


@dataclass(frozen=True, slots=True)
class FinalFrame(Frame):
    """A finished picture."""

    timings: Timings


@dataclass(frozen=True, slots=True)
class Superseded:
    """A newer request took its place: it has no picture."""

    seq: int
    request_id: str
    by: str | None
    refined: bool


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A request was cancelled."""

    seq: int
    request_id: str
    refined: bool


@dataclass(frozen=True, slots=True)
class Error:
    """A request was refused or failed. `retry_after_ms`: a later try may succeed; call `generate` again then."""

    seq: int | None
    request_id: str | None
    message: str
    type: str
    param: str | None
    code: str
    retry_after_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Reconnecting:
    """The connection is lost, and the next try comes after `delay_s`; None: when there is something to draw."""

    code: int | None
    reason: str
    delay_s: float | None


@dataclass(frozen=True, slots=True)
class Closed:
    """The last event: nothing more will come. `code` is that of docs/live-protocol.md; None if there was no close."""

    code: int | None
    reason: str


ServerEvent = Ready | Authenticated | Queued | PreviewFrame | FinalFrame | Superseded | Cancelled | Error
LiveEvent = ServerEvent | Reconnecting | Closed


def read_event(message: str | bytes) -> ServerEvent | None:
    """What the server said; None for a type that this client doesn't know."""
    return read_message(json.loads(message)) if isinstance(message, str) else read_frame(message)


def read_message(message: dict[str, Any]) -> ServerEvent | None:
    match message["type"]:
        case "ready":
            return build(Ready, message)
        case "authenticated":
            return build(Authenticated, message)
        case "queued":
            return build(Queued, message, warnings=tuple(message["warnings"]))
        case "superseded":
            return build(Superseded, message)
        case "cancelled":
            return build(Cancelled, message)
        case "error":
            return build(Error, {**message, **message["error"]})
    return None


def read_frame(message: bytes) -> PreviewFrame | FinalFrame | None:
    """4 bytes length of the header (big-endian), the header as JSON, the image file."""
    start = 4 + int.from_bytes(message[:4], "big")
    header, data = json.loads(message[4:start]), message[start:]
    match header["type"]:
        case "preview":
            return build(PreviewFrame, header, data=data)
        case "final":
            return build(FinalFrame, header, data=data, timings=build(Timings, header["timings"]))
    return None
