from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from app.errors import (
    TABLE,
    ErrorAnswer,
    GatewayError,
    GenerationFailed,
    Overloaded,
    ending_error,
    invalid,
    invalid_from,
    render,
    shorten,
)
from app.schemas import GenerationRequest
from broker.errors import BrokerUnavailable, RequestNotFound
from broker.messages import Cancelled, Expired, Failed, JobError, Superseded
from models.catalog import UnknownModelError


def code_and_status(answer: ErrorAnswer) -> tuple[int, str]:
    return answer.status, answer.code


def test_the_table() -> None:
    assert code_and_status(render(UnknownModelError("x", ["y"]))) == (404, "model_not_found")
    assert render(UnknownModelError("x", ["y"])).body["error"]["param"] == "model"
    assert code_and_status(render(RequestNotFound("x"))) == (404, "generation_not_found")
    assert code_and_status(render(KeyError("secret"))) == (500, "internal_error")
    assert "secret" not in json.dumps(render(KeyError("secret")).body)


def test_redis_errors_keep_their_details_to_themselves() -> None:
    answer = render(BrokerUnavailable("redis://user:password@host refused"))
    assert code_and_status(answer) == (503, "queue_unavailable")
    assert "password" not in json.dumps(answer.body)
    assert answer.headers["retry-after-ms"] == "1000"


def test_every_gateway_error_has_a_row() -> None:
    def walk(kind: type[GatewayError]) -> list[type[GatewayError]]:
        return [sub for child in kind.__subclasses__() for sub in (child, *walk(child))]

    assert {kind for kind in walk(GatewayError) if kind not in TABLE} == set()


def test_retry_headers() -> None:
    headers = render(Overloaded("full", retry_after_ms=1201)).headers
    assert headers == {"Retry-After": "2", "retry-after-ms": "1201"}


@pytest.mark.parametrize(
    ("ending", "status", "code", "should_retry"),
    [
        (Failed("x", JobError("nan_latents", "it broke")), 500, "nan_latents", "false"),
        (Failed("x", JobError("worker_lost", "it went", is_retryable=True)), 503, "worker_lost", "true"),
        (Cancelled("x"), 409, "cancelled", "false"),
        (Superseded("x"), 409, "superseded", "false"),
        (Expired("x"), 504, "deadline_exceeded", "false"),
    ],
)
def test_endings(ending: Failed | Superseded | Cancelled | Expired, status: int, code: str, should_retry: str) -> None:
    error = ending_error(ending)
    assert isinstance(error, GenerationFailed)
    answer = render(error)
    assert code_and_status(answer) == (status, code)
    assert answer.headers["x-should-retry"] == should_retry


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("short", "'short'"),
        ("x" * 1000, "'" + "x" * 60 + "' …"),
        (True, "true"),
        (None, "null"),
        (7, "7"),
        (float("nan"), "nan"),
        (10**4000, "a number with hundreds of bits"),
        ({"a": 1}, "an object"),
        ([1], "a list"),
    ],
)
def test_values_are_shortened(value: object, shown: str) -> None:
    assert shorten(value) == shown


def test_lone_surrogates_become_printable() -> None:
    body = render(invalid("prompt", "\ud800", "no")).body
    json.dumps(body, ensure_ascii=False).encode()


def test_an_unknown_field_gets_a_hint() -> None:
    with pytest.raises(ValidationError) as caught:
        GenerationRequest.model_validate({"prompt": "x", "promt": "y"})
    error = invalid_from(caught.value.errors()[0], GenerationRequest.model_fields)
    assert (error.param, error.code) == ("promt", "unknown_field")
    assert "did you mean 'prompt'?" in str(error)
