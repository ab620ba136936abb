"""How a generation looks from outside: its JSON, and the headers that travel with its bytes."""

from __future__ import annotations

import base64
import calendar
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from email.utils import formatdate

from app.errors import ending_error, render
from app.replies import as_ending
from app.schemas import ErrorDetail, GeneratedImage, Generation, GenerationTimings, PreviewData, Queue
from broker.messages import (
    Accepted,
    Cancelled,
    Completed,
    Expired,
    Failed,
    Job,
    JobEvent,
    LoggedEvent,
    Picture,
    Preview,
    Started,
    State,
    Superseded,
    TerminalEvent,
    Timings,
)
from broker.redis_broker import RequestStatus
from broker.terms import Origin
from models.catalog import ModelSpec

STAGES = ("queue", "text", "denoise", "decode", "check", "encode", "total")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request has come; what its JSON is made of."""

    job: Job
    state: State
    created_at: float
    position: int = 0
    predicted_start_ms: int | None = None
    ending: TerminalEvent | None = None


def progress_of(status: RequestStatus) -> Progress:
    ending = find_ending(status.log)
    return Progress(status.job, status.state, status.created_at, status.position, status.start_ms, ending)


def find_ending(log: Iterable[LoggedEvent]) -> TerminalEvent | None:
    return next((ending for logged in log if (ending := as_ending(logged))), None)


def state_after(event: JobEvent) -> State:
    match event:
        case Accepted():
            return "queued"
        case Started() | Preview():
            return "running"
        case Completed() | Failed() | Superseded() | Cancelled() | Expired():
            return event.type


def show_generation(progress: Progress, spec: ModelSpec | None, *, with_bytes: bool) -> Generation:
    """The one JSON of a generation. `spec` is None where the catalog lost the model since."""
    job, ending = progress.job, progress.ending
    completed = ending if isinstance(ending, Completed) else None
    is_queued = progress.state == "queued"
    return Generation(
        id=job.request_id,
        state=progress.state,
        model=job.model,
        model_revision=completed.model_revision if completed else spec.public_revision if spec else "unknown",
        created_at=round(progress.created_at, 3),
        queue=Queue(
            position=progress.position if is_queued else 0,
            predicted_start_ms=progress.predicted_start_ms if is_queued else 0,
        ),
        parameters=job.params,
        images=[_show_image(job.request_id, picture, with_bytes) for picture in completed.pictures]
        if completed
        else [],
        timings=_show_timings(completed.timings) if completed else None,
        warnings=list(dict.fromkeys((*job.warnings, *(completed.warnings if completed else ())))),
        error=_show_error(ending),
    )


def _show_image(request_id: str, picture: Picture, with_bytes: bool) -> GeneratedImage:
    return GeneratedImage(
        index=picture.index,
        seed=picture.seed,
        format=picture.format,
        width=picture.width,
        height=picture.height,
        url=image_path(request_id, picture.index),
        b64_json=to_base64(picture.data) if with_bytes and picture.data else None,
    )


def _show_timings(timings: Timings) -> GenerationTimings:
    rounded = {f"{stage}_ms": round(getattr(timings, f"{stage}_ms"), 3) for stage in STAGES}
    return GenerationTimings(**rounded, steps_ms=[round(step_ms, 3) for step_ms in timings.steps_ms])


def _show_error(ending: TerminalEvent | None) -> ErrorDetail | None:
    if ending is None or isinstance(ending, Completed):
        return None
    return ErrorDetail.model_validate(render(ending_error(ending)).body["error"])


def show_preview(preview: Preview) -> PreviewData:
    return PreviewData(
        index=preview.picture.index,
        step=preview.step,
        num_inference_steps=preview.num_inference_steps,
        format=preview.picture.format,
        b64_json=to_base64(preview.picture.data),
    )


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def generation_path(request_id: str) -> str:
    return f"/v1/generations/{request_id}"


def image_path(request_id: str, index: int) -> str:
    return f"{generation_path(request_id)}/images/{index}"


def result_headers(job: Job, completed: Completed, origin: Origin = "new") -> dict[str, str]:
    """What a picture can't say of itself. One that was drawn before took no time now."""
    was_drawn_now = origin in ("new", "joined")
    return {
        "Server-Timing": server_timing(completed.timings) if was_drawn_now else f'cache;desc="{origin}"',
        "X-Fewstep-Seed": str(job.params.seed),
        "X-Fewstep-Model": job.model,
        "X-Fewstep-Model-Revision": completed.model_revision,
        "X-Fewstep-Generation": job.request_id,
    }


def server_timing(timings: Timings) -> str:
    return ", ".join(f"{stage};dur={getattr(timings, f'{stage}_ms'):.3f}" for stage in STAGES)


def model_headers(spec: ModelSpec) -> dict[str, str]:
    """RFC 9745 and RFC 8594: empty unless the catalog calls the model deprecated."""
    headers = {"Deprecation": f"@{_midnight(spec.deprecated)}"} if spec.deprecated else {}
    return headers | ({"Sunset": formatdate(_midnight(spec.sunset), usegmt=True)} if spec.sunset else {})


def _midnight(day: date) -> int:
    return calendar.timegm(day.timetuple())
