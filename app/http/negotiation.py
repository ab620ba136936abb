"""What a caller wants back: the Accept and Prefer headers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

from app.errors import InvalidRequest, NotAcceptable
from broker.messages import ImageFormat

FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)
DEFAULT_FORMAT: ImageFormat = "jpeg"
JSON_TYPE = "application/json"
OFFERED = (JSON_TYPE, *(f"image/{format}" for format in FORMATS))


@dataclass(frozen=True, slots=True)
class Answer:
    """The form of the answer: JSON, or the bytes of one picture; and the format of the pictures either way."""

    is_bytes: bool
    format: ImageFormat


@dataclass(frozen=True, slots=True)
class Preference:
    """`Prefer: respond-async, wait=N`. `wait_s` is None where the caller names no time."""

    is_async: bool = False
    wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Range:
    """One entry of Accept, "image/*" for instance."""

    type: str
    quality: float
    order: int

    def covers(self, offered: str) -> bool:
        return self.type in ("*/*", offered) or self.type == f"{offered.partition('/')[0]}/*"

    @property
    def precision(self) -> int:
        return 2 - self.type.count("*")


def negotiate(accept: str | None, output_format: ImageFormat | None, num_images: int) -> Answer:
    """Chooses by quality, then by the order in Accept; an explicit image type there wins over `output_format`.

    Without a preference (no header, or only `*/*`) the answer is JSON, or bytes once `output_format` is given. Several
    pictures are bytes never: JSON where it is accepted, else NotAcceptable.
    """
    ranges = _parse_accept(accept)
    if all(range.type == "*/*" and range.quality > 0 for range in ranges):
        return Answer(output_format is not None and num_images == 1, output_format or DEFAULT_FORMAT)
    accepted = _sort_offered(ranges, output_format)
    if not accepted:
        raise NotAcceptable(f"Accept: none of its types is offered; offered: {', '.join(OFFERED)}")
    if num_images > 1 and JSON_TYPE not in accepted:
        raise NotAcceptable(f"an answer of bytes holds one picture and {num_images} are asked for: accept {JSON_TYPE}")
    if num_images > 1 or accepted[0] == JSON_TYPE:
        return Answer(False, output_format or DEFAULT_FORMAT)
    return Answer(True, _format_of(accepted[0]))


def _sort_offered(ranges: list[_Range], output_format: ImageFormat | None) -> list[str]:
    """The types that Accept allows, best first. What it leaves open, `output_format` decides."""
    wanted = f"image/{output_format or DEFAULT_FORMAT}"
    favourites = (wanted, JSON_TYPE) if output_format else (JSON_TYPE, wanted)
    by_taste = dict.fromkeys((*favourites, *OFFERED))
    keys: dict[str, tuple[float, int, int, int]] = {}
    for taste, offered in enumerate(by_taste):
        covering = [range for range in ranges if range.covers(offered)]
        if covering and (best := max(covering, key=lambda range: range.precision)).quality > 0:
            keys[offered] = (-best.quality, -best.precision, best.order, taste)
    return sorted(keys, key=lambda offered: keys[offered])


def _format_of(media_type: str) -> ImageFormat:
    return next(format for format in FORMATS if media_type == f"image/{format}")


def _parse_accept(accept: str | None) -> list[_Range]:
    parts = [part for part in (accept or "").lower().split(",") if part.strip()]
    return [_parse_range(part, order) for order, part in enumerate(parts)]


def _parse_range(part: str, order: int) -> _Range:
    type, *parameters = (piece.strip() for piece in part.split(";"))
    quality = next((value[2:] for value in parameters if value.startswith("q=")), "1")
    type = "image/jpeg" if type == "image/jpg" else type
    return _Range(type, float(quality) if re.fullmatch(r"[01](\.\d{0,3})?", quality) else 1.0, order)


def parse_prefer(values: list[str]) -> Preference:
    """The two preferences that we know (RFC 7240); others are ignored, as the RFC wants."""
    is_async, wait_s = False, None
    for token in (token.strip().lower() for value in values for token in value.split(",")):
        name, _, argument = (piece.strip() for piece in token.partition("="))
        if name == "respond-async":
            is_async = True
        elif name == "wait":
            wait_s = _parse_wait(argument.strip('"'))
    return Preference(is_async, wait_s)


def _parse_wait(argument: str) -> float:
    if not re.fullmatch(r"\d{1,6}", argument):
        raise InvalidRequest(f"Prefer: wait={argument[:20]!r} is not a number of whole seconds", param="Prefer")
    return float(argument)
