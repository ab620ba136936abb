"""Every way to say no, and the one table from error to answer.

GatewayError
├── InvalidRequest           a field that is missing, unknown or out of its limits
├── PromptBlocked            the operator's prompt check refused it
├── PromptCheckFailed        the operator's prompt check gave no answer
├── UnsupportedBody          a body that isn't declared as JSON, or that is compressed
├── NotAcceptable            none of the types in Accept can be made
├── ModelNotReady            no live worker holds the model warm
├── Overloaded               admission refused: come back after `retry_after_ms`
├── DeadlineTooShort         not even an idle worker would be done in time
├── ImageNotReady            the generation hasn't ended yet
├── ImageGone                the picture is no longer kept
├── GenerationFailed         the request ended without a picture
│   ├── GenerationCancelled
│   ├── GenerationSuperseded
│   ├── GenerationExpired
│   └── PictureBlocked       the model's safety checker blocked what was drawn
├── Unauthorized             the API key is missing, wrong or revoked
├── Forbidden                the key may not use this model or lane
├── RateExceeded             more than the key's requests or images per minute
├── InvalidToken             a signed token that is forged, made for something else, or expired
├── WrongHost                a Host header that doesn't name this server
└── ClientGone               nobody is left to read the answer

The shape is OpenAI's over the whole API: `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from broker.errors import BrokerError, BrokerUnavailable, IdempotencyConflict, RequestNotFound
from broker.messages import CONTENT_BLOCKED, Cancelled, Expired, Failed, JobError, Superseded
from models.catalog import UnknownModelError

MAX_SHOWN_CHARS = 60


class GatewayError(Exception):
    """Anything that this package answers with."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.retry_after_ms = param, code, retry_after_ms


class InvalidRequest(GatewayError):
    """A field that is missing, unknown or out of its limits; the message says what is allowed."""


class PromptBlocked(GatewayError):
    """The operator's prompt check refused it."""


class PromptCheckFailed(GatewayError):
    """The operator's prompt check gave no answer, which is not a yes."""


class UnsupportedBody(GatewayError):
    """A body that isn't declared as JSON, or that is compressed."""


class NotAcceptable(GatewayError):
    """None of the types in Accept can be made."""


class ModelNotReady(GatewayError):
    """No live worker holds the model warm."""


class Overloaded(GatewayError):
    """Admission refused: come back after `retry_after_ms`."""


class DeadlineTooShort(GatewayError):
    """Not even an idle worker would be done in time: coming back doesn't help."""


class ImageNotReady(GatewayError):
    """The generation hasn't ended yet."""


class ImageGone(GatewayError):
    """The picture is no longer kept."""


class GenerationFailed(GatewayError):
    """The request ended without a picture."""


class GenerationCancelled(GenerationFailed):
    """Somebody cancelled it."""


class GenerationSuperseded(GenerationFailed):
    """A newer request of its session took its place."""


class GenerationExpired(GenerationFailed):
    """Its deadline passed before it could be drawn."""


class PictureBlocked(GenerationFailed):
    """The model's safety checker blocked what was drawn."""


class Unauthorized(GatewayError):
    """The API key is missing, wrong or revoked."""


class Forbidden(GatewayError):
    """The key may not use this model or lane."""


class RateExceeded(GatewayError):
    """More than the key's requests or images per minute: come back after `retry_after_ms`."""


class InvalidToken(GatewayError):
    """A signed token that is forged, made for something else, or expired."""


class WrongHost(GatewayError):
    """A Host header that doesn't name this server: a page elsewhere may be rebinding DNS."""


class ClientGone(GatewayError):
    """Nobody is left to read the answer."""


@dataclass(frozen=True, slots=True)
class Row:
    """How one kind of error is answered. `should_retry` overrides what clients conclude from the status.

    `more_codes` are those that an error of this kind may carry in place of `code`; `says_when`: whether the answer can
    tell when to come back; `meaning` says in the documents what the docstring of the error doesn't.
    """

    status: int
    type: str
    code: str
    should_retry: bool | None = None
    more_codes: tuple[str, ...] = ()
    says_when: bool = False
    meaning: str = ""

    @property
    def codes(self) -> tuple[str, ...]:
        return self.code, *self.more_codes


_REQUEST = "invalid_request_error"
_SERVER = "server_error"

