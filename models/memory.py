"""What a model needs of a device's memory, from its files alone: no torch, and nothing is loaded."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.catalog import ModelSpec
from models.hub.lockfile import LOCK_FILE
from models.sources import SourceError, locate
from models.weights import changed_networks, find_weights

GIB = 2**30
WORKING_SHARE = 0.5  # of the weights' bytes: what the largest batch needs beside them, where the entry doesn't say
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
LEFT_OUT = ("safety_checker", "image_encoder")  # which no pipeline here loads from its own folder
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}  # safetensors' names


@dataclass(frozen=True, slots=True)
class Network:
    """The weight files of one network and the dtype that they are loaded in: what two models can share."""

    files: frozenset[Path]
    dtype: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes: `weights` of its own, `shared` with models that are there already, `working` for the largest batch.

    `networks` are those that others may share from now on.
    """

    weights: int
    shared: int
    working: int
    networks: frozenset[Network]

    @property
    def needed(self) -> int:
        return self.weights + self.working


def estimate(
    spec: ModelSpec, dtype: str, loaded: Collection[Network] = (), *, lock_file: Path = LOCK_FILE
) -> Estimate | None:
    """What `spec` takes in `dtype` beside the networks that are `loaded`. None: its files aren't on this machine and
    its entry doesn't say."""
    try:
        sizes = {Network(frozenset(files), dtype): own for files, own in _networks_of(spec, lock_file)}
    except SourceError:
        sizes = {}
    if not sizes and spec.memory_gib is None:
        return None
    weights = {network: sum(weight_bytes(file, dtype) for file in network.files) for network in sizes}
    shareable = {network for network, is_own in sizes.items() if not is_own}
    shared = sum(weights[network] for network in shareable.intersection(loaded))
    total = sum(weights.values())
    working = _working_bytes(spec, dtype, total)
    if spec.loras:  # the copy of what they change: at most the largest network again, which is the UNet
        working += max(weights.values(), default=0) + _lora_bytes(spec, lock_file)
    return Estimate(total - shared, shared, working, frozenset(shareable))


def _lora_bytes(spec: ModelSpec, lock_file: Path) -> int:
    """Of the style LoRAs' files that are here: as many as may be resident, they stay beside the weights."""
    num_bytes = 0
    for name in spec.loras:
        with contextlib.suppress(SourceError):
            num_bytes += locate(spec, f"loras.{name}", lock_file=lock_file, only_look=True).path.stat().st_size
    return num_bytes


def _working_bytes(spec: ModelSpec, dtype: str, weights: int) -> int:
    if spec.memory_gib is None:
        return round(WORKING_SHARE * weights)
    scale = DTYPE_BYTES[dtype] / DTYPE_BYTES[spec.dtype]
    return max(0, round(spec.memory_gib * GIB * scale) - weights)


def _networks_of(spec: ModelSpec, lock_file: Path) -> Iterator[tuple[list[Path], bool]]:
    """The weight files of each network that stays in memory, links followed, and whether it is the model's own: what a
    fused LoRA changes is, and what a single file holds. Raises SourceError."""
    changed = _changed_for_good(spec, lock_file)
    source = locate(spec, "source", lock_file=lock_file, only_look=True).path
    if source.is_file():
        yield [source.resolve()], True
    else:
        for name in _component_names(source):
            if getattr(spec, name, None) is None:
                yield _files(source / name, spec), name in changed
    for part in ("unet", "vae", "tiny_vae", "safety_checker"):
        if getattr(spec, part) is not None:
            folder = locate(spec, part, lock_file=lock_file, only_look=True).path
            yield _files(folder / part if part == "safety_checker" else folder, spec), part in changed


def _files(folder: Path, spec: ModelSpec) -> list[Path]:
    return [file.resolve() for file in find_weights(folder, spec.variant)]


def _changed_for_good(spec: ModelSpec, lock_file: Path) -> Collection[str]:
    if spec.lora is None:
        return ()
    try:
        keys = _read_header(locate(spec, "lora", lock_file=lock_file, only_look=True).path)
    except (OSError, ValueError):
        keys = {}
    return changed_networks(keys)


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


def _component_names(folder: Path) -> list[str]:
    """The parts of a pipeline's folder; those without weights have no weight files."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return [name for name in index if name not in LEFT_OUT and (folder / name).is_dir()]
    except (OSError, ValueError):
        return []
