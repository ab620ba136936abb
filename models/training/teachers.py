"""Teachers: frozen text-to-image models in Stable Diffusion's or SDXL's layout, part by part.

Distillation needs the text encoders and the VAE first and the UNet afterwards, so each part is loaded when it is asked
for, and leaves memory when nobody holds it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from transformers import CLIPTokenizer

from models.catalog import ModelSpec
from models.families import sd, sdxl
from models.families.latent_diffusion import padded_ids
from models.loading import EXTRAS, FAMILIES, read_class_names
from models.networks import Networks, explained, weight_files
from models.sources import local_path, locate
from models.training.diffusion import Diffusion
from models.training.errors import TeacherError
from models.training.fingerprints import file_fingerprints, fingerprint

Layout = Literal["sd", "sdxl"]
Size = tuple[int, int]  # width and height in pixels

NAMES: dict[Layout, str] = {"sd": "Stable Diffusion", "sdxl": "SDXL"}
ADDED: dict[Layout, str | None] = {"sd": None, "sdxl": "text_time"}  # addition_embed_type of the UNet
LATENT_CHANNELS = 4
FP16 = "fp16"
SINGLE_FILE = "is a single file: a teacher has to be a folder that diffusers wrote"
NETWORK_KEYS = ("source", "revision", "variant", "unet", "vae")  # of a catalog entry
OTHER_KEYS = ("tiny_vae", "license", "license_note", "license_url")


@dataclass(frozen=True)
class Conditions:
    """What a UNet is told about each row of a batch: the text encoders' `states` `"b t d"`, and in SDXL's layout their
    `pooled` embedding `"b p"` and `time_ids` `"b 6"`: original size, top left corner of the crop and target size, each
    height or top first (Podell et al., arXiv 2307.01952, section 2.2)."""

    states: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def to(self, device: torch.device) -> Conditions:
        return Conditions(*(None if part is None else part.to(device) for part in self._parts))  # type: ignore[arg-type]

    def with_time_ids(self, time_ids: Tensor | None) -> Conditions:
        return replace(self, time_ids=time_ids)

    def spread_over(self, rows: Conditions) -> Conditions:
        """One row of text for each of `rows`, whose pictures have the sizes that they have."""
        states, pooled = self.states.expand(len(rows), -1, -1), self.pooled
        return Conditions(states, None if pooled is None else pooled.expand(len(rows), -1), rows.time_ids)

    @classmethod
    def stack(cls, batches: Sequence[Conditions]) -> Conditions:
        """The rows of all batches, which are of one layout, in one."""
        columns = zip(*(batch._parts for batch in batches), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.states, self.pooled, self.time_ids


def call_unet(
    unet: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions, guidance: Tensor | None = None
) -> Tensor:
    """The network's output `"b c h w"` in fp32; `guidance` `"b d"` is the embedded scale that a full LCM reads."""
    is_xl = conditions.pooled is not None
    output: Tensor = unet(
        noisy,
        timesteps,
        encoder_hidden_states=conditions.states,
        timestep_cond=guidance,
        added_cond_kwargs={"text_embeds": conditions.pooled, "time_ids": conditions.time_ids} if is_xl else None,
        return_dict=False,
    )[0]
    return output.float()


