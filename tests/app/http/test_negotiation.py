from __future__ import annotations

import pytest

from app.errors import InvalidRequest, NotAcceptable
from app.http.negotiation import Answer, Preference, negotiate, parse_prefer
from broker.messages import ImageFormat

JSON_JPEG = Answer(False, "jpeg")


@pytest.mark.parametrize(
    ("accept", "output_format", "expected"),
    [
        (None, None, JSON_JPEG),
        ("", None, JSON_JPEG),
        ("*/*", None, JSON_JPEG),
        (None, "png", Answer(True, "png")),
        ("*/*", "webp", Answer(True, "webp")),
        ("application/json", "png", Answer(False, "png")),
        ("application/json", None, JSON_JPEG),
        ("image/png", None, Answer(True, "png")),
        ("IMAGE/PNG", None, Answer(True, "png")),
        ("image/png", "webp", Answer(True, "png")),
        ("image/webp, image/png", None, Answer(True, "webp")),
        ("image/webp;q=0.5, image/png", None, Answer(True, "png")),
        ("image/*", None, Answer(True, "jpeg")),
        ("image/*", "webp", Answer(True, "webp")),
        ("image/*, image/jpeg;q=0", None, Answer(True, "png")),
        ("image/jpg", None, Answer(True, "jpeg")),
        ("*/*, image/png", None, Answer(True, "png")),
        ("image/png;q=0.1, */*;q=0.5", None, JSON_JPEG),
        ("application/json, image/png", None, JSON_JPEG),
        ("text/html, */*;q=0.8", None, JSON_JPEG),
        ("text/html, */*;q=0.8", "png", Answer(True, "png")),
        ("application/*", None, JSON_JPEG),
    ],
)
def test_one_picture(accept: str | None, output_format: ImageFormat | None, expected: Answer) -> None:
    assert negotiate(accept, output_format, 1) == expected


@pytest.mark.parametrize("accept", ["text/html", "text/event-stream", "image/gif", "*/*;q=0", "application/json;q=0"])
def test_nothing_acceptable_names_the_offer(accept: str) -> None:
    with pytest.raises(NotAcceptable, match=r"application/json, image/png, image/jpeg, image/webp"):
        negotiate(accept, None, 1)


def test_several_pictures_are_never_bytes() -> None:
    assert negotiate("image/png, application/json;q=0.5", None, 4) == JSON_JPEG
    assert negotiate("*/*", "png", 4) == Answer(False, "png")
    with pytest.raises(NotAcceptable, match="holds one picture and 4 are asked for"):
        negotiate("image/png", None, 4)


def test_prefer() -> None:
    assert parse_prefer([]) == Preference()
    assert parse_prefer(["respond-async"]) == Preference(is_async=True)
    assert parse_prefer(["respond-async, wait=10"]) == Preference(is_async=True, wait_s=10)
    assert parse_prefer(["handling=lenient", 'wait="3"']) == Preference(wait_s=3)


@pytest.mark.parametrize("value", ["wait=soon", "wait=-1", "wait=", "wait=1e9", "wait=nan"])
def test_a_bad_wait_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest, match="Prefer: wait="):
        parse_prefer([value])
