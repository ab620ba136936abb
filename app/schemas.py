"""Request and response bodies.

A field's own limits stand here; what a model allows is checked by `app.admission` against its catalog entry.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from broker.messages import MAX_SEED, ImageFormat, SamplingParams, State

MAX_TEXT_CHARS = 32_000
HAS_TEXT = r"\S"

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
    name: Name
    weight: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 1.0


class GenerationFields(_Request):
    """What a picture can be asked for, the same over HTTP and over a live socket. null means the default."""

    prompt: Annotated[Text, Field(description="what to draw", json_schema_extra={"pattern": HAS_TEXT})]
    negative_prompt: Annotated[
        Text | None, Field(description="what to avoid; has an effect only with a `guidance_scale` above 1")
    ] = None
    model: Annotated[Name | None, Field(description="an `id` of `/v1/models`; `FEWSTEP_DEFAULT_MODEL` by default")] = (
        None
    )
    width: Annotated[Pixels | None, Field(description="of one of the model's `sizes`; its first by default")] = None
    height: Annotated[Pixels | None, Field(description="of one of the model's `sizes`; its first by default")] = None
    num_inference_steps: Annotated[Steps | None, Field(description="within the model's limits")] = None
    guidance_scale: Annotated[Guidance | None, Field(description="within the model's limits")] = None
    seed: Annotated[
        Seed | None,
        Field(
            description="0 to 9007199254740991 (2^53 − 1); the same seed gives the same picture; drawn at random by "
            "default"
        ),
    ] = None
    scheduler: Annotated[Name | None, Field(description="one of the model's `schedulers`")] = None
    loras: Annotated[
        list[LoraChoice] | None,
        Field(
            max_length=8,
            description='style LoRAs of the catalog, as `[{"name", "weight"}]`; no bundled model has one',
        ),
    ] = None
    num_images: Annotated[NumImages | None, Field(description="picture i is drawn from `seed` + i; 1 by default")] = (
        None
    )
    decoder: Annotated[
        DecoderChoice | None,
        Field(description="`full`, `tiny` (faster, coarser) or `auto`, the default, which is `full` here"),
    ] = None
    output_format: Annotated[ImageFormat | None, Field(description="`png`, `jpeg` or `webp`; `jpeg` by default")] = None
    output_quality: Annotated[
        int | None, Field(ge=1, le=100, description="1 to 100, for `jpeg` and `webp`; 85 by default")
    ] = None
    previews: Annotated[bool | None, Field(description="whether `/events` carries previews; `false` by default")] = None
    deadline_ms: Annotated[
        int | None,
        Field(
            ge=1, le=3_600_000, description="1 to 3600000: the request ends as `expired` after that; none by default"
        ),
    ] = None
    metadata: Annotated[
        bool | None,
        Field(description="whether the file carries its parameters (PNG text, EXIF description); `true` by default"),
    ] = None


class GenerationRequest(GenerationFields):
    """Body of `POST /v1/generations`."""


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


UNUSED = "accepted for clients that send it; changes nothing"
AS_NATIVE = "as in `POST /v1/generations`"


class OpenAIImageRequest(_Request):
    """Body of `POST /v1/images/generations`: OpenAI's fields, and ours by the SDK's `extra_body`.

    `quality`, `moderation`, `style` and `user` change nothing here and are accepted for clients that send them.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "not": {
                "required": ["stream", "n"],
                "properties": {"stream": {"const": True}, "n": {"type": "integer", "minimum": 2}},
            }
        }
    )

    prompt: Annotated[Text, Field(description="what to draw", json_schema_extra={"pattern": HAS_TEXT})]
    model: Annotated[Name | None, Field(description="an `id` of `/v1/models`; `FEWSTEP_DEFAULT_MODEL` by default")] = (
        None
    )
    n: Annotated[int | None, Field(ge=1, le=10, description="how many pictures, 1 by default; a stream has one")] = None
    size: Annotated[
        str | None,
        Field(
            pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$",
            description="one of the model's `sizes`, or `auto`, its first, by default",
        ),
    ] = None
    quality: Annotated[
        Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None, Field(description=UNUSED)
    ] = None
    background: Annotated[
        Literal["auto", "opaque", "transparent"] | None, Field(description="the models draw opaque pictures")
    ] = None
    output_format: Annotated[ImageFormat | None, Field(description="`png` by default")] = None
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="quality of `jpeg` and `webp`, 100 by default")
    ] = None
    moderation: Annotated[Literal["low", "auto"] | None, Field(description=UNUSED)] = None
    stream: Annotated[bool | None, Field(description="whether the answer is a stream of events")] = None
    partial_images: Annotated[
        int | None, Field(ge=0, le=3, description="at most so many previews in a stream; none by default")
    ] = None
    response_format: Annotated[Literal["b64_json", "url"] | None, Field(description="pictures come as `b64_json`")] = (
        None
    )
    style: Annotated[Literal["vivid", "natural"] | None, Field(description=UNUSED)] = None
    user: Annotated[str | None, Field(max_length=500, description=UNUSED)] = None
    safety_identifier: Annotated[str | None, Field(max_length=500, description="sent back")] = None

    negative_prompt: Annotated[Text | None, Field(description=AS_NATIVE)] = None
    num_inference_steps: Annotated[Steps | None, Field(description=AS_NATIVE)] = None
    guidance_scale: Annotated[Guidance | None, Field(description=AS_NATIVE)] = None
    seed: Annotated[Seed | None, Field(description=AS_NATIVE)] = None
    scheduler: Annotated[Name | None, Field(description=AS_NATIVE)] = None
    decoder: Annotated[DecoderChoice | None, Field(description=AS_NATIVE)] = None
    metadata: Annotated[bool | None, Field(description=AS_NATIVE)] = None


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


class WorkerState(BaseModel):
    worker_id: str
    state: str
    detail: str
    device: str
    warm_models: list[str]
    num_running: int


class Readiness(BaseModel):
    """`models` are those that some live worker holds warm."""

    ready: bool
    redis: Literal["ok", "unavailable"]
    models: list[str]
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


class ModelCard(BaseModel):
    """A catalog entry; the first four fields are what OpenAI clients read."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "fewstep"
    description: str
    ready: bool
    model_revision: str
    license: str
    license_note: str
    sizes: list[str]
    default_size: str
    num_inference_steps: Limit
    guidance_scale: Limit
    schedulers: list[str]
    default_scheduler: str
    max_num_images: int
    max_prompt_chars: int
    has_tiny_decoder: bool
    example_prompts: list[str]
    deprecated: str | None
    sunset: str | None
    workers: list[WorkerCosts]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    default: str
    data: list[ModelCard]
