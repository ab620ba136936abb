"""A body becomes complete sampling parameters: every default filled in, every limit checked against the model."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from app.errors import invalid
from app.loras import check_loras, lora_warnings
from app.schemas import GenerationFields
from broker.messages import MAX_SEED, Decoder, ImageFormat, SamplingParams
from models.catalog import ClassNames, ModelSpec, Size, UnknownClassError

DEFAULT_QUALITY = 85


def draw_seed(num_images: int = 1) -> int:
    return secrets.randbelow(MAX_SEED - num_images + 2)


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a route fills in where neither the request nor the model says anything.

    `seed` None draws one per request. `decoder` is what "auto" means; a model without a tiny decoder has only "full".
    """

    output_format: ImageFormat
    output_quality: int = DEFAULT_QUALITY
    previews: bool = False
    decoder: Decoder = "full"
    seed: int | None = None


def complete(fields: GenerationFields, spec: ModelSpec, defaults: Defaults) -> SamplingParams:
    """Every field filled in and checked against the model. Raises InvalidRequest that names the field."""
    num_images = _check_num_images(fields.num_images or 1, spec)
    width, height = _choose_size(fields.width, fields.height, spec)
    return SamplingParams(
        prompt=_check_prompt(fields.prompt, spec),
        negative_prompt=_check_length("negative_prompt", fields.negative_prompt, spec),
        width=width,
        height=height,
        num_inference_steps=check_steps("num_inference_steps", fields.num_inference_steps, spec),
        guidance_scale=_check_guidance(fields.guidance_scale, spec),
        seed=_choose_seed(fields.seed, num_images, defaults),
        scheduler=_check_scheduler(fields.scheduler, spec),
        num_images=num_images,
        decoder=choose_decoder("decoder", fields.decoder, spec, defaults.decoder),
        output_format=fields.output_format or defaults.output_format,
        output_quality=fields.output_quality or defaults.output_quality,
        previews=defaults.previews if fields.previews is None else fields.previews,
        metadata=fields.metadata is not False,
        loras=check_loras(fields.loras or [], spec),
    )


def earliest(*deadlines_ms: int | None) -> int | None:
    return min((deadline_ms for deadline_ms in deadlines_ms if deadline_ms is not None), default=None)


def find_warnings(params: SamplingParams, spec: ModelSpec) -> tuple[str, ...]:
    """What is accepted but has no effect, less than it could have, or may mean something else."""
    return (
        *_class_warnings(params, spec),
        *_negative_prompt_warnings(params, spec),
        *_preview_warnings(params, spec),
        *lora_warnings(params, spec),
    )


def _class_warnings(params: SamplingParams, spec: ModelSpec) -> tuple[str, ...]:
    classes = spec.class_names
    if classes is None or not (others := classes.namesakes(params.prompt)):
        return ()
    listed = ", ".join(_show_class(number, classes) for number in others)
    drawn = _show_class(classes.find(params.prompt), classes)
    return (f"prompt names several classes: drawn is {drawn}; there is also {listed}",)


def _show_class(number: int, classes: ClassNames) -> str:
    return f"class {number} ({', '.join(classes.names(number)[:2])})"


def _preview_warnings(params: SamplingParams, spec: ModelSpec) -> tuple[str, ...]:
    if not params.previews or spec.safety_checker is None:
        return ()
    return (f"previews has no effect: a safety checker judges the pictures of {spec.name} when they are finished",)


def _negative_prompt_warnings(params: SamplingParams, spec: ModelSpec) -> tuple[str, ...]:
    if not params.negative_prompt or spec.is_guided(params.guidance_scale):
        return ()
    match spec.guidance:
        case "classifier-free":
            why = f"guidance_scale is {params.guidance_scale:g} and must be above 1"
        case "embedded":
            why = f"{spec.name} reads the guidance scale itself"
        case "none":
            why = f"{spec.name} was distilled without guidance"
    return (f"negative_prompt has no effect: {why}",)


def _check_prompt(prompt: str, spec: ModelSpec) -> str:
    if not prompt.strip():
        raise invalid("prompt", prompt, "it must say something")
    _check_length("prompt", prompt, spec)
    _check_class(prompt, spec)
    return prompt


