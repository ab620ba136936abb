"""From a catalog entry to a model in memory: networks, LoRA fuse, decoders, safety checker.

Safetensors only, and no code from model folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open

from models.catalog import ModelSpec
from models.compiling.compiler import Compiler
from models.families.consistency import ConsistencyModel
from models.families.latent_diffusion import LatentDiffusion
from models.families.sd import StableDiffusion
from models.families.sdxl import StableDiffusionXL
from models.hub.lockfile import LOCK_FILE
from models.hub.needs import WEIGHTLESS
from models.lora_files import LoraReader
from models.loras import MAX_RESIDENT, StyleLoras
from models.networks import LoadError, Networks, check_weights, explained, settle
from models.pipeline import FewStepPipeline
from models.rows import keep_kernels
from models.sources import Place, SourceError, locate
from models.weights import LORA_NETWORKS, changed_networks

__all__ = ["FAMILIES", "LoadError", "default_device", "default_dtype", "load_diffusers", "load_pipeline", "settle"]


@dataclass(frozen=True, slots=True)
class Family:
    """diffusers' pipeline of a family, the networks that it is made of, what it must be told to load, and the class
    that the engine sees."""

    pipeline_name: str
    networks: frozenset[str]
    arguments: dict[str, Any]
    kind: type[LatentDiffusion] | type[ConsistencyModel]

    @property
    def pipeline_class(self) -> Any:
        """Looked up late: importing it takes time, and transformers prints hints meanwhile."""
        return getattr(diffusers, self.pipeline_name)


EXTRAS = frozenset({"safety_checker", "image_encoder"})  # which a folder may have and a pipeline can do without

FAMILIES = {
    "sd": Family(
        "StableDiffusionPipeline",
        frozenset({"unet", "vae", "text_encoder"}),
        {"safety_checker": None, "requires_safety_checker": False, "image_encoder": None},
        StableDiffusion,
    ),
    "sdxl": Family(
        "StableDiffusionXLPipeline",
        frozenset({"unet", "vae", "text_encoder", "text_encoder_2"}),
        {"add_watermarker": False, "image_encoder": None},
        StableDiffusionXL,
    ),
    "consistency": Family("ConsistencyModelPipeline", frozenset({"unet"}), {}, ConsistencyModel),
}


def load_pipeline(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    cuda_graphs: bool = False,
    max_loras: int = MAX_RESIDENT,
    networks: Networks | None = None,
    lock_file: Path = LOCK_FILE,
    compiler: Compiler | None = None,
) -> FewStepPipeline:
    """The model of a catalog entry, ready to compute on `device` in `dtype`. Models that are given the same `networks`
    share what they have in common; `lock_file` says which commits of the Hub's repositories. `max_loras` of its style
    LoRAs stay in memory. With a `compiler` its UNet is compiled. Raises LoadError."""
    keep_kernels()
    return _Loader(spec, device, dtype, networks or Networks(), lock_file).pipeline(cuda_graphs, max_loras, compiler)


def load_diffusers(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' own pipeline for the entry, LoRA fused, default scheduler set: the engine's parts and its oracle."""
    pipe = _Loader(spec, device, dtype, Networks(), LOCK_FILE).pipe()
    default = spec.schedulers[spec.default_scheduler]
    pipe.scheduler = getattr(diffusers, default.class_name).from_config(pipe.scheduler.config, **default.config)
    return pipe


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device, spec: ModelSpec | None = None) -> torch.dtype:
    """What the entry says on CUDA, fp16 without one. On a CPU bf16 where the processor computes in it, else fp32:
    `benchmarks/engine.py` shows why."""
    if device.type == "cuda":
        return torch.float16 if spec is None else getattr(torch, spec.dtype)
    abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch 2.11 lacks it
    has_bf16 = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32


