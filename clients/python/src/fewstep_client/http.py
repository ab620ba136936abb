"""Pictures over HTTP: at once, with previews on the way, or later."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any, NamedTuple, Self, Unpack
from urllib.parse import urlsplit

import httpx

from fewstep_client.errors import ApiError, FewstepError, NotDrawn, Unreachable, error_class
from fewstep_client.fields import Fields, PictureFields
from fewstep_client.live import backoff_s, check_credential
from fewstep_client.results import LiveToken, Picture, Preview, build, read_pictures, read_preview

MAX_PAUSE_S = 60.0  # a longer Retry-After is the caller's decision
GENERATIONS = "/v1/generations"
ENDINGS = frozenset({"completed", "failed", "cancelled", "superseded", "expired"})


class ServerSentEvent(NamedTuple):
    id: str
    name: str
    data: dict[str, Any]


class AsyncClient:
    """The service over HTTP.

        async with AsyncClient("http://127.0.0.1:8000", key="fs_…") as client:
            picture = await client.generate("a red apple on a blue background", seed=7)
            Path("apple.jpg").write_bytes(picture.data)

    What the service refuses raises an ApiError, what ends without a picture NotDrawn, the network Unreachable. What may
    pass is tried again up to `max_retries` times, after the time that the service names. `timeout_s` is how long one
    answer may take, which is above the service's own longest wait.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        max_retries: int = 4,
        timeout_s: float = 75.0,
    ) -> None:
        check_address(base_url)
        if key:
            check_credential("key", key)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(timeout_s, connect=10.0)
        self._http = httpx.AsyncClient(base_url=base_url, headers=headers, timeout=timeout)
        self._max_retries = max_retries

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(self, prompt: str, **fields: Unpack[PictureFields]) -> Picture:
        """Draws one picture. Cancelling the call cancels the drawing."""
        answer = await self._send("POST", GENERATIONS, json={"prompt": prompt, **fields}, headers=ACCEPT_JSON)
        if answer.status_code == 202:  # not done within the service's own wait
            return (await self.wait(answer.json()["id"]))[0]
        return read_pictures(answer.json())[0]

    async def stream(self, prompt: str, **fields: Unpack[Fields]) -> AsyncGenerator[Preview | Picture, None]:
        """The previews and then the pictures. Leaving early cancels the drawing: use `contextlib.aclosing`."""
        generation_id = await self._submit({"prompt": prompt, **fields, "previews": True}, uuid.uuid4().hex)
        is_over = False
        try:
            async with aclosing(self._follow(generation_id)) as events:
                async for event in events:
                    if event.name == "preview":
                        yield read_preview(event.data)
            is_over = True
            for picture in read_ending(event):
                yield picture
        finally:
            if not is_over:
                with suppress(FewstepError):
                    await self.cancel(generation_id)

    async def submit(self, prompt: str, *, idempotency_key: str | None = None, **fields: Unpack[Fields]) -> str:
        """Asks for pictures and returns the id of their generation at once.

        A retry with the same `idempotency_key` is the same generation. Without one, this call makes its own.
        """
        return await self._submit({"prompt": prompt, **fields}, idempotency_key or uuid.uuid4().hex)

    async def wait(self, generation_id: str, *, timeout_s: float | None = None) -> tuple[Picture, ...]:
        """The pictures, once they are drawn. Raises NotDrawn, or TimeoutError after `timeout_s`."""
        async with asyncio.timeout(timeout_s):
            events = [event async for event in self._follow(generation_id)]
        return read_ending(events[-1])

    async def cancel(self, generation_id: str) -> str:
        """Cancels it and returns its state: a running one stops at its next step, what has ended stays as it is."""
        answer = await self._send("DELETE", f"{GENERATIONS}/{generation_id}")
        return str(answer.json()["state"])

    async def live_token(
        self,
        origin: str,
        *,
        model: str | None = None,
        ttl_s: int | None = None,
        max_messages_per_s: float | None = None,
        max_images_per_minute: int | None = None,
        user: str | None = None,
    ) -> LiveToken:
        """A short-lived token for a page of `origin`, to draw with in the name of this client's key."""
        body = {
            "origin": origin,
            "model": model,
            "ttl_s": ttl_s,
            "max_messages_per_s": max_messages_per_s,
            "max_images_per_minute": max_images_per_minute,
            "user": user,
        }
        return build(LiveToken, (await self._send("POST", "/v1/live/tokens", json=body)).json())

    async def _submit(self, body: Mapping[str, Any], idempotency_key: str) -> str:
        headers = ACCEPT_JSON | {"Prefer": "respond-async", "Idempotency-Key": idempotency_key}
        return str((await self._send("POST", GENERATIONS, json=body, headers=headers)).json()["id"])

    async def _follow(self, generation_id: str) -> AsyncGenerator[ServerSentEvent, None]:
        """Its events to the last one, which is there always; goes on where a connection breaks off."""
        last_id, failures = "", 0
        while failures <= self._max_retries:
            headers = {"Last-Event-ID": last_id} if last_id else {}
            answer = await self._send("GET", f"{GENERATIONS}/{generation_id}/events", headers=headers, stream=True)
            with suppress(httpx.TransportError):
                async with aclosing(answer), aclosing(read_events(answer)) as events:
                    async for event in events:
                        last_id, failures = event.id, 0
                        yield event
                        if event.name in ENDINGS:
                            return
            await asyncio.sleep(backoff_s(failures))
            failures += 1
        raise Unreachable(f"the events of generation {generation_id} break off again and again")

    async def _send(self, method: str, path: str, *, stream: bool = False, **options: Any) -> httpx.Response:
        """The answer, if it is a success."""
        for failures in range(self._max_retries + 1):
            try:
                answer = await self._http.send(self._http.build_request(method, path, **options), stream=stream)
                if answer.is_success:
                    return answer
                await answer.aread()
            except httpx.TransportError as error:
                failure: FewstepError = Unreachable(f"{method} {path}: {type(error).__name__} {error}".rstrip())
                failure.__cause__ = error
                pause_s: float | None = backoff_s(failures)
            else:
                failure = read_error(answer)
                pause_s = choose_pause(answer, failures)
            if pause_s is None or failures == self._max_retries:
                break
            await asyncio.sleep(pause_s)
        raise failure


