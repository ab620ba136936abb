"""What a model needs of a device's memory, from its files alone: no torch, and nothing is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.catalog import ModelSpec, resolve_source

GIB = 2**30
WORKING_SHARE = 0.5  # of the weights' bytes: what the largest batch needs beside them, where the entry doesn't say
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}  # safetensors' names


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes: `weights` of its own, `shared` with models that are there already, `working` for the largest batch."""

    weights: int
    shared: int
    working: int
    files: frozenset[Path]

    @property
    def needed(self) -> int:
        return self.weights + self.working


def estimate(spec: ModelSpec, dtype: str, loaded: Collection[Path] = ()) -> Estimate | None:
    """What `spec` takes in `dtype` beside the models whose weight files are `loaded`. None: its files aren't here and
    its entry doesn't say."""
    found = weight_files(spec)
    if found is None and spec.memory_gib is None:
        return None
    sizes = {file: weight_bytes(file, dtype) for file in found or ()}
    shared = sum(size for file, size in sizes.items() if file in loaded)
    weights = sum(sizes.values())
    return Estimate(weights - shared, shared, _working_bytes(spec, dtype, weights), frozenset(sizes))


def _working_bytes(spec: ModelSpec, dtype: str, weights: int) -> int:
    if spec.memory_gib is None:
        return round(WORKING_SHARE * weights)
    scale = DTYPE_BYTES[dtype] / DTYPE_BYTES[spec.dtype]
    return max(0, round(spec.memory_gib * GIB * scale) - weights)


def weight_files(spec: ModelSpec) -> set[Path] | None:
    """The weight files that loading the entry reads and that stay in memory, links followed; None where the files of
    its source aren't on this machine. A fused LoRA isn't among them: it becomes part of the weights."""
    if (source := _find(spec.source, spec.revision)) is None:
        return None
    files = {source} if source.is_file() else set(_component_files(source, spec))
    for other, folder in (
        (spec.unet, "unet"),
        (spec.vae, "vae"),
        (spec.tiny_vae, ""),
        (spec.safety_checker, "safety_checker"),
    ):
        if other is not None and (found := _find(other)) is not None:
            files |= {found} if found.is_file() else set(_network_files(found, folder, spec.variant))
    return {file.resolve() for file in files}


def weight_bytes(file: Path, dtype: str) -> int:
    """Of its tensors once they are in memory, numbers with a point in `dtype`. A damaged file counts as it is: loading
    will name it."""
    try:
        header = _read_header(file)
        return sum(_tensor_bytes(tensor, dtype) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return file.stat().st_size if file.exists() else 0


def _read_header(file: Path) -> dict[str, Any]:
    """A safetensors file begins with the length of its header, which is JSON."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError("the header is longer than the file")
        header: dict[str, Any] = json.loads(stream.read(length))
        return header


def _tensor_bytes(tensor: Mapping[str, Any], dtype: str) -> int:
    if tensor["dtype"] in FLOATS:
        return math.prod(map(int, tensor["shape"])) * DTYPE_BYTES[dtype]
    start, end = tensor["data_offsets"]
    return int(end) - int(start)


def _component_files(folder: Path, spec: ModelSpec) -> Iterator[Path]:
    """Those of a diffusers folder but for what the entry takes from elsewhere or leaves out."""
    replaced = {name for name in ("unet", "vae") if getattr(spec, name) is not None}
    for name in _components(folder) - replaced - {"safety_checker"}:
        if (folder / name).is_dir():
            yield from _network_files(folder, name, spec.variant)


def _components(folder: Path) -> set[str]:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return {name for name, kind in index.items() if isinstance(kind, list) and kind[0] is not None}
    except (OSError, ValueError, AttributeError, IndexError):
        return set()


def _network_files(source: Path, folder: str, variant: str | None) -> Iterable[Path]:
    """Of the network in `folder` of a source, or at its top; those of the variant where there are any."""
    own = source / folder if (source / folder).is_dir() else source
    files = list(own.glob("*.safetensors"))
    of_variant = [file for file in files if variant is not None and f".{variant}" in file.name]
    return of_variant or [file for file in files if file.name.count(".") == 1] or files


def _find(source: str, revision: str | None = None) -> Path | None:
    """Where its files are on this machine."""
    path = Path(resolve_source(source))
    if path.exists():
        return path
    return None if path.is_absolute() else _find_download(source, revision)


def _find_download(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download  # late: importing it takes time
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
        return None