FIELD_CODES = (
    *("missing_field", "unknown_field", "text_too_long", "unknown_class"),
    *("unsupported_size", "lora_not_found"),
)
BODY_CODES = ("missing_body", "invalid_json", "bad_request")

TABLE: dict[type[Exception], Row] = {
    InvalidRequest: Row(
        400,
        _REQUEST,
        "invalid_value",
        more_codes=(*FIELD_CODES, *BODY_CODES),
        meaning="a field; `param` names it, the message says what is allowed",
    ),
    WrongHost: Row(
        400, _REQUEST, "wrong_host", meaning="the `Host` header names another server (`FEWSTEP_ALLOWED_HOSTS`)"
    ),
    PromptBlocked: Row(400, _REQUEST, CONTENT_BLOCKED, meaning="the operator's prompt check refused the prompt"),
    PictureBlocked: Row(400, _REQUEST, CONTENT_BLOCKED, meaning="the model's safety checker blocked the picture"),
    Unauthorized: Row(401, _REQUEST, "invalid_api_key"),
    InvalidToken: Row(401, _REQUEST, "invalid_token", more_codes=("token_expired",)),
    Forbidden: Row(403, _REQUEST, "not_allowed", more_codes=("model_not_allowed", "lane_not_allowed")),
    UnknownModelError: Row(404, _REQUEST, "model_not_found", meaning="the catalog has no such model"),
    RequestNotFound: Row(404, _REQUEST, "generation_not_found", meaning="no such generation, or it is no longer kept"),
    ImageNotReady: Row(404, _REQUEST, "image_not_ready", says_when=True),
    NotAcceptable: Row(406, _REQUEST, "not_acceptable", meaning="none of the types in `Accept` can be made"),
    GenerationCancelled: Row(409, _REQUEST, "cancelled", should_retry=False, meaning="the request was cancelled"),
    GenerationSuperseded: Row(409, _REQUEST, "superseded", should_retry=False),
    IdempotencyConflict: Row(
        409, _REQUEST, "idempotency_key_reused", should_retry=False, meaning="the key belongs to another body"
    ),
    ImageGone: Row(410, _REQUEST, "image_gone"),
    UnsupportedBody: Row(
        415, _REQUEST, "unsupported_media_type", meaning="the body is not declared as JSON, or it is compressed"
    ),
    Overloaded: Row(
        429,
        "rate_limit_error",
        "queue_full",
        more_codes=("result_store_full", "deadline_unreachable"),
        says_when=True,
        meaning="come back after `Retry-After` (seconds) or `retry-after-ms`",
    ),
    DeadlineTooShort: Row(
        429,
        "rate_limit_error",
        "deadline_too_short",
        should_retry=False,
        meaning="not even an idle worker would be done within `deadline_ms`",
    ),
    RateExceeded: Row(
        429,
        "rate_limit_error",
        "rate_limit_exceeded",
        says_when=True,
        meaning="more than the key's requests or images per minute",
    ),
    ClientGone: Row(499, _REQUEST, "client_gone"),
    GenerationFailed: Row(
        500,
        _SERVER,
        "generation_failed",
        should_retry=False,
        more_codes=("internal_error", "attempts_exhausted", "unreadable_job"),
        meaning="the request ended without a picture, and would again",
    ),
    ModelNotReady: Row(503, _SERVER, "model_not_ready", says_when=True),
    PromptCheckFailed: Row(
        503, _SERVER, "prompt_check_failed", says_when=True, meaning="the operator's prompt check gave no answer"
    ),
    BrokerUnavailable: Row(503, _SERVER, "queue_unavailable", says_when=True, meaning="the queue can't be reached"),
    BrokerError: Row(500, _SERVER, "queue_error", meaning="the queue refused the request"),
    GenerationExpired: Row(
        504,
        _SERVER,
        "deadline_exceeded",
        should_retry=False,
        meaning="the deadline passed first, or OpenAI's route waited `FEWSTEP_SYNC_WAIT_S`",
    ),
}
RETRYABLE_FAILURE = Row(
    503,
    _SERVER,
    "generation_failed",
    should_retry=True,
    more_codes=("out_of_memory", "worker_lost", "request_lost"),
    says_when=True,
    meaning="the same request may succeed later",
)
UNKNOWN = Row(500, _SERVER, "internal_error", meaning="our fault; the log has the `X-Request-Id`")
# What the server and the web framework refuse by themselves, before a route is asked.
BY_STATUS: dict[int, Row] = {
    404: Row(404, _REQUEST, "not_found", meaning="there is nothing at this path"),
    405: Row(405, _REQUEST, "method_not_allowed", meaning="the path has other methods, listed in `Allow`"),
    408: Row(
        408,
        _REQUEST,
        "request_timeout",
        meaning="headers or body took longer than `FEWSTEP_HEADER_TIMEOUT_S`, `FEWSTEP_BODY_TIMEOUT_S`",
    ),
    413: Row(413, _REQUEST, "body_too_large", meaning="the body is larger than `FEWSTEP_MAX_BODY_BYTES`"),
    414: Row(414, _REQUEST, "url_too_long", meaning="URL and headers are larger than `FEWSTEP_MAX_HEADER_BYTES`"),
    431: Row(431, _REQUEST, "headers_too_large", meaning="URL and headers are larger than `FEWSTEP_MAX_HEADER_BYTES`"),
    503: Row(
        503,
        _SERVER,
        "too_many_connections",
        says_when=True,
        meaning="`FEWSTEP_MAX_CONNECTIONS` connections are open",
    ),
}
_FIXED_TEXTS: dict[type[Exception], str] = {
    BrokerUnavailable: "the queue can't be reached right now, try again",
    BrokerError: "the queue refused this request",
}
_PARAMS: dict[type[Exception], str] = {UnknownModelError: "model", IdempotencyConflict: "Idempotency-Key"}
_DEFAULT_RETRY_AFTER_MS = 1000


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error as it leaves: status, body and headers."""

    status: int
    body: dict[str, dict[str, str | None]]
    headers: dict[str, str]

    @property
    def code(self) -> str:
        return self.body["error"]["code"] or ""


def find_kind(kind: type[Exception]) -> type[Exception] | None:
    """The error itself or the nearest above it that has a row."""
    return next((base for base in kind.__mro__ if base in TABLE), None)


def render(error: Exception) -> ErrorAnswer:
    """The answer to a domain error; anything not in the table is an internal error without details."""
    kind = find_kind(type(error))
    if kind is None:
        return answer(UNKNOWN, "internal error, see the server's log for this request id")
    row = TABLE[kind]
    if not isinstance(error, GatewayError):
        retry_after_ms = _DEFAULT_RETRY_AFTER_MS if row.says_when else None
        text = _FIXED_TEXTS.get(kind, str(error))
        return answer(row, text, param=_PARAMS.get(kind), retry_after_ms=retry_after_ms)
    if kind is GenerationFailed and error.retry_after_ms is not None:
        row = RETRYABLE_FAILURE
    return answer(row, str(error), param=error.param, code=error.code, retry_after_ms=error.retry_after_ms)


def answer(
    row: Row, message: str, *, param: str | None = None, code: str | None = None, retry_after_ms: int | None = None
) -> ErrorAnswer:
    headers = {"WWW-Authenticate": "Bearer"} if row.status == 401 else {}
    if retry_after_ms is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_ms / 1000)))
        headers["retry-after-ms"] = str(retry_after_ms)
    if row.should_retry is not None:
        headers["x-should-retry"] = str(row.should_retry).lower()
    return ErrorAnswer(row.status, error_body(message, row.type, param=param, code=code or row.code), headers)


def error_body(message: str, type: str, *, param: str | None, code: str) -> dict[str, dict[str, str | None]]:
    return {"error": {"message": _printable(message), "type": type, "param": param and _printable(param), "code": code}}


def http_error(status: int, detail: str) -> ErrorAnswer:
    """The answer to what the server or the web framework refuses by itself."""
    fallback = Row(status, _REQUEST if status < 500 else _SERVER, "bad_request")
    row = BY_STATUS.get(status, fallback)
    return answer(row, detail, retry_after_ms=_DEFAULT_RETRY_AFTER_MS if row.says_when else None)


def invalid(param: str, value: object, allowed: str, *, code: str = "invalid_value") -> InvalidRequest:
    """The refusal of one field: its name, its value shortened, and what is allowed."""
    return InvalidRequest(f"{param}: {shorten(value)} is not allowed; {allowed}", param=param, code=code)


def shorten(value: object) -> str:
    """A value as an error may repeat it: never more of it than fits on half a line."""
    match value:
        case str():
            return repr(value[:MAX_SHOWN_CHARS]) + (" …" if len(value) > MAX_SHOWN_CHARS else "")
        case bool() | None:
            return json.dumps(value)
        case int() if value.bit_length() > 200:
            return "a number with hundreds of bits"
        case int() | float():
            return repr(value)
        case dict():
            return "an object"
        case list():
            return "a list"
        case _:
            return "this value"


def _printable(text: str) -> str:
    """JSON in UTF-8 has no place for lone surrogates, which a request may carry."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def invalid_from(details: Mapping[str, Any], known_fields: Iterable[str], skip: int = 0) -> InvalidRequest:
    """One of pydantic's findings in our words. `skip` parts of its location name no field."""
    param = ".".join(str(part) for part in details["loc"][skip:])[:MAX_SHOWN_CHARS] or None
    kind, value = details["type"], details.get("input")
    match kind:
        case "missing":
            return InvalidRequest(f"{param}: is required", param=param, code="missing_field")
        case "extra_forbidden":
            is_nested = len(details["loc"]) > skip + 1  # the known fields are those of the body itself
            return _unknown_field(param or "", () if is_nested else known_fields)
        case "json_invalid":
            reason = details.get("ctx", {}).get("error", "not JSON")
            return InvalidRequest(f"the body is not valid JSON: {reason}", code="invalid_json")
        case "string_unicode":
            return InvalidRequest(f"{param}: has code points that are no text (lone surrogates)", param=param)
        case _:
            what = details["msg"].removeprefix("Input ").removeprefix("Value error, ")
            return InvalidRequest(f"{param or 'body'}: {what}, got {shorten(value)}", param=param)


