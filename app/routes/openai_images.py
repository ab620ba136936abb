"""OpenAI's `POST /v1/images/generations`: the official SDK works unchanged.

Facts held here, checked against that SDK: it sends `Accept: application/json` even when streaming, so the body decides;
an `id:` or `retry:` line makes it crash on the next keep-alive; a failure in mid-stream is only understood nested, as
`{"type": "error", "error": {…}}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

from fastapi import APIRouter
from fastapi.requests import Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event

from app.access.links import sign_link
from app.admission import Admission
from app.dependencies import Call, CallDep
from app.errors import ErrorAnswer, ending_error, invalid, raises, render
from app.gateway import Gateway
from app.http.strict_json import JsonRoute
from app.openapi.declarations import (
    IMAGE_EVENTS,
    MODEL_HEADERS,
    RESULT_HEADERS,
    SHARING_HEADERS,
    event_stream,
    show_headers,
)
from app.parameters import Defaults, check_size_text, complete, earliest
from app.rendering import model_headers, result_headers, to_base64
from app.replies import Subscription
from app.schemas import GenerationFields, OpenAIImageRequest, OpenAIImages
from app.sharing import choose_terms, keep_for_others, sharing_headers
from app.waiting import Entry, enter, given_up_if_left, wait_for_ending
from broker.messages import Completed, ImageFormat, Job, JobEvent, Picture, Preview, SamplingParams
from broker.terms import Terms
from models.catalog import ModelSpec, StepRange

KEEP_ALIVE_S = 15.0
NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}

router = APIRouter(prefix="/v1/images", route_class=JsonRoute, tags=["OpenAI"])


@router.post(
    "/generations",
    response_model=None,
    responses={
        200: {
            "description": "The pictures; with `stream` its events.",
            "model": OpenAIImages,
            "content": event_stream(IMAGE_EVENTS, has_ids=False),
            "headers": show_headers(
                sometimes=(*RESULT_HEADERS, *SHARING_HEADERS, "Cache-Control", "X-Accel-Buffering", *MODEL_HEADERS)
            ),
        }
    },
)
@raises(Admission.find_model, Admission.submit, ending_error)
async def create_image(body: OpenAIImageRequest, request: Request, call: CallDep) -> Response:
    """Draws `n` pictures; with `stream`, one picture with real previews on the way."""
    check_offered(body)
    gateway = call.gateway
    spec = gateway.find_model(body.model, call.caller)
    job, terms = await order(body, call, spec)
    async with contextlib.AsyncExitStack() as stack:
        entry = await stack.enter_async_context(enter(gateway, job, call.caller, terms))
        headers = sharing_headers(entry.submitted.origin, terms) | model_headers(spec)
        if body.stream:
            return stream_image(body, entry, gateway, stack.pop_all(), headers)
        return await draw_images(body, entry, gateway, request, headers)


async def order(body: OpenAIImageRequest, call: Call, spec: ModelSpec) -> tuple[Job, Terms]:
    """The longest wait is a deadline here: OpenAI's API has no way to come back for a picture."""
    settings, key = call.gateway.settings, call.idempotency_key
    is_promised = key is not None or body.response_format == "url"
    job = call.make_job(
        spec,
        choose_params(body, spec),
        is_promised=is_promised,
        deadline_ms=earliest(body.deadline_ms, round(settings.sync_wait_s * 1000)),
        user=body.safety_identifier or body.user,
    )
    cache_s = await call.gateway.cache_s(spec)
    terms = choose_terms(body, job, spec, idempotency_key=key, is_promised=is_promised, cache_s=cache_s)
    return keep_for_others(job, terms), terms


def check_offered(body: OpenAIImageRequest) -> None:
    """Refuses by name what OpenAI's API has and this one doesn't."""
    if body.background == "transparent":
        raise invalid("background", body.background, "the models draw opaque pictures: opaque or auto")
    if body.output_format in ("gif", "svg"):
        raise invalid("output_format", body.output_format, "pictures are png, jpeg or webp")
    for field in ("frame_count", "frame_duration_ms", "svg"):
        if (value := getattr(body, field)) is not None:
            raise invalid(field, value, "it belongs to gif and svg, which are not offered")
    if body.stream and (body.n or 1) > 1:
        raise invalid("n", body.n, "a stream carries 1 picture")
    if body.stream and body.response_format == "url":
        raise invalid("response_format", body.response_format, "a stream carries its pictures as b64_json")
    if body.output_compression not in (None, 100) and body.output_format in (None, "png"):
        raise invalid("output_compression", body.output_compression, "png is lossless: it takes only 100")


def choose_params(body: OpenAIImageRequest, spec: ModelSpec) -> SamplingParams:
    width, height = check_size_text(body.size, spec)
    if (body.n or 1) > spec.max_num_images:
        raise invalid("n", body.n, f"{spec.name} allows 1 to {spec.max_num_images}")
    fields = GenerationFields(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        width=width,
        height=height,
        num_inference_steps=body.num_inference_steps or choose_steps(body.quality, spec.num_inference_steps),
        guidance_scale=body.guidance_scale,
        seed=body.seed,
        scheduler=body.scheduler,
        loras=body.loras,
        num_images=body.n,
        decoder=body.decoder,
        output_format=cast("ImageFormat | None", body.output_format),
        previews=bool(body.stream and body.partial_images),
        metadata=body.metadata,
    )
    compression = 100 if body.output_compression is None else max(1, body.output_compression)
    return complete(fields, spec, Defaults(output_format="png", output_quality=compression))


