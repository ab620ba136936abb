"""The native API: make a picture, look it up, follow it, cancel it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Query
from fastapi.requests import HTTPConnection, Request
from fastapi.responses import Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from app.access.links import check_link
from app.admission import Admission
from app.dependencies import Call, CallDep, CallerDep, GatewayDep, identify
from app.errors import ImageGone, ImageNotReady, InvalidToken, NotAcceptable, ending_error, raises
from app.fleet import find_warm
from app.gateway import Gateway
from app.http.negotiation import Answer, Preference, negotiate, parse_prefer
from app.http.strict_json import JsonRoute
from app.openapi.declarations import (
    GENERATION_EVENTS,
    MODEL_HEADERS,
    RESULT_HEADERS,
    SHARING_HEADERS,
    event_stream,
    image_types,
    show_headers,
)
from app.parameters import Defaults, complete
from app.rendering import (
    Progress,
    find_ending,
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
from app.sharing import choose_terms, keep_for_others, sharing_headers
from app.waiting import Entry, enter, given_up_if_left, wait_at_most
from broker.errors import BrokerError, BrokerUnavailable, RequestNotFound
from broker.messages import Completed, Job, LoggedEvent, Picture, Preview, TerminalEvent
from broker.redis_broker import RequestStatus
from broker.terms import Terms

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
            "headers": show_headers(*RESULT_HEADERS, sometimes=(*SHARING_HEADERS, *MODEL_HEADERS)),
        },
        202: {
            "description": "Not ended yet: to be looked up at `Location`.",
            "model": Generation,
            "headers": show_headers("Location", sometimes=("Preference-Applied", *SHARING_HEADERS, *MODEL_HEADERS)),
        },
    },
)
@raises(NotAcceptable, Admission.find_model, Admission.submit, ending_error)
async def create_generation(
    body: GenerationRequest,
    request: Request,
    call: CallDep,
    accept: Annotated[str | None, Header()] = None,
    prefer: Annotated[list[str] | None, Header()] = None,
) -> Response:
    """Draws a picture. The answer is its bytes or JSON, by `Accept`; 202 and `Location` where the wait ends first."""
    gateway, preference = call.gateway, parse_prefer(prefer or [])
    answer = negotiate(accept, body.output_format, body.num_images or 1)
    job, terms = await order(body, call, answer, preference)
    async with enter(gateway, job, call.caller, terms) as entry:
        ending = await wait_as_preferred(entry, request, preference, gateway)
    headers = sharing_headers(entry.submitted.origin, terms)
    if ending is None:
        return accepted(entry, gateway, preference, headers)
    return finished(entry, ending, answer, gateway, headers)


async def order(body: GenerationRequest, call: Call, answer: Answer, preference: Preference) -> tuple[Job, Terms]:
    """A result that somebody said they would come for is promised. Nobody watches the deadline of an asynchronous
    request that shares the work of another."""
    spec = call.gateway.find_model(body.model, call.caller)
    params = replace(complete(body, spec, Defaults(output_format=answer.format)), output_format=answer.format)
    is_promised = preference.is_async or preference.wait_s is not None or call.idempotency_key is not None
    job = call.make_job(spec, params, is_promised=is_promised, deadline_ms=body.deadline_ms)
    is_shareable = not preference.is_async or job.deadline_ms is None
    cache_s = await call.gateway.cache_s(spec) if is_shareable else 0
    key = call.idempotency_key
    terms = choose_terms(body, job, spec, idempotency_key=key, is_promised=is_promised, cache_s=cache_s)
    return keep_for_others(job, terms), terms


async def wait_as_preferred(
    entry: Entry, request: Request, preference: Preference, gateway: Gateway
) -> TerminalEvent | None:
    """The ending; None where the wait ends first. A client that leaves gives up a request that it didn't want kept."""
    if entry.status and (ending := find_ending(entry.status.log)):
        return ending
    wait_s = choose_wait(preference, gateway.settings.sync_wait_s)
    if preference.is_async:
        return await wait_at_most(entry.subscription, request, wait_s) if wait_s else None
    async with given_up_if_left(gateway.broker, entry):
        return await wait_at_most(entry.subscription, request, wait_s)


def choose_wait(preference: Preference, longest_s: float) -> float:
    """`wait=N` up to the longest; without it all of that, or nothing for `respond-async`."""
    if preference.wait_s is None:
        return 0.0 if preference.is_async else longest_s
    return min(preference.wait_s, longest_s)


def start_progress(entry: Entry) -> Progress:
    if entry.status:
        return progress_of(entry.status)
    return Progress(entry.job, "queued", time.time(), entry.submitted.position, entry.submitted.start_ms)


def accepted(entry: Entry, gateway: Gateway, preference: Preference, headers: dict[str, str]) -> Response:
    headers = headers | {"Location": generation_path(entry.job.request_id)}
    if preference.is_async:
        headers["Preference-Applied"] = "respond-async"
    return json_answer(start_progress(entry), gateway, status=202, headers=headers)


def finished(
    entry: Entry, ending: TerminalEvent, answer: Answer, gateway: Gateway, headers: dict[str, str]
) -> Response:
    if not isinstance(ending, Completed):
        raise ending_error(ending)
    headers = headers | result_headers(entry.job, ending, entry.submitted.origin)
    if answer.is_bytes:
        return bytes_answer(ending.pictures[0], headers | model_headers_of(gateway, entry.job))
    done = replace(start_progress(entry), state="completed", ending=ending)
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


GenerationId = Annotated[str, Path(max_length=64)]


@raises(RequestNotFound, BrokerUnavailable, BrokerError)
async def read_own(gateway: GatewayDep, caller: CallerDep, generation_id: GenerationId) -> RequestStatus:
    """The request, if it is the caller's; for anyone else it doesn't exist."""
    status = await gateway.broker.status(generation_id)
    if status.job.owner != caller.owner:
        raise RequestNotFound(generation_id)
    return status


OwnStatus = Annotated[RequestStatus, Depends(read_own)]


async def read_progress(gateway: Gateway, status: RequestStatus) -> Progress:
    progress = progress_of(status)
    is_served = find_warm(await gateway.fleet.workers(), status.job.model)
    return progress if is_served else replace(progress, predicted_start_ms=None)


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


@raises(read_own, identify, InvalidToken)
async def read_by_link_or_own(
    connection: HTTPConnection,
    gateway: GatewayDep,
    generation_id: GenerationId,
    index: Annotated[int, Path(ge=0, le=1000)],
    token: Annotated[str | None, Query(max_length=1000)] = None,
) -> RequestStatus:
    """With the token of a signed link nobody has to say who they are."""
    if token is None:
        return await read_own(gateway, await identify(connection), generation_id)
    check_link(gateway, token, generation_id, index)
    return await gateway.broker.status(generation_id)


@router.get("/{generation_id}/images/{index}", response_class=Response, response_model=None, responses=PICTURE)
@raises(ImageNotReady, ImageGone, 404, ending_error)
async def read_image_by_index(
    gateway: GatewayDep, status: Annotated[RequestStatus, Depends(read_by_link_or_own)], index: int
) -> Response:
    """The bytes of picture `index`, counted from 0. A signed link carries a `token` instead of an API key."""
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
