"""What can go wrong.

FewstepError
├── ApiError          the service refused the request: status, code, param
│   ├── BadRequest      a field, the prompt, the key's reuse: asking again changes nothing
│   ├── Unauthorized    the key is missing, wrong or revoked, or may not do this
│   ├── NotFound        no such model or generation, or it is no longer kept
│   ├── TooBusy         over the key's rate, or the queue is full: see `retry_after_s`
│   └── ServerError     the service's own trouble
├── NotDrawn          the generation was accepted and ended without a picture
├── Unreachable       the network, or no answer in time
└── LiveClosed        the live connection is closed for good
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class FewstepError(Exception):
    """Anything that this package raises by itself."""


class ApiError(FewstepError):
    """The service refused the request. `code`, `type` and `param` are those of the API's error body."""

    def __init__(
        self, status: int, error: Mapping[str, Any], *, retry_after_s: float | None, request_id: str | None
    ) -> None:
        super().__init__(error.get("message") or f"HTTP {status}")
        self.status, self.retry_after_s, self.request_id = status, retry_after_s, request_id
        self.code: str | None = error.get("code")
        self.type: str | None = error.get("type")
        self.param: str | None = error.get("param")


class BadRequest(ApiError):
    """Asking again changes nothing; `param` names the field, the message says what is allowed."""


class Unauthorized(ApiError):
    """The API key is missing, wrong or revoked (401), or may not do this (403)."""


class NotFound(ApiError):
    """No such model or generation, or it is no longer kept."""


class TooBusy(ApiError):
    """More than the key's rate, or than the service can do in time; `retry_after_s` tells when it would fit."""


class ServerError(ApiError):
    """The service's own trouble; its log knows the `request_id`."""


class NotDrawn(FewstepError):
    """A submitted or streamed generation ended without a picture: failed, cancelled, superseded or expired."""

    def __init__(self, generation_id: str, state: str, error: Mapping[str, Any]) -> None:
        super().__init__(error.get("message") or f"generation {generation_id} was {state}")
        self.generation_id, self.state = generation_id, state
        self.code: str | None = error.get("code")


class Unreachable(FewstepError):
    """The network failed, or no answer came in time, at every try."""


class LiveClosed(FewstepError):
    """The live connection is closed for good: by this side, or for the reason in the message."""


def error_class(status: int) -> type[ApiError]:
    match status:
        case 401 | 403:
            return Unauthorized
        case 404 | 410:
            return NotFound
        case 429:
            return TooBusy
        case _:
            return ServerError if status >= 500 else BadRequest