@dataclass(frozen=True)
class Teacher:
    """Where the parts of a frozen model are. `name` is what messages call it, `networks` its networks' classes and
    folders by diffusers' names, `folder` where scheduler and tokenizers are, `entry` the keys of a catalog entry that
    names the same networks."""

    name: str
    layout: Layout
    folder: Path
    networks: Mapping[str, tuple[str, Path]]
    variant: str | None
    scheduler_config: Mapping[str, Any]
    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    entry: Mapping[str, Any] = field(default_factory=dict)

    def build_scheduler(self, kind: Any = DDIMScheduler, **changes: Any) -> Any:
        """A scheduler of the teacher's own schedule."""
        return kind.from_config(dict(self.scheduler_config), **changes)

    def build_diffusion(self, device: torch.device) -> Diffusion:
        return Diffusion(self.build_scheduler(), device)

    @property
    def latent_unit(self) -> int:
        """Pixels on a side that one latent stands for."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def default_size(self) -> Size:
        """What the UNet's config says."""
        side = self.unet_config["sample_size"]
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return width * self.latent_unit, height * self.latent_unit

    def load_unet(self, device: torch.device, dtype: torch.dtype) -> Any:
        """A UNet2DConditionModel of the caller's own, frozen, in the memory layout that trains fastest on the device.
        Raises LoadError."""
        unet = self.load("unet", device, dtype)
        return unet.to(memory_format=torch.contiguous_format) if device.type == "cpu" else unet

    def load_encoders(self, device: torch.device) -> Encoders:
        """In fp32: they are needed once. Raises LoadError."""
        return Encoders(self, device)

    def load(self, part: str, device: torch.device, dtype: torch.dtype) -> Any:
        """A network, frozen and of the caller's own. Raises LoadError."""
        class_name, folder = self.networks[part]
        return Networks().load(class_name, folder, device, dtype, variant=self._variant_of(folder), is_shared=False)

    def load_tokenizers(self) -> list[CLIPTokenizer]:
        with explained(f"can't load the tokenizers of {self.folder}"):
            return [
                CLIPTokenizer.from_pretrained(self.folder / name, local_files_only=True) for name in self.tokenizers
            ]

    @property
    def pipeline_class(self) -> Any:
        """diffusers'."""
        return FAMILIES[self.layout].pipeline_class

    def build_pipeline(self, unet: Any, scheduler: Any, dtype: torch.dtype) -> Any:
        """diffusers' pipeline of these and of the teacher's other parts, which are loaded for it, on the CPU."""
        parts = {name: self.load(name, torch.device("cpu"), dtype) for name in self.networks if name != "unet"}
        tokenizers = dict(zip(self.tokenizers, self.load_tokenizers(), strict=True))
        return self.pipeline_class(unet=unet, scheduler=scheduler, **parts, **tokenizers, **self.pipeline_arguments)

    @property
    def pipeline_arguments(self) -> dict[str, Any]:
        """What its class is told beside its parts."""
        if self.layout == "sd":
            return {**FAMILIES["sd"].arguments, "feature_extractor": None}
        return {**FAMILIES["sdxl"].arguments, "force_zeros_for_empty_prompt": self.has_zeros_for_none}

    @cached_property
    def has_zeros_for_none(self) -> bool:
        """Whether no caption is zeros, as in SDXL's layout unless the folder says else."""
        index = _read_json(self.folder / "model_index.json") if self.layout == "sdxl" else {}
        return self.layout == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True))

    @property
    def tokenizers(self) -> list[str]:
        """By diffusers' names, in the order of the text encoders."""
        return [name.replace("text_encoder", "tokenizer") for name in self.text_encoders]

    @property
    def text_encoders(self) -> list[str]:
        """By diffusers' names."""
        return sorted(name for name in self.networks if name.startswith("text_encoder"))

    def fingerprint_of(self, *parts: str) -> str:
        """Another one for networks with other weights."""
        files = [
            path
            for _, folder in (self.networks[part] for part in parts)
            for path in (folder / "config.json", *weight_files(folder, self._variant_of(folder)))
        ]
        return fingerprint(file_fingerprints(files))

    @property
    def serving_keys(self) -> dict[str, Any]:
        """The keys of a catalog entry that name these networks."""
        variants = {self._variant_of(folder) for _, folder in self.networks.values()}
        own = {key: self.entry[key] for key in NETWORK_KEYS if key in self.entry}
        return {"variant": FP16, **own} if FP16 in variants else own

    def _variant_of(self, folder: Path) -> str | None:
        """A folder of one's own may have weights in fp16 only; those in fp32 are preferred."""
        return self.variant or _only_variant(folder)


