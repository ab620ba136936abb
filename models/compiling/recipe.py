"""What a compiled network is made from, and when an older one will do."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from torch import Tensor, nn

FORMAT = 1  # raise it when packages are made in another way or `make` of a blueprint computes something else
NUM_DIGITS = 20
MAX_ROWS = 63  # from 64 rows on diffusers' upsampling takes another way

Run = Callable[..., Tensor]  # takes tensors with rows first
Sizes = tuple[tuple[tuple[int, ...], str], ...]  # of each input: its shape without the rows, and its dtype


@dataclass(frozen=True, slots=True)
class Blueprint:
    """How `make(network, *arguments)` gives what shall be compiled. `make` is a function of a module, so that another
    process finds it by its name."""

    make: Callable[..., Run]
    network: Any
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that the process which compiles is told, and all that a package in the cache must agree with."""

    make: str
    arguments: tuple[Any, ...]
    class_name: str
    config: str
    dtype: str
    weights: str
    inputs: Sizes
    device: str
    machine: str
    own_format: int = FORMAT
    torch_version: str = torch.__version__
    diffusers_version: str = diffusers.__version__

    @classmethod
    def of(cls, blueprint: Blueprint, inputs: Sizes, device: torch.device) -> Self:
        network = blueprint.network
        return cls(
            make=f"{blueprint.make.__module__}:{blueprint.make.__qualname__}",
            arguments=blueprint.arguments,
            class_name=type(network).__name__,
            config=_config_of(network),
            dtype=str(network.dtype).removeprefix("torch."),
            weights=fingerprint(network),
            inputs=inputs,
            device=str(device),
            machine=describe(device),
        )

    @property
    def name(self) -> str:
        """Of its file: something to read, and a digest of everything but the device's number: GPUs of a kind share."""
        shape, dtype = self.inputs[0]
        values = asdict(self) | {"device": torch.device(self.device).type}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:NUM_DIGITS]
        return f"{self.class_name}-{'x'.join(map(str, shape))}-{dtype}-{digest}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        inputs = tuple((tuple(shape), dtype) for shape, dtype in values.pop("inputs"))
        return cls(inputs=inputs, arguments=_as_tuples(values.pop("arguments")), **values)


def _config_of(network: Any) -> str:
    """Without what says where it came from."""
    values = json.loads(network.to_json_string())
    return json.dumps({name: value for name, value in values.items() if not name.startswith("_")}, sort_keys=True)


def sizes_of(inputs: tuple[Tensor, ...]) -> Sizes:
    return tuple((tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch.")) for tensor in inputs)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def fingerprint(network: nn.Module) -> str:
    """Of its weights' names, shapes, formats and layouts, all of which a package takes for granted."""
    lines = [f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}" for name, tensor in _sorted(network)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:NUM_DIGITS]


def _sorted(network: nn.Module) -> list[tuple[str, Tensor]]:
    return sorted(weights_of(network).items())


def describe(device: torch.device) -> str:
    """What machine code depends on: a package runs on no processor with other abilities, and on no other GPU."""
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_abilities()}"
    if device.type != "cuda":
        return processor
    return f"{processor} {torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"


def _abilities() -> str:
    """The processor's instruction sets, as Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(flags.encode()).hexdigest()[:NUM_DIGITS]


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
