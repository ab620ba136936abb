"""What gateway and worker say to each other.

Frozen dataclasses, grouped by direction. On the wire everything is JSON, except image bytes, which travel beside it
as raw fields: `encode_*` and `decode_*` at the end are the only places that know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

SCHEMA_VERSION = 1
MAX_SEED = 2**53 - 1
CONTENT_BLOCKED = "content_policy_violation"  # OpenAI's code, which its clients know

Lane = Literal["live", "api"]
ImageFormat = Literal["png", "jpeg", "webp"]
Decoder = Literal["full", "tiny"]
State = Literal["queued", "running", "completed", "failed", "cancelled", "superseded", "expired"]
TERMINAL_STATES: frozenset[State] = frozenset({"completed", "failed", "cancelled", "superseded", "expired"})


# From gateway to worker


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """One style LoRA of the catalog and how strongly it is applied."""

    name: str
    weight: float


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What to draw, complete: every default is already filled in and every limit already checked.

    Image i of `num_images` is drawn from `seed + i`. `output_quality` is 1 to 100 and ignored for PNG.
    """

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    scheduler: str
    num_images: int
    decoder: Decoder
    output_format: ImageFormat
    output_quality: int
    previews: bool
    metadata: bool
    loras: tuple[LoraWeight, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted request.

    `owner` is the key (or "anonymous") whose line it waits in, `session` the live connection it belongs to,
    `gateway_id` the first subscriber of its events (None: nobody waits). `keep_s` is how long its log and pictures
    outlive its end; 0 keeps states only. `deadline_ms` counts from the submit, by Redis' clock. `input_image` is the
    place of image-to-image, not offered yet. `user` is what an application calls its own end user.
    """

    request_id: str
    model: str
    params: SamplingParams
    lane: Lane
    owner: str
    gateway_id: str | None
    keep_s: float
    session: str | None = None
    deadline_ms: int | None = None
    warnings: tuple[str, ...] = ()
    traceparent: str | None = None
    input_image: str | None = None
    user: str | None = None
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class Delivery:
    """A job as a worker receives it: its attempt (from 1) and how long it waited, by Redis' clock.

    `is_last_attempt` work runs in a batch of its own, so that a poisonous request can't take its neighbours along.
    """

    job: Job
    attempt: int
    waited_ms: float
    is_last_attempt: bool = False


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop this request at the next step boundary.

    `reason` "newer" is a wish, not an order: the session has a newer prompt waiting; the worker stops only if more
    than half of the work remains and `ms_since_final` (None: never shown one) is below 300.
    """

    request_id: str
    reason: Literal["cancelled", "newer", "lost"]
    ms_since_final: float | None = None


# From worker to gateway


@dataclass(frozen=True, slots=True)
class Picture:
    """One encoded image; `data` are the bytes of the file."""

    index: int
    seed: int
    format: ImageFormat
    width: int
    height: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds of each stage of one request; `steps_ms` has one entry per denoising step.

    `check_ms` is the safety checker's, 0 for a model without one.
    """

    queue_ms: float
    text_ms: float
    denoise_ms: float
    decode_ms: float
    encode_ms: float
    total_ms: float
    steps_ms: tuple[float, ...] = ()
    check_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a request failed, in words for its caller. `is_retryable`: the same request may succeed if sent again."""

    code: str
    message: str
    is_retryable: bool = False


@dataclass(frozen=True, slots=True)
class Accepted:
    request_id: str
    type: Literal["accepted"] = "accepted"


@dataclass(frozen=True, slots=True)
class Started:
    request_id: str
    worker_id: str
    attempt: int
    type: Literal["started"] = "started"


@dataclass(frozen=True, slots=True)
class Preview:
    """The predicted picture after `step` (from 1) of `num_inference_steps`."""

    request_id: str
    step: int
    num_inference_steps: int
    picture: Picture
    type: Literal["preview"] = "preview"


@dataclass(frozen=True, slots=True)
class Completed:
    request_id: str
    pictures: tuple[Picture, ...]
    timings: Timings
    model_revision: str
    warnings: tuple[str, ...] = ()
    type: Literal["completed"] = "completed"


@dataclass(frozen=True, slots=True)
class Failed:
    request_id: str
    error: JobError
    type: Literal["failed"] = "failed"


@dataclass(frozen=True, slots=True)
class Superseded:
    """A newer prompt of the same session took its place; `by` is that request."""

    request_id: str
    by: str | None = None
    type: Literal["superseded"] = "superseded"


@dataclass(frozen=True, slots=True)
class Cancelled:
    request_id: str
    type: Literal["cancelled"] = "cancelled"


@dataclass(frozen=True, slots=True)
class Expired:
    request_id: str
    type: Literal["expired"] = "expired"


JobEvent = Accepted | Started | Preview | Completed | Failed | Superseded | Cancelled | Expired
TerminalEvent = Completed | Failed | Superseded | Cancelled | Expired


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event with its number in its request's log, counted from 1."""

    seq: int
    event: JobEvent


@dataclass(frozen=True, slots=True)
class SizeCosts:
    """What one picture size costs: milliseconds of a batch by its rows.

    `max_rows` is how far a batch may grow: beyond it one more row costs the others more than it saves in the queue.
    `check_ms` is empty for a model without a safety checker.
    """

    width: int
    height: int
    max_rows: int
    step_ms: dict[int, float]
    decode_ms: dict[int, float]
    preview_ms: dict[int, float]
    check_ms: dict[int, float] = field(default_factory=dict)


def cost_at(table: Mapping[int, float], rows: int) -> float:
    """Between two measured row counts on the line between them, below the least as that one, above the largest in
    proportion."""
    below = max((n for n in table if n <= rows), default=min(table))
    above = min((n for n in table if n >= rows), default=below)
    if above == below:
        return table[below] * max(1.0, rows / below)
    share = (rows - below) / (above - below)
    return table[below] + share * (table[above] - table[below])


@dataclass(frozen=True, slots=True)
class WarmModel:
    """A model that a worker has proven by a real generation at each of its warm sizes; the default size comes first.

    `text_ms` is what one prompt costs that no cache holds. `fingerprint` is that of the entry by which the worker
    draws, `loras` are its style LoRAs; after a reload both may be others than in the gateway's catalog.
    """

    model: str
    revision: str
    max_batch_size: int
    text_ms: float
    sizes: tuple[SizeCosts, ...]
    fingerprint: str = ""
    loras: tuple[str, ...] = ()

    def find_costs(self, width: int, height: int) -> SizeCosts:
        """What was measured for this size, or for the one whose area is nearest."""
        return min(self.sizes, key=lambda costs: abs(costs.width * costs.height - width * height))


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """How one model of a worker is; `detail` is what is being done to it, or why it failed."""

    model: str
    state: Literal["waiting", "loading", "warming", "warm", "failed"]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself with every heartbeat. `models` are all that it was told to keep warm."""

    worker_id: str
    state: Literal["starting", "ready", "draining"]
    device: str
    dtype: str
    warm_models: tuple[WarmModel, ...] = ()
    num_running: int = 0
    detail: str = ""
    models: tuple[ModelStatus, ...] = ()


# On the wire

_job = TypeAdapter(Job)
_worker_info = TypeAdapter(WorkerInfo)
_event: TypeAdapter[JobEvent] = TypeAdapter(Annotated[JobEvent, Field(discriminator="type")])


def encode_job(job: Job) -> bytes:
    return _job.dump_json(job)


def decode_job(data: bytes) -> Job:
    return _job.validate_json(data)


def encode_worker_info(info: WorkerInfo) -> bytes:
    return _worker_info.dump_json(info)


def decode_worker_info(data: bytes) -> WorkerInfo:
    return _worker_info.validate_json(data)


def encode_event(event: JobEvent) -> dict[bytes, bytes]:
    """Stream fields of an event: `event` is its JSON, `image0`, `image1`, … the bytes of its pictures."""
    match event:
        case Preview(picture=picture):
            pictures: tuple[Picture, ...] = (picture,)
            bare: JobEvent = replace(event, picture=replace(picture, data=b""))
        case Completed(pictures=pictures):
            bare = replace(event, pictures=tuple(replace(picture, data=b"") for picture in pictures))
        case _:
            pictures, bare = (), event
    fields = {b"event": _event.dump_json(bare)}
    return fields | {b"image%d" % i: picture.data for i, picture in enumerate(pictures)}


def decode_event(fields: Mapping[bytes, bytes]) -> JobEvent:
    """The event of stream fields. Pictures whose bytes were not kept come back with empty `data`."""
    event = _event.validate_json(fields[b"event"])
    match event:
        case Preview(picture=picture):
            return replace(event, picture=replace(picture, data=fields.get(b"image0", b"")))
        case Completed(pictures=pictures):
            return replace(
                event,
                pictures=tuple(
                    replace(picture, data=fields.get(b"image%d" % i, b"")) for i, picture in enumerate(pictures)
                ),
            )
        case _:
            return event