def _unknown_field(param: str, known_fields: Iterable[str]) -> InvalidRequest:
    known = sorted(known_fields)
    close = difflib.get_close_matches(param, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    allowed = f"{hint}allowed: {', '.join(known)}" if known else "it has to go"
    return InvalidRequest(f"unknown field {shorten(param)}; {allowed}", param=param, code="unknown_field")


Raiser = TypeVar("Raiser", bound=Callable[..., Any])


def raises(*what: type[Exception] | int | Callable[..., Any]) -> Callable[[Raiser], Raiser]:
    """Notes on a route, a dependency or a function which errors leave it: the OpenAPI document is made from the notes.

    A number is a status of `BY_STATUS`, a function stands for what is noted on it.
    """

    def note(function: Raiser) -> Raiser:
        function.__raises__ = tuple(row for one in what for row in _rows_of(one))  # type: ignore[attr-defined]
        return function

    return note


def noted_rows(function: Callable[..., Any] | None) -> tuple[Row, ...]:
    """The rows of the errors that `raises` noted on it."""
    return getattr(function, "__raises__", ())


def _rows_of(what: type[Exception] | int | Callable[..., Any]) -> tuple[Row, ...]:
    if isinstance(what, int):
        return (BY_STATUS[what],)
    if not isinstance(what, type):
        return noted_rows(what)
    kind = find_kind(what)
    row = explained(kind) if kind else UNKNOWN
    return (row, RETRYABLE_FAILURE) if kind is GenerationFailed else (row,)


def explained(kind: type[Exception]) -> Row:
    """The row of an error, its meaning filled in."""
    row = TABLE[kind]
    sentence = (kind.__doc__ or "").partition("\n")[0].rstrip(".")
    return row if row.meaning else replace(row, meaning=sentence[:1].lower() + sentence[1:])


@raises(GenerationFailed, *GenerationFailed.__subclasses__())
def ending_error(ending: Failed | Superseded | Cancelled | Expired) -> GenerationFailed:
    """What a waiting caller is told of an ending without a picture."""
    match ending:
        case Failed(error=error):
            return _failure(error)
        case Superseded():
            return GenerationSuperseded("a newer request of its session took its place")
        case Cancelled():
            return GenerationCancelled("the generation was cancelled")
        case Expired():
            return GenerationExpired("the deadline passed before the picture could be drawn", param="deadline_ms")


def _failure(error: JobError) -> GenerationFailed:
    if error.code == CONTENT_BLOCKED:
        return PictureBlocked(error.message)
    retry_after_ms = _DEFAULT_RETRY_AFTER_MS if error.is_retryable else None
    return GenerationFailed(error.message, code=error.code, retry_after_ms=retry_after_ms)