class _Loader:
    """Loads one entry. Whatever goes wrong is a LoadError that begins with the entry's name."""

    def __init__(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, networks: Networks, lock_file: Path
    ) -> None:
        self._spec, self._device, self._dtype = spec, device, dtype
        self._networks = networks
        self._lock_file = lock_file
        self._family = FAMILIES[spec.family]

    def pipeline(self, cuda_graphs: bool, max_loras: int, compiler: Compiler | None) -> FewStepPipeline:
        with self._told():
            return self._build(self._load_pipe(), cuda_graphs, max_loras, compiler)

    def _build(self, pipe: Any, cuda_graphs: bool, max_loras: int, compiler: Compiler | None) -> FewStepPipeline:
        with explained(f"can't build its {self._family.kind.__name__}"):
            return self._family.kind(
                self._spec,
                self._device,
                self._dtype,
                pipe=pipe,
                tiny_vae=self._load_tiny_vae(),
                safety=self._load_safety(),
                scheduler_config=dict(pipe.scheduler.config),
                revision=self._source.revision or self._spec.public_revision,
                cuda_graphs=cuda_graphs,
                compiler=compiler,
                loras=self._style_loras(pipe, max_loras),
            )

    def pipe(self) -> Any:
        """diffusers' pipeline, its LoRA fused."""
        with self._told():
            return self._load_pipe()

    @contextmanager
    def _told(self) -> Iterator[None]:
        name = self._spec.name
        try:
            yield
        except SourceError as error:
            raise LoadError(str(error)) from error
        except LoadError as error:
            raise LoadError(f"{name}: {error}") from error
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise LoadError(f"{name}: {self._device} has too little memory for it") from error

    def _load_pipe(self) -> Any:
        path = self._source.path
        replaced = {part: self._load_replacement(part) for part in ("unet", "vae") if getattr(self._spec, part)}
        pipe = self._from_file(path, replaced) if path.is_file() else self._from_folder(path, replaced)
        self._check_guidance(pipe.unet)
        self._check_classes(pipe.unet)
        self._fuse_lora(pipe)
        pipe.set_progress_bar_config(disable=True)
        return settle(pipe, self._device)

    def _from_folder(self, folder: Path, replaced: Mapping[str, Any]) -> Any:
        """The networks one by one, since other models may have them already; the rest by diffusers."""
        networks = {
            name: self._load_network(class_name, folder / name, is_shared=name not in self._own_networks)
            for name, class_name in self._read_networks(folder).items()
            if name not in replaced
        }
        pipeline_class = self._family.pipeline_class
        with explained(f"can't load {pipeline_class.__name__} from {folder}"):
            return pipeline_class.from_pretrained(
                folder, local_files_only=True, **self._family.arguments, **networks, **replaced
            )

    def _from_file(self, path: Path, replaced: Mapping[str, Any]) -> Any:
        """All networks of one file in its authors' own layout, which diffusers takes apart."""
        check_weights(path)
        config = self._locate("config").path
        self._read_networks(config)
        pipeline_class = self._family.pipeline_class
        with explained(f"can't load {pipeline_class.__name__} from {path} by the configs of {config}"):
            return pipeline_class.from_single_file(
                str(path),
                config=str(config),
                dtype=self._dtype,
                local_files_only=True,
                **self._family.arguments,
                **replaced,
            )

    def _read_networks(self, folder: Path) -> dict[str, str]:
        """The class of each network of a pipeline's folder, which must be those of the family."""
        class_names = read_class_names(folder)
        names, expected = set(class_names) - EXTRAS, self._family.networks
        if names != expected:
            there, needed = (", ".join(sorted(those)) or "no networks" for those in (names, expected))
            raise LoadError(f"{folder} has {there}; the family {self._spec.family} is made of {needed}")
        return {name: class_names[name] for name in names}

    def _load_replacement(self, part: str) -> Any:
        """A network that isn't the source's own."""
        folder = self._locate(part).path
        return self._load_network(_read_class_name(folder), folder, is_shared=part not in self._own_networks)

    def _load_tiny_vae(self) -> Any | None:
        if self._spec.tiny_vae is None:
            return None
        return self._load_network("AutoencoderTiny", self._locate("tiny_vae").path)

    def _load_network(self, class_name: str, folder: Path, *, is_shared: bool = True) -> Any:
        return self._networks.load(
            class_name, folder, self._device, self._dtype, variant=self._spec.variant, is_shared=is_shared
        )

    def _load_safety(self) -> tuple[Any, Any] | None:
        """The checker and its feature extractor."""
        if self._spec.safety_checker is None:
            return None
        from transformers import CLIPImageProcessor

        folder = self._locate("safety_checker").path
        checker = self._load_network("StableDiffusionSafetyChecker", folder / "safety_checker")
        with explained(f"can't load CLIPImageProcessor from {folder}"):
            extractor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True)
        return checker, extractor

    def _check_guidance(self, unet: Any) -> None:
        width = unet.config.get("time_cond_proj_dim")
        if (width is not None) != self._spec.guidance_embedded:
            raise LoadError(f"guidance is {self._spec.guidance!r}, but time_cond_proj_dim of the UNet is {width}")

    def _check_classes(self, unet: Any) -> None:
        names = self._spec.class_names
        if names is not None and len(names) != unet.config.num_class_embeds:
            raise LoadError(
                f"classes names {len(names)}, but num_class_embeds of the UNet is {unet.config.num_class_embeds}"
            )

    def _fuse_lora(self, pipe: Any) -> None:
        if self._lora is None or self._spec.lora is None:
            return
        with explained(f"can't fuse the LoRA {self._lora}"):
            self._lora_reader(pipe).read_file(self._lora)  # diffusers only warns of layers that the networks lack
            pipe.load_lora_weights(self._lora.parent, weight_name=self._lora.name, use_safetensors=True)
            pipe.fuse_lora(lora_scale=self._spec.lora.scale)
            pipe.unload_lora_weights()

    def _style_loras(self, pipe: Any, max_resident: int) -> StyleLoras:
        """What requests may ask for. Nothing is read yet."""
        networks, reader = _lora_networks(pipe), self._lora_reader(pipe)
        return StyleLoras(self._spec.name, self._spec.loras, self._device, networks, reader, max_resident)

    def _lora_reader(self, pipe: Any) -> LoraReader:
        return LoraReader(self._spec, type(pipe), _lora_networks(pipe), self._lock_file)

    @cached_property
    def _own_networks(self) -> frozenset[str]:
        """What the fused LoRA changes for good: other models must not see it."""
        if self._lora is None:
            return frozenset()
        check_weights(self._lora)
        with safe_open(self._lora, framework="pt") as file:
            return frozenset(changed_networks(file.keys()))

    @cached_property
    def _lora(self) -> Path | None:
        return None if self._spec.lora is None else self._locate("lora").path

    @cached_property
    def _source(self) -> Place:
        return self._locate("source")

    def _locate(self, part: str) -> Place:
        return locate(self._spec, part, lock_file=self._lock_file)


def _lora_networks(pipe: Any) -> dict[str, Any]:
    return {name: pipe.components[name] for name in LORA_NETWORKS if pipe.components.get(name) is not None}


def read_class_names(folder: Path) -> dict[str, str]:
    """What a pipeline's folder is made of: the class of each network that it has."""
    index = _read_json(folder / "model_index.json")
    parts = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {
        name: str(class_name)
        for name, (_, class_name) in parts.items()
        if class_name is not None and not str(class_name).endswith(WEIGHTLESS)
    }


def _read_class_name(folder: Path) -> str:
    return str(_read_json(folder / "config.json").get("_class_name"))


def _read_json(path: Path) -> dict[str, Any]:
    with explained(f"can't read {path}"):
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