def choose_steps(quality: str | None, steps: StepRange) -> int:
    """`quality` in steps: half the model's default, the default, twice and three times that, and the most it allows."""
    match quality:
        case "low":
            return max(steps.min, steps.default // 2)
        case "high" | "hd":
            return min(steps.max, 2 * steps.default)
        case "xhigh":
            return min(steps.max, 3 * steps.default)
        case "max":
            return steps.max
        case _:
            return steps.default


async def draw_images(
    body: OpenAIImageRequest, entry: Entry, gateway: Gateway, request: Request, headers: dict[str, str]
) -> Response:
    """The wait has no end of its own: the job's deadline is at most the longest wait."""
    async with given_up_if_left(gateway.broker, entry):
        ending = await wait_for_ending(entry.subscription, request)
    if not isinstance(ending, Completed):
        raise ending_error(ending)
    headers = headers | result_headers(entry.job, ending, entry.submitted.origin)
    pictures = [show_picture(body, entry.job, picture, gateway, request) for picture in ending.pictures]
    return JSONResponse(show_images(body, entry.job, pictures), headers=headers)


def show_picture(
    body: OpenAIImageRequest, job: Job, picture: Picture, gateway: Gateway, request: Request
) -> dict[str, Any]:
    if body.response_format == "url":
        return {"url": sign_link(gateway, request, job.request_id, picture.index), "seed": picture.seed}
    return {"b64_json": to_base64(picture.data), "seed": picture.seed}


def show_images(body: OpenAIImageRequest, job: Job, data: list[dict[str, Any]]) -> dict[str, Any]:
    echo = {"safety_identifier": body.safety_identifier} if body.safety_identifier else {}
    return {"created": int(time.time()), "data": data, **describe(body, job.params), "usage": NO_TOKENS, **echo}


def describe(body: OpenAIImageRequest, params: SamplingParams) -> dict[str, str]:
    return {
        "size": f"{params.width}x{params.height}",
        "quality": body.quality or "auto",
        "background": "opaque",
        "output_format": params.output_format,
    }


# Streaming


def stream_image(
    body: OpenAIImageRequest,
    entry: Entry,
    gateway: Gateway,
    following: contextlib.AsyncExitStack,
    headers: dict[str, str],
) -> Response:
    """It was submitted before the response starts, so that a refusal still had a status."""
    content = stream_events(body, entry, gateway, following)
    return EventSourceResponse(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | headers)


async def stream_events(
    body: OpenAIImageRequest, entry: Entry, gateway: Gateway, following: contextlib.AsyncExitStack
) -> AsyncIterator[bytes]:
    picker = PartialPicker(body.partial_images or 0, entry.job.params.num_inference_steps)
    async with following, given_up_if_left(gateway.broker, entry):
        async for event in with_keep_alives(entry.subscription):
            if event is None:
                yield format_sse_event(comment="keep-alive")
            elif chunk := format_event(body, entry.job, event, picker):
                yield chunk


async def with_keep_alives(subscription: Subscription) -> AsyncIterator[JobEvent | None]:
    """The events, and None whenever there was none for a while."""
    events = subscription.__aiter__()
    while True:
        upcoming = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait((upcoming,), timeout=KEEP_ALIVE_S))[0]:
                yield None
        finally:
            upcoming.cancel()
        if (logged := upcoming.result()) is None:
            return
        yield logged.event


class PartialPicker:
    """Which previews become partial images: at most as many as asked for, spread over the steps."""

    def __init__(self, num_partials: int, num_steps: int) -> None:
        share = num_steps / (num_partials + 1)
        self._thresholds = [math.ceil(share * (i + 1)) for i in range(num_partials)]
        self._next_index = 0

    def pick(self, step: int) -> int | None:
        """The partial's index, or None if this preview isn't sent."""
        if self._next_index >= len(self._thresholds) or step < self._thresholds[self._next_index]:
            return None
        self._next_index += 1
        return self._next_index - 1


def format_event(body: OpenAIImageRequest, job: Job, event: JobEvent, picker: PartialPicker) -> bytes | None:
    match event:
        case Preview(picture=picture, step=step):
            if (index := picker.pick(step)) is None:
                return None
            partial = describe(body, job.params) | {"output_format": picture.format}
            return format_picture("image_generation.partial_image", picture, partial | {"partial_image_index": index})
        case Completed(pictures=pictures):
            more = {**describe(body, job.params), "usage": NO_TOKENS, "seed": pictures[0].seed}
            return format_picture("image_generation.completed", pictures[0], more)
        case _ if event.type in ("accepted", "started"):
            return None
        case _:
            return format_failure(event)


def format_picture(type: str, picture: Picture, more: Mapping[str, object]) -> bytes:
    data = {"type": type, "b64_json": to_base64(picture.data), "created_at": int(time.time()), **more}
    return format_sse_event(event=type, data_str=json.dumps(data))


def format_failure(ending: Any) -> bytes:
    answer: ErrorAnswer = render(ending_error(ending))
    return format_sse_event(event="error", data_str=json.dumps({"type": "error", **answer.body}))
