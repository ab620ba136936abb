"""One live socket: every change of the prompt comes in, the newest picture goes out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from app.access.callers import ANONYMOUS
from app.admission import new_request_id
from app.errors import GatewayError, GenerationFailed, InvalidRequest, ending_error, invalid, render
from app.gateway import Gateway
from app.live.access import Access, Door
from app.live.outbox import Outbox
from app.live.protocol import (
    ClientMessage,
    CloseCode,
    Frame,
    SessionEnd,
    find_seq,
    pack_frame,
    parse_message,
    reconnect_reason,
    show_authenticated,
    show_error,
    show_ready,
)
from app.parameters import Defaults, check_steps, choose_decoder, complete, draw_seed, find_warnings
from app.replies import Subscription
from app.schemas import LiveAck, LiveAuth, LiveCancel, LiveGenerate
from app.tasks import raise_if_cancelled
from broker.errors import BrokerError, BrokerUnavailable
from broker.messages import (
    Cancelled,
    Completed,
    Decoder,
    Expired,
    Failed,
    Job,
    JobEvent,
    Preview,
    SamplingParams,
    Superseded,
)
from models.catalog import CatalogError, ModelSpec

MAX_SEED_SPREAD = 100
RATE_BURST_S = 2.0
MAX_CLOSE_REASON_BYTES = 123
RETRY_LOST_MS = 100

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Drawing:
    """One request of the session. `to_refine` is what asked for it, where it is refined once the typing pauses."""

    seq: int
    job: Job
    is_refined: bool = False
    to_refine: LiveGenerate | None = None


class TokenBucket:
    """Allows `rate` a second on average, and bursts of two seconds' worth."""

    def __init__(self, rate: float) -> None:
        self.rate, self._capacity = rate, max(1.0, rate * RATE_BURST_S)
        self._tokens, self._filled_at = self._capacity, time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._tokens = min(self._capacity, self._tokens + (now - self._filled_at) * self.rate)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class LiveSession:
    """Runs one accepted socket until it ends, then cancels what it still has under way.

    Requests are submitted in the order of their seq, one at a time; a prompt that is overtaken while it waits for its
    turn is not submitted at all. The queue keeps at most one of them running and one waiting.
    """

    def __init__(self, websocket: WebSocket, gateway: Gateway, session: str, door: Door) -> None:
        self._websocket, self._gateway = websocket, gateway
        self._session, self._door = session, door
        self._access = Access(ANONYMOUS)  # until `_be_let_in`, before which nothing is drawn
        self._seed = draw_seed(MAX_SEED_SPREAD)
        self._outbox = Outbox(gateway.settings.live_max_unacked)
        self._rate = TokenBucket(gateway.settings.live_max_messages_per_s)
        self._tasks = asyncio.TaskGroup()
        self._ending: asyncio.Future[SessionEnd] = asyncio.get_running_loop().create_future()
        self._something_to_send, self._closed = asyncio.Event(), asyncio.Event()
        self._submitting = asyncio.Lock()
        self._refine_timer: asyncio.Task[None] | None = None
        self._access_watch: asyncio.Task[None] | None = None
        self._newest_seq, self._generated_at, self._num_under_way = -1, 0.0, 0

    async def run(self) -> None:
        self._gateway.live_sockets.add(self)
        self._gateway.metrics.live_connections.inc()
        try:
            async with self._tasks:
                self._tasks.create_task(self._raise_ending())
                self._tasks.create_task(self._serve())
        except* SessionEnd as group:
            await self._close(group)
        finally:
            self._closed.set()
            self._gateway.live_sockets.discard(self)
            self._gateway.metrics.live_connections.dec()
            await self._cancel_work()

    async def go_away(self) -> None:
        """The gateway stops: tells the client to come back soon, and returns once the socket is closed."""
        reason = reconnect_reason(self._gateway.settings.live_reconnect_in_ms)
        if not self._ending.done():
            self._ending.set_result(SessionEnd(CloseCode.GOING_AWAY, reason))
        await self._closed.wait()

    # Who it is

    async def _serve(self) -> None:
        self._use(await self._be_let_in())
        self._say_ready()
        self._tasks.create_task(self._receive_forever())
        self._tasks.create_task(self._send_forever())

    async def _be_let_in(self) -> Access:
        if (access := self._door.open()) is not None:
            return access
        limit_s = self._gateway.settings.live_auth_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                message = parse_message(await self._receive_text())
        except TimeoutError:
            raise self._door.nobody(f"no auth message came within {limit_s:g} s") from None
        except InvalidRequest as error:
            raise self._door.nobody(f"the first message must be auth; {error}") from None
        if not isinstance(message, LiveAuth):
            raise self._door.nobody(f"the first message must be auth, not {message.type}")
        return self._door.admit(message.token)

    def _change_access(self, access: Access) -> None:
        """In-band, before a token ends. Another key would find the work of the first in its hands."""
        if access.caller.owner != self._access.caller.owner and self._newest_seq >= 0:
            raise self._door.nobody("a socket that has drawn stays with its key: open another one")
        self._use(access)
        self._put_message(show_authenticated(access.seconds_left))

    def _use(self, access: Access) -> None:
        most_per_s = self._gateway.settings.live_max_messages_per_s
        if access.limit_messages(most_per_s) != self._rate.rate:  # a new bucket is a full one
            self._rate = TokenBucket(access.limit_messages(most_per_s))
        self._access = access
        if self._access_watch is not None:
            self._access_watch.cancel()
        self._access_watch = self._tasks.create_task(self._watch_access())

    async def _watch_access(self) -> None:
        """Ends the session when its token ends or its key is revoked. A key that has changed counts from now on."""
        while True:
            self._access = self._door.confirm(self._access)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._access.seconds_left):
                    await self._gateway.keys.changed()

    # In

    async def _receive_forever(self) -> None:
        while True:
            raise_if_cancelled()
            text = await self._receive_text()
            try:
                await self._handle(parse_message(text))
            except (GatewayError, BrokerError, CatalogError) as error:
                self._refuse(error, find_seq(text))

    async def _receive_text(self) -> str:
        while True:
            message = await self._receive_message()
            if message["type"] == "websocket.disconnect":
                raise SessionEnd(None)
            if not self._rate.take():
                raise SessionEnd(CloseCode.RATE, f"more than {self._rate.rate:g} messages a second")
            if text := message.get("text"):
                self._check_length(text)
                return str(text)
            self._refuse(InvalidRequest("messages are JSON text frames"), None)

    async def _receive_message(self) -> Mapping[str, Any]:
        while True:
            try:
                async with asyncio.timeout(self._gateway.settings.live_idle_s):
                    return await self._websocket.receive()
            except TimeoutError:
                if not self._num_under_way:
                    raise SessionEnd(CloseCode.IDLE, "no message for too long") from None

    def _check_length(self, text: str) -> None:
        limit = self._gateway.settings.live_max_message_bytes
        if len(text) > limit or len(text.encode("utf-8", "surrogatepass")) > limit:
            raise SessionEnd(CloseCode.TOO_BIG, f"messages have at most {limit} bytes")

    async def _handle(self, message: ClientMessage) -> None:
        match message:
            case LiveGenerate():
                self._generate(message)
            case LiveCancel():
                await self._cancel()
            case LiveAck(frame=number):
                self._acknowledge(number)
            case LiveAuth(token=token):
                self._change_access(self._door.admit(token))

    def _generate(self, message: LiveGenerate) -> None:
        if message.seq <= self._newest_seq:
            raise invalid("seq", message.seq, f"it must be above {self._newest_seq}, the newest seq of this socket")
        drawing = self._plan(message)
        self._newest_seq, self._generated_at = message.seq, time.monotonic()
        self._stop_refine_timer()
        self._tasks.create_task(self._draw(drawing))

    def _plan(self, message: LiveGenerate) -> Drawing:
        spec = self._gateway.find_model(message.model, self._access.caller)
        params = self._complete(message, spec)
        job = self._make_job(spec, params, message.deadline_ms)
        return Drawing(message.seq, job, to_refine=message if _refine(message, params, spec) else None)

    def _plan_refined(self, message: LiveGenerate, model: str) -> Drawing | None:
        """Checked again: the catalog may have been read since. None where it would be the same picture by now."""
        spec = self._gateway.find_model(model, self._access.caller)
        if (refined := _refine(message, self._complete(message, spec), spec)) is None:
            return None
        return Drawing(message.seq, self._make_job(spec, refined, message.deadline_ms), is_refined=True)

    def _complete(self, message: LiveGenerate, spec: ModelSpec) -> SamplingParams:
        quick: Decoder = "tiny" if message.refine else "full"
        previews = spec.safety_checker is None
        defaults = Defaults(output_format="jpeg", previews=previews, decoder=quick, seed=self._seed)
        return complete(message, spec, defaults)

    def _make_job(self, spec: ModelSpec, params: SamplingParams, deadline_ms: int | None) -> Job:
        return Job(
            request_id=new_request_id(),
            model=spec.name,
            params=params,
            lane="live",
            owner=self._access.caller.owner,
            gateway_id=self._gateway.replies.gateway_id,
            keep_s=0,
            session=self._session,
            deadline_ms=deadline_ms,
            warnings=find_warnings(params, spec),
        )

    async def _cancel(self) -> None:
        self._stop_refine_timer()
        async with self._submitting:
            await self._gateway.broker.cancel_session(self._session)

    def _acknowledge(self, number: int) -> None:
        try:
            sent_at = self._outbox.acknowledge(number)
        except ValueError as error:
            raise invalid("frame", number, str(error)) from error
        for moment in sent_at:
            self._gateway.metrics.live_ack.observe(time.monotonic() - moment)
        self._something_to_send.set()

    # Drawing

    async def _draw(self, drawing: Drawing) -> None:
        self._num_under_way += 1
        try:
            with self._gateway.replies.follow(drawing.job.request_id) as subscription:
                if await self._submit(drawing):
                    raise_if_cancelled()
                    await self._show(drawing, subscription)
        except (GatewayError, BrokerError, CatalogError) as error:
            self._gateway.metrics.rejected.labels(render(error).code).inc()
            self._refuse(error, drawing.seq, drawing.job.request_id)
        finally:
            self._num_under_way -= 1

    async def _submit(self, drawing: Drawing) -> bool:
        """False if a newer prompt came while this one waited for its turn."""
        async with self._submitting:
            if drawing.seq < self._newest_seq:
                self._say("superseded", drawing, by=None)
                return False
            submitted = await self._gateway.admission.submit(drawing.job, self._access.caller)
        self._say("queued", drawing, position=submitted.position, predicted_start_ms=submitted.start_ms)
        return True

    async def _show(self, drawing: Drawing, subscription: Subscription) -> None:
        async for logged in subscription:
            self._show_event(drawing, logged.event)

    def _show_event(self, drawing: Drawing, event: JobEvent) -> None:
        match event:
            case Preview():
                self._put_frame(_preview_frame(drawing, event))
            case Completed(pictures=pictures) if not all(picture.data for picture in pictures):
                lost = GenerationFailed("the picture got lost while the queue was away", retry_after_ms=RETRY_LOST_MS)
                self._refuse(lost, drawing.seq, drawing.job.request_id)
            case Completed():
                for frame in _final_frames(drawing, event):
                    self._put_frame(frame)
                self._start_refine_timer(drawing)
            case Superseded(by=by):
                self._say("superseded", drawing, by=by)
            case Cancelled():
                self._say("cancelled", drawing)
            case Failed() | Expired():
                self._refuse(ending_error(event), drawing.seq, drawing.job.request_id)

    def _start_refine_timer(self, drawing: Drawing) -> None:
        if (message := drawing.to_refine) and message.refine and drawing.seq == self._newest_seq:
            at = self._generated_at + message.refine.after_ms / 1000
            self._refine_timer = self._tasks.create_task(self._refine_at(at, message, drawing.job.model))

    async def _refine_at(self, at: float, message: LiveGenerate, model: str) -> None:
        await asyncio.sleep(at - time.monotonic())
        try:
            refined = self._plan_refined(message, model)
        except (GatewayError, CatalogError) as error:
            self._refuse(error, message.seq)
            return
        if refined is not None:
            self._tasks.create_task(self._draw(refined))

    def _stop_refine_timer(self) -> None:
        if self._refine_timer is not None:
            self._refine_timer.cancel()
            self._refine_timer = None

    # Out

    def _say_ready(self) -> None:
        settings = self._gateway.settings
        limits = {
            "max_unacked": settings.live_max_unacked,
            "max_message_bytes": settings.live_max_message_bytes,
            "idle_s": settings.live_idle_s,
            "token_expires_in_s": self._access.seconds_left,
        }
        model = self._gateway.default_model(self._access.caller)
        self._put_message(show_ready(self._session, self._seed, model, limits))

    def _say(self, type: str, drawing: Drawing, **more: object) -> None:
        ids = {"seq": drawing.seq, "request_id": drawing.job.request_id, "refined": drawing.is_refined}
        warnings = {"warnings": list(drawing.job.warnings)} if type == "queued" else {}
        self._put_message({"type": type, **ids, **more, **warnings})

    def _refuse(self, error: Exception, seq: int | None, request_id: str | None = None) -> None:
        message = show_error(error, seq, request_id)
        if request_id is None:
            self._gateway.metrics.rejected.labels(message["error"]["code"]).inc()
        self._put_message(message)

    def _put_message(self, message: Mapping[str, object]) -> None:
        self._outbox.put_message(json.dumps(message))
        self._something_to_send.set()

    def _put_frame(self, frame: Frame) -> None:
        for dropped in self._outbox.put_frame(frame):
            self._gateway.metrics.live_dropped.labels(dropped.type).inc()
        self._something_to_send.set()

    async def _send_forever(self) -> None:
        while True:
            self._something_to_send.clear()
            while await self._send_next():
                pass
            await self._something_to_send.wait()

    async def _send_next(self) -> bool:
        if (text := self._outbox.take_message()) is not None:
            await self._send({"type": "websocket.send", "text": text})
            return True
        if taken := self._outbox.take_frame(time.monotonic()):
            number, frame = taken
            await self._send({"type": "websocket.send", "bytes": pack_frame(frame, number)})
            self._gateway.metrics.live_frames.labels(frame.type).inc()
            return True
        return False

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._gateway.settings.live_send_timeout_s):
                await self._websocket.send(message)
        except TimeoutError:
            raise SessionEnd(CloseCode.SLOW, "the client doesn't read") from None
        except WebSocketDisconnect:
            raise SessionEnd(None) from None

    # The end

    async def _raise_ending(self) -> None:
        raise await self._ending

    async def _close(self, ends: BaseExceptionGroup[SessionEnd]) -> None:
        end = next((end for end in ends.exceptions if isinstance(end, SessionEnd)), None)
        if end is None or end.code is None:
            return
        reason = end.reason.encode()[:MAX_CLOSE_REASON_BYTES].decode("utf-8", "ignore")
        with contextlib.suppress(TimeoutError, WebSocketDisconnect):
            async with asyncio.timeout(self._gateway.settings.live_send_timeout_s):
                await self._websocket.close(end.code, reason)

    async def _cancel_work(self) -> None:
        try:
            await self._gateway.broker.cancel_session(self._session)
        except BrokerUnavailable:
            log.warning("session %s closed while Redis is away: its work is not cancelled", self._session)


def _refine(message: LiveGenerate, params: SamplingParams, spec: ModelSpec) -> SamplingParams | None:
    """What to draw once the typing pauses; None where it would be the same picture again."""
    if (wish := message.refine) is None:
        return None
    steps = check_steps("refine.num_inference_steps", wish.num_inference_steps, spec)
    decoder = choose_decoder("refine.decoder", wish.decoder, spec, "full")
    refined = replace(params, num_inference_steps=steps, decoder=decoder, previews=False)
    return None if refined == replace(params, previews=False) else refined


def _preview_frame(drawing: Drawing, event: Preview) -> Frame:
    return Frame(
        type="preview",
        seq=drawing.seq,
        request_id=event.request_id,
        picture=event.picture,
        step=event.step,
        num_inference_steps=event.num_inference_steps,
        is_refined=drawing.is_refined,
    )


def _final_frames(drawing: Drawing, event: Completed) -> list[Frame]:
    steps = drawing.job.params.num_inference_steps
    return [
        Frame(
            type="final",
            seq=drawing.seq,
            request_id=event.request_id,
            picture=picture,
            step=steps,
            num_inference_steps=steps,
            is_refined=drawing.is_refined,
            timings=event.timings,
        )
        for picture in event.pictures
    ]
