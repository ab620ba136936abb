"""The catalog of servable models: data only, no torch, so the gateway can read it too.

One table per model in `catalog.toml`; adding a model whose family exists is adding a table.
"""

from __future__ import annotations

import tomllib
from datetime import date
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

CATALOG_PATH = Path(__file__).with_name("catalog.toml")
BUNDLED_PATH = Path(__file__).with_name("bundled")

Size = tuple[int, int]


class CatalogError(Exception):
    """A catalog that can't be used: the message names the file, the key and what is allowed."""


class UnknownModelError(CatalogError):
    """No entry of that name; the message lists those there are."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"unknown model {name!r}: the catalog has {', '.join(known)}")
        self.name, self.known = name, known


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SchedulerSpec(_Entry):
    """A diffusers scheduler class, its changes to the folder's scheduler config, and extra arguments of `step`."""

    class_name: str
    config: dict[str, Any] = {}
    step: dict[str, float] = {}


class LoraSpec(_Entry):
    """A LoRA fused into the weights at load, as the LCM-LoRA is. `source` as in ModelSpec."""

    source: str
    weight_name: str = Field("pytorch_lora_weights.safetensors", pattern=r"\.safetensors$")
    scale: float = 1.0


class Range(_Entry):
    default: float
    min: float
    max: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.default <= self.max:
            raise ValueError(f"min <= default <= max is needed, got {self.min}, {self.default}, {self.max}")
        return self


class StepRange(_Entry):
    default: int = Field(ge=1)
    min: int = Field(ge=1)
    max: int = Field(ge=1, le=1000)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.default <= self.max:
            raise ValueError(f"min <= default <= max is needed, got {self.min}, {self.default}, {self.max}")
        return self


class ModelSpec(_Entry):
    """Everything that serving one model needs to know.

    A `source` is "bundled:<folder>" (ships with this repository), a local folder, or a repository on the Hugging Face
    Hub. `sizes` are the allowed (width, height), the first one the default; `warm_sizes` are proven before a worker is
    ready. `max_prompt_chars` bounds the text, the tokenizer's own limit gives a warning. `guidance_embedded` marks a
    full LCM, whose network reads the guidance scale as an input. `check_prompts` is whether the gateway's prompt check,
    where one is set, sees the model's prompts. `safety_checker` is the source whose folders `safety_checker` and
    `feature_extractor` judge every finished picture; with it there are no previews, which nothing would judge.
    """

    name: str
    description: str
    family: Literal["sd", "sdxl"]
    source: str
    license: str
    license_note: str = ""
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    tiny_vae: str | None = None
    safety_checker: str | None = None
    lora: LoraSpec | None = None
    schedulers: dict[str, SchedulerSpec] = Field(min_length=1)
    default_scheduler: str
    num_inference_steps: StepRange
    guidance_scale: Range
    guidance_embedded: bool = False
    sizes: list[Size] = Field(min_length=1)
    warm_sizes: list[Size] = Field(min_length=1)
    max_batch_size: int = Field(default=8, ge=1)
    max_num_images: int = Field(default=4, ge=1)
    max_prompt_chars: int = Field(default=2000, ge=1)
    check_prompts: bool = True
    example_prompts: list[str] = []
    deprecated: date | None = None
    sunset: date | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.default_scheduler not in self.schedulers:
            raise ValueError(f"default_scheduler {self.default_scheduler!r} is none of {', '.join(self.schedulers)}")
        if missing := [size for size in self.warm_sizes if size not in self.sizes]:
            raise ValueError(f"warm_sizes {missing} are not in sizes")
        if self.warm_sizes[0] != self.sizes[0]:
            raise ValueError(f"warm_sizes must begin with the default size {self.sizes[0]}, got {self.warm_sizes[0]}")
        num_rows = self.num_rows(self.max_num_images, self.guidance_scale.max)
        if num_rows > self.max_batch_size:
            raise ValueError(
                f"max_num_images {self.max_num_images} with guidance needs {num_rows} rows, "
                f"max_batch_size is {self.max_batch_size}"
            )
        return self

    @property
    def default_size(self) -> Size:
        return self.sizes[0]

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether classifier-free guidance runs: not up to a scale of 1, and never where the network embeds it."""
        return guidance_scale > 1 and not self.guidance_embedded

    def num_rows(self, num_images: int, guidance_scale: float) -> int:
        """How many rows of a batch a request takes: guidance doubles them."""
        return num_images * (2 if self.is_guided(guidance_scale) else 1)

    @property
    def public_revision(self) -> str:
        """What responses call `model_revision`."""
        return self.revision or "unpinned"


def load_catalog(path: Path = CATALOG_PATH) -> dict[str, ModelSpec]:
    """All entries by name. Raises CatalogError that names the file, the model and the key."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CatalogError(f"{path}: {error}") from error
    return {name: _parse(path, name, table) for name, table in tables.items()}


def _parse(path: Path, name: str, table: object) -> ModelSpec:
    if not isinstance(table, dict):
        raise CatalogError(f"{path}: {name!r} must be a table, one per model")
    try:
        return ModelSpec(name=name, **table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CatalogError(f"{path}: [{name}] {key}: {first['msg']}") from error


def get_spec(catalog: dict[str, ModelSpec], name: str) -> ModelSpec:
    try:
        return catalog[name]
    except KeyError:
        raise UnknownModelError(name, sorted(catalog)) from None


def resolve_source(source: str) -> str:
    """A folder path or a Hub repository id that diffusers' `from_pretrained` takes."""
    kind, _, folder = source.partition(":")
    return str(BUNDLED_PATH / folder) if kind == "bundled" else source
