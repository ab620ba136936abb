"""Every kind of bad input gets its error: the field, the value shortened, and what is allowed."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.app.conftest import Api, StartApi

pytestmark = pytest.mark.asyncio(loop_scope="module")

NATIVE, OPENAI = "/v1/generations", "/v1/images/generations"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(start_api: StartApi) -> AsyncIterator[Api]:
    """One gateway for all: nothing here gets into its queue."""
    async with start_api() as api:
        yield api


def body(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a red apple", **changes}


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "is required"),
    ({"prompt": None}, "prompt", "valid string, got null"),
    ({"prompt": 7}, "prompt", "valid string, got 7"),
    ({"prompt": ""}, "prompt", "must say something"),
    ({"prompt": "x" * 40_000}, "prompt", "at most 32000 characters"),
    ({"prompt": "x" * 501}, "prompt", "at most 500 characters, it has 501"),
    (body(promt="x"), "promt", "did you mean 'prompt'?"),
    (body(n=2), "n", "unknown field"),
    (body(width=True), "width", "valid integer, got true"),
    (body(width="64"), "width", "valid integer, got '64'"),
    (body(width=64.5), "width", "valid integer"),
    (body(seed=2.0**53), "seed", "valid integer"),
    (body(width=0), "width", "greater than or equal to 1, got 0"),
    (body(width=100, height=100), "width", "sizes of mini-lcm: 64x64"),
    (body(height=10**30), "height", "less than or equal to"),
    (body(num_inference_steps=51), "num_inference_steps", "mini-lcm allows 1 to 20"),
    (body(num_inference_steps=-1), "num_inference_steps", "greater than or equal to 1"),
    (body(num_inference_steps=10**300), "num_inference_steps", "got a number with hundreds of bits"),
    (body(guidance_scale=5), "guidance_scale", "mini-lcm allows 0 to 2"),
    (body(guidance_scale="1"), "guidance_scale", "valid number"),
    (body(guidance_scale=False), "guidance_scale", "valid number, got false"),
    (body(guidance_scale=10**400), "guidance_scale", "got a number with hundreds of bits"),
    (body(seed=-1), "seed", "greater than or equal to 0"),
    (body(seed=2**53), "seed", "less than or equal to 9007199254740991"),
    (body(seed=1.5), "seed", "valid integer"),
    (body(scheduler="heun"), "scheduler", "mini-lcm has lcm, ddim, euler-ancestral"),
    (body(num_images=10), "num_images", "mini-lcm allows 1 to 9"),
    (body(decoder="huge"), "decoder", "'full', 'tiny' or 'auto'"),
    (body(output_format="gif"), "output_format", "'png', 'jpeg' or 'webp'"),
    (body(output_quality=0), "output_quality", "greater than or equal to 1"),
    (body(previews="yes"), "previews", "valid boolean"),
    (body(deadline_ms=0), "deadline_ms", "greater than or equal to 1"),
    (body(loras=[{"name": "x", "scale": 1}]), "loras.0.scale", "unknown field"),
    (body(loras=[{"name": "etching"}]), "loras.0.name", "mini-lcm has neon, sketch"),
    (body(negative_prompt=["x"]), "negative_prompt", "valid string, got a list"),
    (body(metadata={"a": 1}), "metadata", "valid boolean, got an object"),
]


@pytest.mark.parametrize(("json", "param", "words"), BAD_FIELDS, ids=lambda value: str(value)[:40])
async def test_fields(api: Api, json: dict[str, Any], param: str, words: str) -> None:
    answer = await api.http.post(NATIVE, json=json)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert len(answer.content) < 600
    assert len(answer.headers["X-Request-Id"]) == 32


@pytest.mark.parametrize(
    ("json", "param", "words"),
    [
        (body(num_images=2), "num_images", "unknown field"),
        (body(n=0), "n", "greater than or equal to 1"),
        (body(n=11), "n", "less than or equal to 10"),
        (body(n=10), "n", "mini-lcm allows 1 to 9"),
        (body(size="1024x1024"), "size", "sizes of mini-lcm: auto, 64x64"),
        (body(size="big"), "size", "pattern"),
        (body(background="transparent"), "background", "opaque or auto"),
        (body(output_format="svg"), "output_format", "png, jpeg or webp"),
        (body(output_format="tiff"), "output_format", "'png', 'jpeg', 'webp'"),
        (body(frame_count=4), "frame_count", "not offered"),
        (body(svg={"model": "x"}), "svg", "not offered"),
        (body(output_compression=50), "output_compression", "png is lossless"),
        (body(stream=True, response_format="url"), "response_format", "b64_json"),
        (body(output_compression=101), "output_compression", "less than or equal to 100"),
        (body(quality="ultra"), "quality", "got 'ultra'"),
        (body(partial_images=4), "partial_images", "less than or equal to 3"),
        (body(stream=True, n=2), "n", "a stream carries 1 picture"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_openai_fields(api: Api, json: dict[str, Any], param: str, words: str) -> None:
    answer = await api.http.post(OPENAI, json=json)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("path", [NATIVE, OPENAI])
@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"", JSON, 400, "missing_body"),
        (b"{", JSON, 400, "invalid_json"),
        (b"\xff\xfe", JSON, 400, None),
        (b"[]", JSON, 400, None),
        (b'"prompt"', JSON, 400, None),
        (b"null", JSON, 400, None),
        (b"[" * 30_000, JSON, 400, None),
        (b'{"prompt": "x", "seed": ' + b"9" * 6000 + b"}", JSON, 400, None),
        (b'{"prompt": "x", "guidance_scale": NaN}', JSON, 400, None),
        (b'{"prompt": "x", "guidance_scale": Infinity}', JSON, 400, None),
        (b'{"prompt": "x", "guidance_scale": 1e999}', JSON, 400, None),
        (b'{"prompt": "\\ud800"}', JSON, 400, None),
        (b'{"prompt": "x", "negative_prompt": "\\udfff!"}', JSON, 400, None),
        (b'{"prompt": "x", "\\ud800": 1}', JSON, 400, None),
        (b'{"prompt": "x", "scheduler": "\\ud800"}', JSON, 400, None),
        (b'{"prompt": "x", "prompt": "y"}', JSON, 400, "invalid_json"),
        (b'{"prompt": "x", ' + b",".join(b'"k%d":1' % i for i in range(6000)) + b"}", JSON, 400, "unknown_field"),
        (b'{"a":' * 9000 + b"1" + b"}" * 9000, JSON, 400, "invalid_json"),
        (b'{"prompt": "x", "seed": -' + b"9" * 5000 + b"}", JSON, 400, "invalid_json"),
        (b'\xef\xbb\xbf{"prompt": "x"}', JSON, 400, "invalid_json"),
        ('{"prompt": "x"}'.encode("utf-16"), JSON, 400, "invalid_json"),
        ('{"prompt": "x"}'.encode("utf-32-le"), {"Content-Type": "application/json; charset=utf-32"}, 400, None),
        (b'{"prompt": "\xed\xa0\x80"}', JSON, 400, "invalid_json"),
        (b'{"prompt": "x\x00"}', JSON, 400, "invalid_json"),
        (
            gzip.compress(b'{"prompt": "x"}', mtime=0),
            JSON | {"Content-Encoding": "gzip"},
            415,
            "unsupported_media_type",
        ),
        (b'{"prompt": "x"}', {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b'{"prompt": "x"}', {}, 415, "unsupported_media_type"),
        (b"prompt=x", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        (b'{"prompt": "' + b"x" * 65_536 + b'"}', JSON, 413, "body_too_large"),
        (b'{"prompt": "x", "model": "gpt-image-1"}', JSON, 404, "model_not_found"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_bodies(
    api: Api, path: str, content: bytes, headers: dict[str, str], status: int, code: str | None
) -> None:
    answer = await api.http.post(path, content=content, headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert error["type"] == "invalid_request_error"
    assert code is None or error["code"] == code
    assert len(answer.content) < 600
    assert len(answer.headers["X-Request-Id"]) == 32
    assert not api.painter.deliveries


async def test_a_body_without_length_is_cut_too(api: Api) -> None:
    async def chunks() -> Any:
        for _ in range(40):
            yield b"x" * 4096

    answer = await api.http.post(NATIVE, content=chunks(), headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_unknown_models_list_those_there_are(api: Api) -> None:
    answer = await api.http.post(NATIVE, json=body(model="dall-e-3"))
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert all(name in message.partition("the catalog has ")[2].split(", ") for name in ("mini-lcm", "sd15-lcm"))
    assert answer.json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/static/nothing.js", 404, "not_found"),
        ("GET", "/static/../settings.py", 404, "not_found"),
        ("GET", "/static/%2e%2e/settings.py", 404, "not_found"),
        ("GET", NATIVE, 405, "method_not_allowed"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("GET", "/v1/generations/x/images/-1", 400, "invalid_value"),
        ("GET", f"/v1/generations/{'x' * 100}", 400, "invalid_value"),
        ("GET", "/v1/live", 404, "not_found"),
    ],
)
async def test_paths_and_methods(api: Api, method: str, path: str, status: int, code: str) -> None:
    answer = await api.http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert len(answer.headers["X-Request-Id"]) == 32


async def test_headers(api: Api) -> None:
    answer = await api.http.post(NATIVE, json=body(), headers={"Accept": "text/html"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (406, "not_acceptable")
    answer = await api.http.post(NATIVE, json=body(), headers={"Prefer": "wait=soon"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Prefer")
    answer = await api.http.get("/v1/models", headers={"Host": "rebound.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_host")
    assert len(answer.headers["X-Request-Id"]) == 32
    for host in ("localhost", "127.0.0.1:1", "[::1]:80", "LOCALHOST:9"):
        assert (await api.http.get("/livez", headers={"Host": host})).status_code == 200
