"""From a catalog entry to a model in memory: weights, LoRA fuse, VAE choice, safety checker.

Safetensors only, and no code from model folders.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from models.catalog import LoraSpec, ModelSpec, resolve_source
from models.errors import LoadError
from models.families.latent_diffusion import LatentDiffusion
from models.families.sd import StableDiffusion
from models.families.sdxl import StableDiffusionXL
from models.loras import MAX_RESIDENT
from models.pipeline import FewStepPipeline
from models.rows import keep_kernels

logger = logging.getLogger(__name__)

__all__ = ["LoadError", "default_device", "default_dtype", "load_diffusers", "load_pipeline", "settle"]


@dataclass(frozen=True, slots=True)
class Family:
    """diffusers' pipeline of a family, what it must be told to load, and the class that the engine sees."""

    pipeline_name: str
    arguments: dict[str, Any]
    kind: type[LatentDiffusion]

    @property
    def pipeline_class(self) -> Any:
        """Looked up late: importing it takes time, and transformers prints hints meanwhile."""
        return getattr(diffusers, self.pipeline_name)


FAMILIES = {
    "sd": Family(
        "StableDiffusionPipeline", {"safety_checker": None, "requires_safety_checker": False}, StableDiffusion
    ),
    "sdxl": Family("StableDiffusionXLPipeline", {"add_watermarker": False}, StableDiffusionXL),
}


def load_pipeline(
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    *,
    cuda_graphs: bool = False,
    max_loras: int = MAX_RESIDENT,
) -> FewStepPipeline:
    """The model of a catalog entry, ready to compute on `device` in `dtype`. Raises LoadError.

    Of its style LoRAs `max_loras` stay in memory.
    """
    keep_kernels()
    pipe = _load_parts(spec, dtype)
    try:
        return FAMILIES[spec.family].kind(
            spec,
            device,
            dtype,
            pipe=settle(pipe, device),
            tiny_vae=_load_tiny_vae(spec, device, dtype),
            safety=_load_safety(spec, device, dtype),
            scheduler_config=dict(pipe.scheduler.config),
            cuda_graphs=cuda_graphs,
            max_loras=max_loras,
        )
    except torch.OutOfMemoryError as error:
        raise LoadError(f"{spec.name}: {device} has too little memory for it") from error


def load_diffusers(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' own pipeline for the entry, LoRA fused, default scheduler set: the engine's parts and its oracle."""
    pipe = _load_parts(spec, dtype)
    default = spec.schedulers[spec.default_scheduler]
    pipe.scheduler = getattr(diffusers, default.class_name).from_config(pipe.scheduler.config, **default.config)
    return settle(pipe, device)


def _load_parts(spec: ModelSpec, dtype: torch.dtype) -> Any:
    source = resolve_source(spec.source)
    _check_weights(spec, source)
    parts = {"vae": _load_vae(spec, dtype)} if spec.vae else {}
    family = FAMILIES[spec.family]
    pipe = _from_pretrained(family.pipeline_class, spec, source, dtype, **family.arguments, **parts)
    _check_guidance(spec, pipe.unet)
    if spec.lora is not None:
        _fuse_lora(pipe, spec, spec.lora)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_guidance(spec: ModelSpec, unet: Any) -> None:
    width = unet.config.time_cond_proj_dim
    if (width is not None) != spec.guidance_embedded:
        raise LoadError(f"{spec.name}: guidance is {spec.guidance!r}, but time_cond_proj_dim of the UNet is {width}")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """fp16 on CUDA. On a CPU bf16 where the processor computes in it, else fp32: `benchmarks/engine.py` shows why."""
    if device.type == "cuda":
        return torch.float16
    abilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch 2.11 lacks it
    has_bf16 = abilities.get("avx512_bf16") or abilities.get("amx_bf16")
    return torch.bfloat16 if has_bf16 else torch.float32


def _load_vae(spec: ModelSpec, dtype: torch.dtype) -> Any:
    assert spec.vae is not None
    source = resolve_source(spec.vae)
    _check_weights(spec, source)
    return _from_pretrained(diffusers.AutoencoderKL, spec, source, dtype)


def _load_tiny_vae(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Any | None:
    if spec.tiny_vae is None:
        return None
    source = resolve_source(spec.tiny_vae)
    _check_weights(spec, source)
    return settle(_from_pretrained(diffusers.AutoencoderTiny, spec, source, dtype), device)


def _load_safety(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """The checker and its feature extractor. Revision and variant are those of the model's own source alone."""
    if spec.safety_checker is None:
        return None
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker  # late, as pipelines
    from transformers import CLIPImageProcessor

    source = resolve_source(spec.safety_checker)
    own = spec if spec.safety_checker == spec.source else spec.model_copy(update={"revision": None, "variant": None})
    _check_weights(spec, f"{source}/safety_checker")
    checker, report = _from_pretrained(
        StableDiffusionSafetyChecker, own, source, dtype, subfolder="safety_checker", output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):  # which transformers fills with random numbers
        raise LoadError(f"{spec.name}: the safety checker of {source} lacks {len(missing)} weights: {missing[0]}, …")
    extractor = _load(CLIPImageProcessor, own, source, subfolder="feature_extractor")
    return settle(checker, device), extractor


def _from_pretrained(kind: Any, spec: ModelSpec, source: str, dtype: torch.dtype, **arguments: Any) -> Any:
    folder = Path(source, arguments.get("subfolder", ""))
    variant = spec.variant if not folder.is_dir() or _has_variant(folder, spec.variant) else None
    return _load(kind, spec, source, dtype=dtype, variant=variant, use_safetensors=True, **arguments)


def _load(kind: Any, spec: ModelSpec, source: str, **arguments: Any) -> Any:
    is_local = Path(source).is_dir()
    if Path(source).is_absolute() and not is_local:
        raise LoadError(f"{spec.name}: can't load {kind.__name__}: there is no folder {source}")
    revision = None if is_local else spec.revision
    try:
        return kind.from_pretrained(source, revision=revision, local_files_only=is_local, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise LoadError(f"{spec.name}: can't load {kind.__name__} from {source}: {_first_line(error)}") from error


def _has_variant(folder: Path, variant: str | None) -> bool:
    return variant is not None and any(folder.rglob(f"*.{variant}.safetensors"))


def _check_weights(spec: ModelSpec, source: str) -> None:
    """Opens each local weight file's header, so that a damaged one is named before any network is built."""
    for path in sorted(Path(source).rglob("*.safetensors")) if Path(source).is_dir() else ():
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{spec.name}: {path} is not a sound safetensors file: {_first_line(error)}") from error


def _fuse_lora(pipe: Any, spec: ModelSpec, lora: LoraSpec) -> None:
    source = resolve_source(lora.source)
    _check_weights(spec, source)
    try:
        pipe.load_lora_weights(source, weight_name=lora.weight_name, use_safetensors=True)
        pipe.fuse_lora(lora_scale=lora.scale)
        pipe.unload_lora_weights()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise LoadError(f"{spec.name}: can't fuse the LoRA {source}: {_first_line(error)}") from error


def settle(module: Any, device: torch.device) -> Any:
    """Moves a pipeline or network to its device in the memory layout that its convolutions are fastest in."""
    module = module.to(device)
    is_slow_layout = device.type == "cpu" and module.dtype == torch.bfloat16  # oneDNN reorders those weights each time
    memory_format = torch.contiguous_format if is_slow_layout else torch.channels_last
    parts = module.components.values() if isinstance(module, diffusers.DiffusionPipeline) else (module,)
    for part in parts:
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
            cast(Any, part).to(memory_format=memory_format)
    return module


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
