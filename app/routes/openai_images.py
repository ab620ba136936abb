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
from typing import Any

from fastapi import APIRouter
from fastapi.requests import Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event

from app.admission import Admission, Defaults, check_size_text, complete, find_warnings
from app.callers import Caller
from app.dependencies import CallerDep, GatewayDep, RequestIdDep, TraceparentDep
from app.errors import ErrorAnswer, GenerationExpired, ending_error, invalid, raises, render
from app.gateway import Gateway
from app.openapi import IMAGE_EVENTS, MODEL_HEADERS, RESULT_HEADERS, event_stream, show_headers
from app.rendering import model_headers, result_headers, to_base64
from app.replies import Subscription
from app.schemas import GenerationFields, OpenAIImageRequest, OpenAIImages
from app.strict_json import JsonRoute
from app.waiting import cancel_quietly, cancelled_if_left, wait_for_ending
from broker.messages import Completed, Job, JobEvent, Picture, Preview, SamplingParams
from models.catalog import ModelSpec

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
            "headers": show_headers(sometimes=(*RESULT_HEADERS, "Cache-Control", "X-Accel-Buffering", *MODEL_HEADERS)),
        }
    },
)
@raises(Admission.find_model, Admission.submit, ending_error)
async def create_image(
    body: OpenAIImageRequest,
    request: Request,
    gateway: GatewayDep,
    request_id: RequestIdDep,
    caller: CallerDep,
    traceparent: TraceparentDep,
) -> Response:
    """Draws `n` pictures; with `stream`, one picture with real previews on the way."""
    check_offered(body)
    spec = gateway.admission.find_model(body.model or gateway.settings.default_model, caller)
    params = choose_params(body, spec)
    job = Job(
        request_id=request_id,
        model=spec.name,
        params=params,
        lane="api",
        owner=caller.owner,
        gateway_id=gateway.replies.gateway_id,
        keep_s=gateway.settings.keep_sync_s,
        warnings=find_warnings(params, spec),
        traceparent=traceparent,
    )
    if body.stream:
        return await stream_image(body, job, gateway, caller)
    return await draw_images(body, job, gateway, caller, request)


def check_offered(body: OpenAIImageRequest) -> None:
    """Refuses by name what OpenAI's API has and this one doesn't."""
    if body.background == "transparent":
        raise invalid("background", body.background, "the models draw opaque pictures: opaque or auto")
    if body.response_format == "url":
        raise invalid("response_format", body.response_format, "pictures come as b64_json")
    if body.stream and (body.n or 1) > 1:
        raise invalid("n", body.n, "a stream carries 1 picture")


def choose_params(body: OpenAIImageRequest, spec: ModelSpec) -> SamplingParams:
    width, height = check_size_text(body.size, spec)
    if (body.n or 1) > spec.max_num_images:
        raise invalid("n", body.n, f"{spec.name} allows 1 to {spec.max_num_images}")
    fields = GenerationFields(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        width=width,
        height=height,
        num_inference_steps=body.num_inference_steps,
        guidance_scale=body.guidance_scale,
        seed=body.seed,
        scheduler=body.scheduler,
        num_images=body.n,
        decoder=body.decoder,
        output_format=body.output_format,
        previews=bool(body.stream and body.partial_images),
        metadata=body.metadata,
    )
    quality = 100 if body.output_compression is None else max(1, body.output_compression)
    return complete(fields, spec, Defaults(output_format="png", output_quality=quality))


async def draw_images(
    body: OpenAIImageRequest, job: Job, gateway: Gateway, caller: Caller, request: Request
) -> Response:
    with gateway.replies.follow(job.request_id) as subscription:
        await gateway.admission.submit(job, caller)
        async with cancelled_if_left(gateway.broker, job.request_id):
            ending = await wait_for_ending(subscription, request, gateway.settings.sync_wait_s)
    if ending is None:
        await cancel_quietly(gateway.broker, job.request_id)
        raise GenerationExpired(f"no picture within {gateway.settings.sync_wait_s:g} s", code="timeout")
    if not isinstance(ending, Completed):
        raise ending_error(ending)
    headers = result_headers(job, ending) | model_headers(gateway.catalog[job.model])
    return JSONResponse(show_images(body, job, ending), headers=headers)


def show_images(body: OpenAIImageRequest, job: Job, completed: Completed) -> dict[str, Any]:
    data = [{"b64_json": to_base64(picture.data), "seed": picture.seed} for picture in completed.pictures]
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


async def stream_image(body: OpenAIImageRequest, job: Job, gateway: Gateway, caller: Caller) -> Response:
    """Submits before the response starts, so that a refusal still has a status."""
    stack = contextlib.ExitStack()
    with stack:
        subscription = stack.enter_context(gateway.replies.follow(job.request_id))
        await gateway.admission.submit(job, caller)
        following = stack.pop_all()
    content = stream_events(body, job, gateway, subscription, following)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return EventSourceResponse(content, headers=headers | model_headers(gateway.catalog[job.model]))


async def stream_events(
    body: OpenAIImageRequest,
    job: Job,
    gateway: Gateway,
    subscription: Subscription,
    following: contextlib.ExitStack,
) -> AsyncIterator[bytes]:
    picker = PartialPicker(body.partial_images or 0, job.params.num_inference_steps)
    with following:
        async with cancelled_if_left(gateway.broker, job.request_id):
            async for event in with_keep_alives(subscription):
                if event is None:
                    yield format_sse_event(comment="keep-alive")
                elif chunk := format_event(body, job, event, picker):
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
