"""What a picture can be asked for. The service's docs/api.md says what each field means; what is left out or None is
the model's default."""

from __future__ import annotations

from typing import Literal, TypedDict


class Lora(TypedDict, total=False):
    """A style LoRA of the service's catalog."""

    name: str
    weight: float


class CommonFields(TypedDict, total=False):
    """Over HTTP and live."""

    negative_prompt: str | None
    model: str | None
    width: int | None
    height: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    seed: int | None
    scheduler: str | None
    loras: list[Lora] | None
    decoder: Literal["full", "tiny", "auto"] | None
    output_format: Literal["png", "jpeg", "webp"] | None
    output_quality: int | None
    deadline_ms: int | None
    metadata: bool | None


class PictureFields(CommonFields, total=False):
    """Of one picture. `cache`: whether the result may be shared."""

    cache: bool | None


class Fields(PictureFields, total=False):
    """Of one picture or several: picture i is drawn from `seed` + i."""

    num_images: int | None


class Refine(TypedDict, total=False):
    """The better picture of the same seed, drawn once no newer words came for `after_ms` (300 by default)."""

    after_ms: int
    num_inference_steps: int | None
    decoder: Literal["full", "tiny", "auto"] | None


class LiveFields(CommonFields, total=False):
    """Of a live request. Without a seed, a connection keeps one. `previews` is on by default."""

    num_images: int | None
    previews: bool | None
    refine: Refine | None
