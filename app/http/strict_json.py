"""JSON as RFC 8259 has it, in UTF-8: what Python's own parser takes beyond that is refused with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.requests import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from app.errors import shorten

MAX_NUMBER_CHARS = 1000


def parse(data: bytes | str) -> Any:
    """Raises json.JSONDecodeError for anything that isn't JSON, and for names that come twice in one object.

    NaN and Infinity pass, for the field that they stand in to be named when it refuses them.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError(f"not UTF-8 from byte {error.start} on", "", error.start) from None
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_parse_int, parse_float=_parse_float)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
    except _Refused as refused:
        raise json.JSONDecodeError(str(refused), "", 0) from None


class _Refused(Exception):
    """Something that json.loads would take."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Refused(f"{shorten(next(name for name in unique if names.count(name) > 1))} comes twice")
    return unique


def _parse_int(digits: str) -> int:
    """Python's own limit would be 4300 digits, which take it a while."""
    if len(digits) > MAX_NUMBER_CHARS:
        raise _Refused(f"a number of {len(digits)} digits")
    return int(digits)


def _parse_float(digits: str) -> float | int:
    """7.0 is the integer 7, as JSON Schema has it; above 2^53 a double is no exact integer any more."""
    number = float(digits)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


class StrictRequest(Request):
    """A request whose body is parsed by `parse`."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse(await self.body())
        return self._json


class JsonRoute(APIRoute):
    """A route that takes strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly
