"""The native API: make a picture, look it up, follow it, cancel it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Path
from fastapi.requests import Request
from fastapi.responses import Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from app.admission import Admission, Defaults, complete, find_warnings
from app.callers import Caller
from app.dependencies import CallerDep, GatewayDep, RequestIdDep, TraceparentDep
from app.errors import ImageGone, ImageNotReady, NotAcceptable, ending_error, raises
from app.gateway import Gateway
from app.negotiation import Answer, Preference, negotiate, parse_prefer
from app.openapi import GENERATION_EVENTS, MODEL_HEADERS, RESULT_HEADERS, event_stream, image_types, show_headers
from app.rendering import (
    Progress,
    generation_path,
    model_headers,
    progress_of,
    result_headers,
    show_generation,
    show_preview,
    state_after,
)
from app.replies import Subscription, as_ending
from app.schemas import Generation, GenerationRequest
from app.strict_json import JsonRoute
from app.waiting import cancelled_if_left, wait_for_ending
from broker.errors import BrokerError, BrokerUnavailable, RequestNotFound
from broker.messages import Completed, Job, LoggedEvent, Picture, Preview, TerminalEvent
from broker.redis_broker import RequestStatus, Submitted

NOT_READY_RETRY_MS = 250
EVENT_NAMES = {"accepted": "queued"}
FOUND: dict[int | str, dict[str, Any]] = {200: {"model": Generation, "headers": show_headers(sometimes=MODEL_HEADERS)}}
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file.",
        "content": image_types(),
        "headers": show_headers(*RESULT_HEADERS, "Cache-Control", sometimes=MODEL_HEADERS),
    }
}

router = APIRouter(prefix="/v1/generations", route_class=JsonRoute, tags=["generations"])


# Making one


@router.post(
    "",
    response_model=None,
    responses={
        200: {
            "description": "The generation with its pictures, or the bytes of its only one.",
            "model": Generation,
            "content": image_types(),
            "headers": show_headers(*RESULT_HEADERS, sometimes=MODEL_HEADERS),
        },
        202: {
            "description": "Not ended yet: to be looked up at `Location`.",
            "model": Generation,
            "headers": show_headers("Location", sometimes=("Preference-Applied", *MODEL_HEADERS)),
        },
    },
)
@raises(NotAcceptable, Admission.find_model, Admission.submit, ending_error)
async def create_generation(
    body: GenerationRequest,
    request: Request,
    gateway: GatewayDep,
    request_id: RequestIdDep,
    caller: CallerDep,
    traceparent: TraceparentDep,
    accept: Annotated[str | None, Header()] = None,
    prefer: Annotated[list[str] | None, Header()] = None,
) -> Response:
    """Draws a picture. The answer is its bytes or JSON, by `Accept`; 202 and `Location` where the wait ends first."""
    preference = parse_prefer(prefer or [])
    answer = negotiate(accept, body.output_format, body.num_images or 1)
    job = make_job(body, answer, preference, gateway, request_id, caller, traceparent)
    with gateway.replies.follow(request_id) as subscription:
        submitted = await gateway.admission.submit(job, caller)
        progress = await start_progress(gateway, job, submitted)
        wait_s = choose_wait(preference, gateway.settings.sync_wait_s)
        if preference.is_async:
            ending = await wait_for_ending(subscription, request, wait_s) if wait_s else None
        else:
            async with cancelled_if_left(gateway.broker, request_id):
                ending = await wait_for_ending(subscription, request, wait_s)
    if ending is None:
        return accepted(progress, gateway, preference)
    return finished(progress, ending, answer, gateway)


def make_job(
    body: GenerationRequest,
    answer: Answer,
    preference: Preference,
    gateway: Gateway,
    request_id: str,
    caller: Caller,
    traceparent: str | None,
) -> Job:
    spec = gateway.admission.find_model(body.model or gateway.settings.default_model, caller)
    params = complete(body, spec, Defaults(output_format=answer.format))
    settings = gateway.settings
    return Job(
        request_id=request_id,
        model=spec.name,
        params=replace(params, output_format=answer.format),
        lane="api",
        owner=caller.owner,
        gateway_id=gateway.replies.gateway_id,
        keep_s=settings.keep_async_s if preference.is_async else settings.keep_sync_s,
        deadline_ms=body.deadline_ms,
        warnings=find_warnings(params, spec),
        traceparent=traceparent,
    )


def choose_wait(preference: Preference, longest_s: float) -> float:
    """`wait=N` up to the longest; without it all of that, or nothing for `respond-async`."""
    if preference.wait_s is None:
        return 0.0 if preference.is_async else longest_s
    return min(preference.wait_s, longest_s)


async def start_progress(gateway: Gateway, job: Job, submitted: Submitted) -> Progress:
    start_ms = await gateway.admission.predict_start_ms(job.model, submitted.position)
    return Progress(job, "queued", time.time(), submitted.position, start_ms)


def accepted(progress: Progress, gateway: Gateway, preference: Preference) -> Response:
    headers = {"Location": generation_path(progress.job.request_id)}
    if preference.is_async:
        headers["Preference-Applied"] = "respond-async"
    return json_answer(progress, gateway, status=202, headers=headers)


def finished(progress: Progress, ending: TerminalEvent, answer: Answer, gateway: Gateway) -> Response:
    if not isinstance(ending, Completed):
        raise ending_error(ending)
    headers = result_headers(progress.job, ending)
    if answer.is_bytes:
        return bytes_answer(ending.pictures[0], headers | model_headers_of(gateway, progress.job))
    done = replace(progress, state="completed", ending=ending)
    return json_answer(done, gateway, with_bytes=True, headers=headers)


def json_answer(
    progress: Progress,
    gateway: Gateway,
    *,
    status: int = 200,
    with_bytes: bool = False,
    headers: dict[str, str] | None = None,
) -> Response:
    generation = show_generation(progress, gateway.catalog.get(progress.job.model), with_bytes=with_bytes)
    all_headers = model_headers_of(gateway, progress.job) | (headers or {})
    return Response(generation.model_dump_json(), status, all_headers, media_type="application/json")


def bytes_answer(picture: Picture, headers: dict[str, str]) -> Response:
    return Response(picture.data, 200, headers, media_type=f"image/{picture.format}")


def model_headers_of(gateway: Gateway, job: Job) -> dict[str, str]:
    spec = gateway.catalog.get(job.model)
    return model_headers(spec) if spec else {}


# Looking it up


@raises(RequestNotFound, BrokerUnavailable, BrokerError)
async def read_own(
    gateway: GatewayDep, caller: CallerDep, generation_id: Annotated[str, Path(max_length=64)]
) -> RequestStatus:
    """The request, if it is the caller's; for anyone else it doesn't exist."""
    status = await gateway.broker.status(generation_id)
    if status.job.owner != caller.owner:
        raise RequestNotFound(generation_id)
    return status


OwnStatus = Annotated[RequestStatus, Depends(read_own)]


async def read_progress(gateway: Gateway, status: RequestStatus) -> Progress:
    progress = progress_of(status)
    if status.state != "queued" or status.job.model not in gateway.catalog:
        return progress
    start_ms = await gateway.admission.predict_start_ms(status.job.model, status.position)
    return replace(progress, predicted_start_ms=start_ms)


@router.get(
    "/{generation_id}",
    response_model=None,
    responses={200: {"model": Generation, "headers": show_headers(sometimes=(*RESULT_HEADERS, *MODEL_HEADERS))}},
)
async def read_generation(gateway: GatewayDep, status: OwnStatus) -> Response:
    """State, parameters and timings; pictures by their `url`."""
    progress = await read_progress(gateway, status)
    ending = progress.ending
    headers = result_headers(status.job, ending) if isinstance(ending, Completed) else {}
    return json_answer(progress, gateway, headers=headers)


@router.get("/{generation_id}/image", response_class=Response, response_model=None, responses=PICTURE)
@raises(ImageNotReady, ImageGone, 404, ending_error)
async def read_image(gateway: GatewayDep, status: OwnStatus) -> Response:
    """The bytes of the first picture."""
    return picture_answer(gateway, status, 0)


@router.get("/{generation_id}/images/{index}", response_class=Response, response_model=None, responses=PICTURE)
@raises(ImageNotReady, ImageGone, 404, ending_error)
async def read_image_by_index(
    gateway: GatewayDep, status: OwnStatus, index: Annotated[int, Path(ge=0, le=1000)]
) -> Response:
    """The bytes of picture `index`, counted from 0."""
    return picture_answer(gateway, status, index)


def picture_answer(gateway: Gateway, status: RequestStatus, index: int) -> Response:
    ending = progress_of(status).ending
    if ending is None:
        raise ImageNotReady(
            f"the generation is {status.state}, it has no picture yet", retry_after_ms=NOT_READY_RETRY_MS
        )
    if not isinstance(ending, Completed):
        raise ending_error(ending)
    picture = next((picture for picture in ending.pictures if picture.index == index), None)
    if picture is None:
        raise HTTPException(404, f"there is no image {index}: the generation has {len(ending.pictures)}")
    if not picture.data:
        raise ImageGone("the picture is no longer kept")
    headers = result_headers(status.job, ending) | {"Cache-Control": "private, max-age=31536000, immutable"}
    return bytes_answer(
        picture, headers | {"X-Fewstep-Seed": str(picture.seed)} | model_headers_of(gateway, status.job)
    )


# Cancelling it


@router.delete("/{generation_id}", response_model=None, responses=FOUND)
async def cancel_generation(gateway: GatewayDep, caller: CallerDep, status: OwnStatus) -> Response:
    """Cancels it; what has ended stays as it is. A running one stops at its next step, so `state` may lag."""
    await gateway.broker.cancel(status.job.request_id)
    after = await read_own(gateway, caller, status.job.request_id)
    return json_answer(await read_progress(gateway, after), gateway)


# Following it


async def follow_own(
    gateway: GatewayDep, status: OwnStatus, last_event_id: Annotated[str | None, Header()] = None
) -> AsyncIterator[Subscription]:
    """Attached before the response starts, so that errors still have a status. 204 tells a client that has seen the
    end not to come again."""
    after = int(last_event_id) if last_event_id and last_event_id.isdecimal() and len(last_event_id) < 10 else 0
    ends = [logged.seq for logged in status.log if as_ending(logged)]
    if ends and ends[-1] <= after:
        raise HTTPException(204)
    async with gateway.replies.attach(status.job.request_id, after) as subscription:
        yield subscription


@router.get(
    "/{generation_id}/events",
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "The events.",
            "content": event_stream(GENERATION_EVENTS, has_ids=True),
            "headers": show_headers("Cache-Control", "X-Accel-Buffering"),
        },
        204: {"description": "The last event was seen already: nothing more will come."},
    },
)
async def stream_events(
    gateway: GatewayDep, status: OwnStatus, subscription: Annotated[Subscription, Depends(follow_own)]
) -> AsyncIterator[ServerSentEvent]:
    """What happened so far and from now on, until the end. Event ids are the `Last-Event-ID` to continue from."""
    progress = replace(await read_progress(gateway, status), ending=None)
    async for logged in subscription:
        yield make_sse_event(progress, logged, gateway)


def make_sse_event(progress: Progress, logged: LoggedEvent, gateway: Gateway) -> ServerSentEvent:
    event = logged.event
    name = EVENT_NAMES.get(event.type, event.type)
    if isinstance(event, Preview):
        return ServerSentEvent(data=show_preview(event), event=name, id=str(logged.seq))
    now = replace(progress, state=state_after(event), ending=as_ending(logged))
    spec = gateway.catalog.get(progress.job.model)
    return ServerSentEvent(data=show_generation(now, spec, with_bytes=True), event=name, id=str(logged.seq))
