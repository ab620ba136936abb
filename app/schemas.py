"""Request and response bodies.

A field's own limits stand here; what a model allows is checked by `app.admission` against its catalog entry.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from broker.messages import MAX_SEED, ImageFormat, SamplingParams, State
from models.catalog import MAX_LORA_WEIGHT

MAX_TEXT_CHARS = 32_000

Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
Name = Annotated[str, Field(min_length=1, max_length=100)]
Pixels = Annotated[int, Field(ge=1, le=16_384)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Guidance = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
NumImages = Annotated[int, Field(ge=1, le=100)]
DecoderChoice = Literal["full", "tiny", "auto"]


def _is_none(value: object) -> bool:
    return value is None


class _Request(BaseModel):
    """No coercion: a bool is no number and "4" is no 4. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LoraChoice(_Request):
    """A style LoRA of the model; without a weight the LoRA's own default."""

    name: Name
    weight: Annotated[float, Field(ge=-MAX_LORA_WEIGHT, le=MAX_LORA_WEIGHT, allow_inf_nan=False)] | None = None


class GenerationFields(_Request):
    """What a picture can be asked for, the same over HTTP and over a live socket. null means the model's default."""

    prompt: Text
    negative_prompt: Text | None = None
    model: Name | None = None
    width: Pixels | None = None
    height: Pixels | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    seed: Seed | None = None
    scheduler: Name | None = None
    loras: Annotated[list[LoraChoice], Field(max_length=8)] | None = None
    num_images: NumImages | None = None
    decoder: DecoderChoice | None = None
    output_format: ImageFormat | None = None
    output_quality: Annotated[int, Field(ge=1, le=100)] | None = None
    previews: bool | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=3_600_000)] | None = None
    metadata: bool | None = None


class GenerationRequest(GenerationFields):
    """Body of `POST /v1/generations`. `cache` says whether the answer to a request with a seed may be shared."""

    cache: bool | None = None


class Refine(_Request):
    """The better picture that a live session draws by itself once the typing pauses."""

    after_ms: Annotated[int, Field(ge=0, le=60_000)] = 300
    num_inference_steps: Steps | None = None
    decoder: DecoderChoice | None = None


class LiveGenerate(GenerationFields):
    type: Literal["generate"]
    seq: Annotated[int, Field(ge=0, le=MAX_SEED)]
    refine: Refine | None = None


class LiveCancel(_Request):
    type: Literal["cancel"]


class LiveAck(_Request):
    type: Literal["ack"]
    frame: Annotated[int, Field(ge=1, le=MAX_SEED)]


class LiveAuth(_Request):
    type: Literal["auth"]
    token: Annotated[str, Field(min_length=1, max_length=4096)]


class LiveTokenRequest(_Request):
    """Body of `POST /v1/live/tokens`. `user` names whom the token is for: tokens of one user share its rate."""

    origin: Annotated[str, Field(min_length=1, max_length=300)]
    model: Name | None = None
    ttl_s: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_messages_per_s: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] | None = None
    max_images_per_minute: Annotated[int, Field(ge=1, le=100_000)] | None = None
    user: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class OpenAIImageRequest(_Request):
    """Body of `POST /v1/images/generations`: OpenAI's fields, and ours by the SDK's `extra_body`.

    `complexity`, `moderation` and `style` change nothing here and are accepted for clients that send them; `user` and
    `safety_identifier` reach the operator's prompt check. What belongs to formats that aren't offered (GIF, SVG) is
    known, so that its refusal can say so.
    """

    prompt: Text
    model: Name | None = None
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")] | None = None
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    output_format: Literal["png", "jpeg", "webp", "gif", "svg"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    frame_count: int | None = None
    frame_duration_ms: int | None = None
    svg: dict[str, Any] | None = None
    moderation: Literal["low", "auto"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    style: Literal["vivid", "natural"] | None = None
    user: Annotated[str, Field(max_length=500)] | None = None
    safety_identifier: Annotated[str, Field(max_length=500)] | None = None

    negative_prompt: Text | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    seed: Seed | None = None
    scheduler: Name | None = None
    loras: Annotated[list[LoraChoice], Field(max_length=8)] | None = None
    decoder: DecoderChoice | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=3_600_000)] | None = None
    cache: bool | None = None
    metadata: bool | None = None


class Queue(BaseModel):
    """`position` counts the requests that stand before this one; both are 0 once it runs.

    `predicted_start_ms` comes from the workers' measured costs; null while no live worker holds the model.
    """

    position: int
    predicted_start_ms: int | None


class GeneratedImage(BaseModel):
    index: int
    seed: int
    format: ImageFormat
    width: int
    height: int
    url: str
    b64_json: Annotated[str | None, Field(exclude_if=_is_none)] = None


class GenerationTimings(BaseModel):
    queue_ms: float
    text_ms: float
    denoise_ms: float
    decode_ms: float
    check_ms: float
    encode_ms: float
    total_ms: float
    steps_ms: list[float]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorDetail


class Generation(BaseModel):
    """A generation, everywhere the same. `parameters` are those used, seed included."""

    id: str
    state: State
    model: str
    model_revision: str
    created_at: float
    queue: Queue
    parameters: SamplingParams
    images: list[GeneratedImage]
    timings: GenerationTimings | None
    warnings: list[str]
    error: Annotated[ErrorDetail | None, Field(exclude_if=_is_none)] = None


class LiveTokenAnswer(BaseModel):
    """A live token. `expires_at` is in seconds since the epoch; a page's socket asks for `subprotocols` as they are."""

    token: str
    expires_at: float
    expires_in_s: int
    model: str
    origin: str
    subprotocols: list[str]


class PreviewData(BaseModel):
    """`data:` of an SSE preview."""

    index: int
    step: int
    num_inference_steps: int
    format: ImageFormat
    b64_json: str


class ImageData(BaseModel):
    """One of OpenAI's images; `seed` is ours."""

    b64_json: str
    seed: int


class InputTokens(BaseModel):
    image_tokens: Literal[0] = 0
    text_tokens: Literal[0] = 0


class Usage(BaseModel):
    """Nothing is counted in tokens."""

    input_tokens: Literal[0] = 0
    input_tokens_details: InputTokens = InputTokens()
    output_tokens: Literal[0] = 0
    total_tokens: Literal[0] = 0


class _Described(BaseModel):
    size: str
    quality: str
    background: Literal["opaque"]
    output_format: ImageFormat


class OpenAIImages(_Described):
    """OpenAI's answer without `stream`."""

    created: int
    data: list[ImageData]
    usage: Usage
    safety_identifier: str | None = None


class PartialImage(_Described):
    """`data:` of a preview in OpenAI's stream."""

    type: Literal["image_generation.partial_image"]
    b64_json: str
    partial_image_index: int
    created_at: int


class CompletedImage(_Described):
    """`data:` of the picture that ends OpenAI's stream."""

    type: Literal["image_generation.completed"]
    b64_json: str
    seed: int
    created_at: int
    usage: Usage


class StreamError(BaseModel):
    """`data:` of the failure that ends OpenAI's stream."""

    type: Literal["error"]
    error: ErrorDetail


class Liveness(BaseModel):
    status: Literal["alive", "reader stopped"]


class ModelStanding(BaseModel):
    """One model of a worker; `detail` is what is being done to it, or why it failed."""

    model: str
    state: Literal["waiting", "loading", "warming", "warm", "failed"]
    detail: str


class WorkerState(BaseModel):
    worker_id: str
    state: str
    detail: str
    device: str
    warm_models: list[str]
    num_running: int
    models: list[ModelStanding]


class Readiness(BaseModel):
    """`models` are those that some live worker holds warm, `failed` why others could not be loaded, by worker."""

    ready: bool
    redis: Literal["ok", "unavailable"]
    models: list[str]
    failed: dict[str, dict[str, str]]
    workers: list[WorkerState]


class SizeCard(BaseModel):
    """What a worker measured at one picture size: milliseconds of a batch by its rows.

    `max_rows` is how large it lets a batch grow.
    """

    size: str
    max_rows: int
    step_ms: dict[int, float]
    decode_ms: dict[int, float]
    preview_ms: dict[int, float]
    check_ms: dict[int, float]


class WorkerCosts(BaseModel):
    """One live worker that holds the model warm, and what it measured."""

    worker_id: str
    device: str
    dtype: str
    revision: str
    max_batch_size: int
    num_running: int
    text_ms: float
    sizes: list[SizeCard]


class Limit(BaseModel):
    default: int | float
    min: int | float
    max: int | float


class LoraCard(BaseModel):
    """A style LoRA that requests to the model may ask for. `trigger` are words that the prompt should have, if any."""

    name: str
    description: str
    weight: Limit
    trigger: str
    license: str
    license_note: str


class ModelCard(BaseModel):
    """A catalog entry; the first four fields are what OpenAI clients read.

    `ready` and `state` "warm" are the same; `state_detail` says which worker does what, or why none does. `num_classes`
    is null for a model that draws any prompt; the prompts of another are names of its classes. `guidance` says what
    `guidance_scale` does: above 1 a second row per picture; an input of the network; nothing.
    """

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "fewstep"
    description: str
    ready: bool
    state: Literal["warm", "loading", "failed", "cold"]
    state_detail: str
    model_revision: str
    license: str
    license_note: str
    license_url: str
    tested_with: Literal["published weights", "random weights", "nothing"]
    sizes: list[str]
    default_size: str
    num_inference_steps: Limit
    guidance: Literal["classifier-free", "embedded", "none"]
    guidance_scale: Limit
    schedulers: list[str]
    default_scheduler: str
    loras: list[LoraCard]
    max_num_images: int
    max_prompt_chars: int
    has_tiny_decoder: bool
    has_safety_checker: bool
    num_classes: int | None
    example_prompts: list[str]
    deprecated: str | None
    sunset: str | None
    workers: list[WorkerCosts]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    default: str
    data: list[ModelCard]