def _check_class(prompt: str, spec: ModelSpec) -> None:
    """The prompt of a class-conditional model is the name of a class."""
    if spec.class_names is None:
        return
    try:
        spec.class_names.find(prompt)
    except UnknownClassError as error:
        last = len(spec.class_names) - 1
        near = f"near names: {', '.join(error.suggestions)}" if error.suggestions else "no name is near"
        allowed = f"{spec.name} draws classes, by name or as class 0 to class {last}; {near}"
        raise invalid("prompt", prompt, allowed, code="unknown_class") from error


def _check_length(param: str, text: str | None, spec: ModelSpec) -> str | None:
    if text is not None and len(text) > spec.max_prompt_chars:
        allowed = f"{spec.name} takes at most {spec.max_prompt_chars} characters, it has {len(text)}"
        raise invalid(param, text, allowed, code="text_too_long")
    return text


def _check_num_images(num_images: int, spec: ModelSpec) -> int:
    if num_images > spec.max_num_images:
        raise invalid("num_images", num_images, f"{spec.name} allows 1 to {spec.max_num_images}")
    return num_images


def _choose_size(width: int | None, height: int | None, spec: ModelSpec) -> Size:
    """The first listed size that fits what is given: the model's default where nothing is."""
    fitting = [size for size in spec.sizes if width in (None, size[0]) and height in (None, size[1])]
    if fitting:
        return fitting[0]
    param = "width" if width is not None and all(width != size[0] for size in spec.sizes) else "height"
    asked = f"{width}x{height}" if width is not None and height is not None else width or height
    raise invalid(param, asked, f"sizes of {spec.name}: {list_sizes(spec)}", code="unsupported_size")


def list_sizes(spec: ModelSpec) -> str:
    return ", ".join(f"{width}x{height}" for width, height in spec.sizes)


def check_steps(param: str, steps: int | None, spec: ModelSpec) -> int:
    allowed = spec.num_inference_steps
    if steps is not None and not allowed.min <= steps <= allowed.max:
        raise invalid(param, steps, f"{spec.name} allows {allowed.min} to {allowed.max}")
    return allowed.default if steps is None else steps


def _check_guidance(guidance_scale: float | None, spec: ModelSpec) -> float:
    allowed = spec.guidance_scale
    if guidance_scale is not None and not allowed.min <= guidance_scale <= allowed.max:
        range_text = f"{allowed.min:g}" if allowed.min == allowed.max else f"{allowed.min:g} to {allowed.max:g}"
        why = _why_guidance(spec, is_below=guidance_scale < allowed.min)
        raise invalid("guidance_scale", guidance_scale, f"{spec.name} allows {range_text}: {why}")
    return allowed.default if guidance_scale is None else float(guidance_scale)


def _why_guidance(spec: ModelSpec, *, is_below: bool) -> str:
    match spec.guidance:
        case "embedded":
            return "the scale is an input of its network, which was trained with these"
        case "none":
            return "it was distilled without guidance"
        case "classifier-free" if is_below:
            return "it follows the prompt too loosely with less than this"
        case "classifier-free" if spec.is_guided(spec.guidance_scale.default):
            return "it oversaturates with more than this"
        case "classifier-free":
            return "few-step models need no guidance, and oversaturate with more than this"


def _check_scheduler(scheduler: str | None, spec: ModelSpec) -> str:
    if scheduler is not None and scheduler not in spec.schedulers:
        raise invalid("scheduler", scheduler, f"{spec.name} has {', '.join(spec.schedulers)}")
    return scheduler or spec.default_scheduler


def choose_decoder(param: str, choice: str | None, spec: ModelSpec, auto: Decoder) -> Decoder:
    match choice:
        case "full":
            return "full"
        case "tiny":
            if not spec.tiny_vae:
                raise invalid(param, choice, f"{spec.name} has only the full decoder")
            return "tiny"
        case _:
            return auto if spec.tiny_vae else "full"


def _choose_seed(seed: int | None, num_images: int, defaults: Defaults) -> int:
    if seed is None:
        seed = defaults.seed
    if seed is None:
        return draw_seed(num_images)
    if seed + num_images - 1 > MAX_SEED:
        raise invalid("seed", seed, f"image i is drawn from seed + i, which must stay within {MAX_SEED}")
    return seed


def check_size_text(size: str | None, spec: ModelSpec) -> Size:
    """OpenAI's `size`: "WIDTHxHEIGHT", or "auto" for the model's default."""
    if size in (None, "auto"):
        return spec.default_size
    for width, height in spec.sizes:
        if size == f"{width}x{height}":
            return width, height
    message = f"sizes of {spec.name}: auto, {list_sizes(spec)}"
    raise invalid("size", size, message, code="unsupported_size")
