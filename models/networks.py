"""Networks from local files, each in memory once however many models use it."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from models.hub.errors import SourceError
from models.weights import SUFFIX, find_weights, has_variant

CLASSES = {  # the networks that models are made of, and who has them
    "UNet2DConditionModel": "diffusers",
    "UNet2DModel": "diffusers",
    "AutoencoderKL": "diffusers",
    "AutoencoderTiny": "diffusers",
    "CLIPTextModel": "transformers",
    "CLIPTextModelWithProjection": "transformers",
    "StableDiffusionSafetyChecker": "diffusers.pipelines.stable_diffusion.safety_checker",
}
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
NUM_HASH_DIGITS = 64  # of sha256, by which the Hub's cache names large files


class LoadError(Exception):
    """A model that can't be loaded: the message names the model, the source or file, and the reason."""


class Networks:
    """Loads each network once per device, dtype and content of its files, and forgets it when nobody holds it.

    One object for all models of a process; its calls come from one thread.
    """

    def __init__(self) -> None:
        self._loaded: WeakValueDictionary[tuple[object, ...], torch.nn.Module] = WeakValueDictionary()

    def load(
        self,
        class_name: str,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        *,
        variant: str | None = None,
        is_shared: bool = True,
    ) -> Any:
        """The network of a folder, settled on `device`; one of the caller's own where it isn't `is_shared`, as whoever
        changes its weights for good needs it. Raises LoadError."""
        files = weight_files(folder, variant)
        key = (class_name, str(device), dtype, _fingerprint(folder / "config.json"), *map(_fingerprint, files))
        network = self._loaded.get(key) if is_shared else None
        if network is None:
            check_weights(folder)
            network = settle(_load(class_name, folder, dtype, variant), device)
            if is_shared:
                self._loaded[key] = network
        return network


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The weight files of one network: those of the variant where there are any. Raises LoadError where there are none
    that may be read."""
    if chosen := find_weights(folder, variant):
        return chosen
    if pickles := [path for pattern in PICKLES for path in sorted(folder.glob(pattern))]:
        raise LoadError(f"{pickles[0]} is a pickle, which is never read: weights must be safetensors")
    if files := sorted(folder.glob(f"*{SUFFIX}")):
        raise LoadError(f"{folder} has weights of a variant only ({files[0].name}): say which by the key variant")
    raise LoadError(f"there are no weights in {folder}" if folder.is_dir() else f"there is no folder {folder}")


def check_weights(place: Path) -> None:
    """Opens each weight file's header, so that a damaged one is named before any network is built. Raises LoadError."""
    for path in [place] if place.is_file() else sorted(place.glob(f"*{SUFFIX}")):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{path} is not a sound safetensors file: {first_line(error)}") from error


def _load(class_name: str, folder: Path, dtype: torch.dtype, variant: str | None) -> torch.nn.Module:
    if class_name not in CLASSES:
        raise LoadError(f"{folder} has a {class_name}; known are {', '.join(CLASSES)}")
    with explained(f"can't load {class_name} from {folder}"):
        network_class = getattr(importlib.import_module(CLASSES[class_name]), class_name)
        network, report = network_class.from_pretrained(
            folder,
            dtype=dtype,
            variant=variant if has_variant(folder, variant) else None,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):  # which a library may fill with random numbers
        raise LoadError(f"the {class_name} of {folder} lacks {len(missing)} weights: {missing[0]}, …")
    return cast(torch.nn.Module, network)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns whatever the libraries raise into one line. What is explained already stays as it is, and memory that ran
    out is another story, told by whoever loads."""
    try:
        yield
    except (LoadError, SourceError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise LoadError(f"{what}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


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


def _fingerprint(path: Path) -> str:
    """Of a file's content. The Hub's cache names large files by it; a config is read; others go by place and time."""
    if not path.is_file():
        return ""
    real = path.resolve()
    if len(real.name) == NUM_HASH_DIGITS:
        return real.name
    if path.suffix == ".json":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    status = real.stat()
    return f"{real}:{status.st_size}:{status.st_mtime_ns}"
