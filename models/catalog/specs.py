"""What a table of the catalog may hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.catalog.classes import ClassNames, load_classes

MAX_LORA_WEIGHT = 10.0  # either way
LATENT_UNIT = 8  # pixels on a side that one of a latent stands for, in Stable Diffusion and SDXL
BUNDLED_PATH = Path(__file__).parent.with_name("bundled")

Size = tuple[int, int]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


SchedulerClass = Literal[
    "LCMScheduler",
    "TCDScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "CMStochasticIterativeScheduler",
]


# Those whose `set_timesteps` takes a list of timesteps.
TAKES_TIMESTEPS = (
    "LCMScheduler",
    "TCDScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler",
)


class SchedulerSpec(_Entry):
    """A diffusers scheduler class that asks the network once a step, its changes to the folder's scheduler config, and
    extra arguments of `step`, such as `eta`.

    `timesteps` are lists by their length, largest timestep first, for numbers of steps for which the model's authors
    chose others than the scheduler does.
    """

    class_name: SchedulerClass
    config: dict[str, Any] = {}
    step: dict[str, float] = {}
    timesteps: dict[int, list[int]] = {}

    @model_validator(mode="after")
    def _known_timesteps(self) -> Self:
        if self.timesteps and self.class_name not in TAKES_TIMESTEPS:
            raise ValueError(f"timesteps: {self.class_name} takes none; {', '.join(TAKES_TIMESTEPS)} do")
        for num_steps, timesteps in self.timesteps.items():
            if len(timesteps) != num_steps or timesteps != sorted(set(timesteps), reverse=True):
                raise ValueError(f"timesteps: {num_steps} falling numbers are needed, got {timesteps}")
        return self


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


class StyleLora(_Entry):
    """A LoRA that a request may ask for, with a weight. `source` as in ModelSpec, `models` the entries it was made for.

    `trigger` are the words that a prompt should have for it, if any.
    """

    name: str
    description: str
    source: str
    weight_name: str = Field("pytorch_lora_weights.safetensors", pattern=r"\.safetensors$")
    models: list[str] = Field(min_length=1)
    weight: Range = Range(default=1.0, min=0.0, max=1.5)
    trigger: str = ""
    license: str
    license_note: str = ""

    @field_validator("weight")
    @classmethod
    def _within_reach(cls, weight: Range) -> Range:
        if weight.min < -MAX_LORA_WEIGHT or weight.max > MAX_LORA_WEIGHT:
            allowed = f"-{MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}"
            raise ValueError(f"min and max must be within {allowed}, got {weight.min:g} and {weight.max:g}")
        return weight


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

    A `source` is "bundled:<folder>" (ships with this repository), a local folder, a repository on the Hugging Face Hub,
    or a local .safetensors file with all networks in one, which is read by the configs and tokenizer of `config`.
    `unet`, `vae` and `tiny_vae` are sources of networks to take instead of the folder's, `variant` the kind of weight
    files to take where there is one. `dtype` is what a GPU computes in, `memory_gib` what weights and the largest batch
    take there. `safety_checker` is the source whose folders `safety_checker` and `feature_extractor` judge every
    finished picture; with it there are no previews, which nothing would judge.

    `guidance` says what guidance scales mean. "classifier-free": above 1 they double the rows. "embedded": the network
    of a full LCM reads them as an input (Luo et al. 2023, section 4.2). "none": the model was distilled without.
    `classes` is for a class-conditional model, whose prompts are class names: "imagenet", or a text file of its own.

    `sizes` are the allowed (width, height), the first one the default; `warm_sizes` are proven before a worker is
    ready. `max_prompt_chars` bounds the text, the tokenizer's own limit gives a warning. `check_prompts` is whether the
    gateway's prompt check, where one is set, sees the model's prompts. `loras` may be asked for by requests; each has a
    table of its own. `tested_with` is what this project's own tests and benchmarks loaded.
    """

    name: str
    description: str
    family: Literal["sd", "sdxl", "consistency"]
    source: str
    license: str
    license_note: str = ""
    license_url: str = ""
    tested_with: Literal["published weights", "random weights", "nothing"] = "nothing"
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    memory_gib: float | None = Field(default=None, gt=0)
    config: str | None = None
    unet: str | None = None
    vae: str | None = None
    tiny_vae: str | None = None
    safety_checker: str | None = None
    lora: LoraSpec | None = None
    loras: dict[str, StyleLora] = {}
    classes: str | None = None
    schedulers: dict[str, SchedulerSpec] = Field(min_length=1)
    default_scheduler: str
    num_inference_steps: StepRange
    guidance: Literal["classifier-free", "embedded", "none"] = "classifier-free"
    guidance_scale: Range
    sizes: list[Size] = Field(min_length=1)
    warm_sizes: list[Size] = Field(min_length=1)
    max_batch_size: int = Field(default=8, ge=1)
    max_num_images: int = Field(default=4, ge=1)
    max_prompt_chars: int = Field(default=2000, ge=1)
    check_prompts: bool = True
    example_prompts: list[str] = []
    deprecated: date | None = None
    sunset: date | None = None
    _class_names: ClassNames | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.default_scheduler not in self.schedulers:
            raise ValueError(f"default_scheduler {self.default_scheduler!r} is none of {', '.join(self.schedulers)}")
        if missing := [size for size in self.warm_sizes if size not in self.sizes]:
            raise ValueError(f"warm_sizes {missing} are not in sizes")
        self._check_sizes()
        if self.warm_sizes[0] != self.sizes[0]:
            raise ValueError(f"warm_sizes must begin with the default size {self.sizes[0]}, got {self.warm_sizes[0]}")
        if self.guidance == "none" and self.guidance_scale.max > 1:
            raise ValueError(
                f"guidance_scale: guidance is none, so max can be at most 1, got {self.guidance_scale.max}"
            )
        if self.is_single_file != (self.config is not None):
            raise ValueError(f"config: a single file needs it and nothing else may have it; source is {self.source!r}")
        if (self.family == "consistency") != (self.classes is not None):
            raise ValueError(f"classes: the consistency family needs it and no other has it; family is {self.family}")
        if self.family == "consistency":
            self._check_consistency()
        self._read_classes()
        num_rows = self.num_rows(self.max_num_images, self.guidance_scale.max)
        if num_rows > self.max_batch_size:
            raise ValueError(
                f"max_num_images {self.max_num_images} with guidance needs {num_rows} rows, "
                f"max_batch_size is {self.max_batch_size}"
            )
        return self

    def _check_sizes(self) -> None:
        """Latents are an eighth of the picture; the consistency family draws pixels."""
        unit = 1 if self.family == "consistency" else LATENT_UNIT
        if wrong := [size for size in self.sizes if any(side < unit or side % unit for side in size)]:
            raise ValueError(f"sizes: positive multiples of {unit} are needed, got {list(wrong[0])}")

    def _check_consistency(self) -> None:
        """It draws pixels from class numbers: there is no decoder, no text encoder and nothing to guide."""
        if self.guidance != "none":
            raise ValueError(f"guidance: the consistency family has none, got {self.guidance}")
        if unused := [key for key in ("vae", "tiny_vae", "lora") if getattr(self, key) is not None]:
            raise ValueError(f"{unused[0]}: the consistency family has no use for it")

    def _read_classes(self) -> None:
        self._class_names = None if self.classes is None else load_classes(self.classes)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Where `update` names other classes they are read. Raises ClassFileError."""
        copy = super().model_copy(update=update, deep=deep)
        if update and "classes" in update:
            copy._read_classes()
        return copy

    @property
    def class_names(self) -> ClassNames | None:
        """What prompts may name, for a class-conditional model: as its file was when the entry was read."""
        return self._class_names

    @property
    def default_size(self) -> Size:
        return self.sizes[0]

    @property
    def is_single_file(self) -> bool:
        return self.source.endswith(".safetensors")

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether classifier-free guidance runs, which a scale up to 1 turns off."""
        return self.guidance == "classifier-free" and guidance_scale > 1

    @property
    def guidance_embedded(self) -> bool:
        return self.guidance == "embedded"

    def num_rows(self, num_images: int, guidance_scale: float) -> int:
        """How many rows of a batch a request takes: guidance doubles them."""
        return num_images * (2 if self.is_guided(guidance_scale) else 1)

    @property
    def fingerprint(self) -> str:
        """Another one as soon as anything in the entry, in its LoRAs' entries or among its classes is another."""
        classes = "" if self.class_names is None else self.class_names.fingerprint
        return hashlib.sha256(f"{self.model_dump_json()} {classes}".encode()).hexdigest()

    @property
    def public_revision(self) -> str:
        """What responses call `model_revision`."""
        return self.revision or "unpinned"