class Encoders:
    """A teacher's text encoders and VAE: from captions and pictures to what its UNet sees, in fp32 on `device`."""

    def __init__(self, teacher: Teacher, device: torch.device) -> None:
        self.teacher, self.device = teacher, device
        self.tokenizers = teacher.load_tokenizers()
        self._networks = [teacher.load(name, device, torch.float32) for name in teacher.text_encoders]

    @cached_property
    def vae(self) -> Any:
        return self.teacher.load("vae", self.device, torch.float32)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str | None]) -> Conditions:
        """One row per caption, without time ids. None is what stands for no caption: the empty one, or in SDXL's layout
        zeros where the folder says so, as in diffusers' pipelines."""
        ids = [padded_ids(tokenizer, [caption or "" for caption in captions]) for tokenizer in self.tokenizers]
        if self.teacher.layout == "sd":
            return Conditions(self._encode_one(ids[0]))
        states, pooled = sdxl.text_network(*self._networks)(*(tokens.input_ids.to(self.device) for tokens in ids))
        if self.teacher.has_zeros_for_none:
            for row in (number for number, caption in enumerate(captions) if caption is None):
                states[row], pooled[row] = 0, 0
        return Conditions(states, pooled)

    def _encode_one(self, tokens: Any) -> Tensor:
        (encoder,) = self._networks
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        return sd.text_network(encoder)(
            tokens.input_ids.to(self.device), None if mask is None else mask.to(self.device)
        )

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `"b 4 h w"` of the latents, scaled as the UNet sees them, of pictures
        `"b 3 height width"` in -1 to 1."""
        latents = self.vae.encode(pixels.to(self.device)).latent_dist
        factor = self.vae.config.scaling_factor
        return latents.mean * factor, latents.std * factor

    def plain_time_ids(self, latents: Tensor) -> Tensor | None:
        """Time ids `"b 6"` for latents `"b 4 h w"` of whole pictures; None in a layout that has none."""
        if self.teacher.layout == "sd":
            return None
        height, width = (side * self.teacher.latent_unit for side in latents.shape[-2:])
        return torch.tensor([[height, width, 0, 0, height, width]]).expand(len(latents), -1)


def open_teacher(name: str, catalog: Mapping[str, ModelSpec]) -> Teacher:
    """Of an entry of the catalog, without the LoRA that it fuses, or of a folder that diffusers wrote.

    Raises TeacherError, LoadError for files that can't be read, SourceError for files that aren't there.
    """
    if name in catalog:
        return _open_entry(catalog[name])
    folder = local_path(name)
    if folder is not None and folder.is_file():
        raise TeacherError(f"{name} {SINGLE_FILE}")
    if folder is None or not folder.is_dir():
        raise TeacherError(f"{name}: there is no such folder, and the catalog has only {', '.join(sorted(catalog))}")
    source = name if name.startswith("bundled:") else str(folder.resolve())
    return _open(name, folder, {}, {"source": source})


def _open_entry(spec: ModelSpec) -> Teacher:
    if spec.guidance != "classifier-free":
        raise TeacherError(
            f"{spec.name} is a few-step model itself (guidance is {spec.guidance!r}): "
            "a teacher has to have classifier-free guidance"
        )
    if spec.is_single_file:
        raise TeacherError(f"{spec.name} {SINGLE_FILE}")
    replaced = {part: locate(spec, part).path for part in ("unet", "vae") if getattr(spec, part)}
    entry = {key: value for key, value in spec.model_dump(include={*NETWORK_KEYS, *OTHER_KEYS}).items() if value}
    return _open(spec.name, locate(spec, "source").path, replaced, entry)


def _open(name: str, folder: Path, replaced: Mapping[str, Path], entry: Mapping[str, Any]) -> Teacher:
    class_names = {part: kind for part, kind in read_class_names(folder).items() if part not in EXTRAS}
    layout = _layout_of(name, folder, class_names)
    networks = {part: (kind, replaced.get(part, folder / part)) for part, kind in class_names.items()}
    teacher = Teacher(
        name=name,
        layout=layout,
        folder=folder,
        networks=networks,
        variant=entry.get("variant"),
        entry=entry,
        scheduler_config=_read_json(folder / "scheduler" / "scheduler_config.json"),
        unet_config=_read_json(networks["unet"][1] / "config.json"),
        vae_config=_read_json(networks["vae"][1] / "config.json"),
    )
    _check(teacher)
    return teacher


def _layout_of(name: str, folder: Path, class_names: Mapping[str, str]) -> Layout:
    for layout in NAMES:
        if set(class_names) == FAMILIES[layout].networks and class_names["unet"] == "UNet2DConditionModel":
            return layout
    parts = ", ".join(f"{part} ({kind})" for part, kind in sorted(class_names.items())) or "no networks"
    needed = "; ".join(f"{NAMES[layout]} is made of {', '.join(sorted(FAMILIES[layout].networks))}" for layout in NAMES)
    raise TeacherError(f"{name}: {folder} has {parts}; {needed}, with a UNet2DConditionModel")


def _only_variant(folder: Path) -> str | None:
    names = [path.name.removesuffix(".safetensors") for path in folder.glob("*.safetensors")]
    return FP16 if names and all(f".{FP16}" in name for name in names) else None


def _check(teacher: Teacher) -> None:
    """Raises TeacherError for a UNet or a schedule that these programs can't distil."""
    unet, name = teacher.unet_config, teacher.name
    if unet.get("in_channels") != LATENT_CHANNELS:
        channels = unet.get("in_channels")
        kind = " as for inpainting" if channels == 9 else ""
        raise TeacherError(f"{name}: its UNet takes {channels} channels{kind}; text to image takes {LATENT_CHANNELS}")
    if unet.get("time_cond_proj_dim") is not None:
        raise TeacherError(f"{name} is a few-step model itself: its UNet has time_cond_proj_dim, as full LCMs have")
    if unet.get("addition_embed_type") != ADDED[teacher.layout]:
        raise TeacherError(
            f"{name}: addition_embed_type of its UNet is {unet.get('addition_embed_type')!r}; "
            f"in the layout of {NAMES[teacher.layout]} it is {ADDED[teacher.layout]!r}"
        )
    if not {"beta_schedule", "trained_betas"} & set(teacher.scheduler_config):
        scheduler = teacher.scheduler_config.get("_class_name")
        raise TeacherError(f"{name}: its {scheduler} has no beta_schedule: only discrete schedules can be distilled")
    try:
        teacher.build_diffusion(torch.device("cpu"))
    except ValueError as error:
        raise TeacherError(f"{name}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    with explained(f"can't read {path}"):
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
