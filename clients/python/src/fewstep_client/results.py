"""What comes back over HTTP, and how JSON becomes dataclasses."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds per stage; `check_ms` is the safety checker's."""

    queue_ms: float
    text_ms: float
    denoise_ms: float
    decode_ms: float
    check_ms: float
    encode_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class Preview:
    """What the model predicts after `step` of its steps. `data` is an image file."""

    index: int
    step: int
    num_inference_steps: int
    format: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture. `data` is an image file; `warnings` name what was asked for without effect."""

    generation_id: str
    model: str
    index: int
    seed: int
    format: str
    width: int
    height: int
    data: bytes
    timings: Timings
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LiveToken:
    """What a page opens its live socket with, instead of the API key. `expires_at`: seconds since the epoch."""

    token: str
    expires_at: float
    expires_in_s: int
    model: str
    origin: str


def build(kind: type[T], source: Mapping[str, Any], /, **more: Any) -> T:
    """A dataclass of what it knows of `source`: a newer service may say more."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in source.items() if name in known} | more)


def read_preview(data: Mapping[str, Any]) -> Preview:
    return build(Preview, data, data=base64.b64decode(data["b64_json"]))


def read_pictures(generation: Mapping[str, Any]) -> tuple[Picture, ...]:
    """Of a generation's JSON with its pictures in base64."""
    shared = {
        "generation_id": generation["id"],
        "model": generation["model"],
        "timings": build(Timings, generation["timings"]),
        "warnings": tuple(generation["warnings"]),
    }
    return tuple(
        build(Picture, image, data=base64.b64decode(image["b64_json"]), **shared) for image in generation["images"]
    )