def check_address(base_url: str) -> None:
    """Raises ValueError: what is no address would otherwise be tried again and again."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"base_url: {base_url!r} is not allowed; it looks like http://127.0.0.1:8000")


ACCEPT_JSON = {"Accept": "application/json"}


async def read_events(answer: httpx.Response) -> AsyncGenerator[ServerSentEvent, None]:
    """Comments keep the connection alive and say nothing."""
    event: dict[str, str] = {}
    async for line in answer.aiter_lines():
        name, _, value = line.partition(":")
        if line and name:
            event[name] = event.get(name, "") + value.removeprefix(" ")
        elif not line and "data" in event:
            yield ServerSentEvent(event.get("id", ""), event.get("event", ""), json.loads(event["data"]))
            event = {}


def read_ending(event: ServerSentEvent) -> tuple[Picture, ...]:
    """Raises NotDrawn."""
    generation = event.data
    if event.name != "completed":
        raise NotDrawn(generation["id"], generation["state"], generation.get("error") or {})
    return read_pictures(generation)


def read_error(answer: httpx.Response) -> ApiError:
    error = None
    with suppress(ValueError, KeyError, TypeError):
        error = answer.json()["error"]
    if not isinstance(error, dict):  # what stands between may answer by itself
        error = {"message": f"HTTP {answer.status_code} {answer.reason_phrase}: {answer.text[:200]}".rstrip(": ")}
    kind, request_id = error_class(answer.status_code), answer.headers.get("X-Request-Id")
    return kind(answer.status_code, error, retry_after_s=read_retry_after_s(answer.headers), request_id=request_id)


def read_retry_after_s(headers: Mapping[str, str]) -> float | None:
    for name, unit_s in (("retry-after-ms", 0.001), ("Retry-After", 1.0)):
        with suppress(KeyError, ValueError):
            return float(headers[name]) * unit_s
    return None


def choose_pause(answer: httpx.Response, failures: int) -> float | None:
    """Before the next try; None where trying again changes nothing, or only after more than MAX_PAUSE_S."""
    may_pass = answer.status_code in (408, 429) or answer.status_code >= 500
    if answer.headers.get("x-should-retry", str(may_pass).lower()) != "true":
        return None
    pause_s = max(read_retry_after_s(answer.headers) or 0.0, backoff_s(failures))
    return pause_s if pause_s <= MAX_PAUSE_S else None
