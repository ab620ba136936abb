"""From a package on disk to a network that computes with the weights of one that is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.compiling.compiler import CompileError, Package
from models.compiling.recipe import Run, weights_of

PREFIX = "network."  # of the weights' names in a package


def load(package: Package, network: nn.Module, device: torch.device, num_threads: int) -> Run:
    """`num_threads` may call it at the same time; on a GPU it is one.

    What changes in the network's weights changes this too. They stay in memory until the process ends. Raises
    CompileError, OSError or RuntimeError for a package that isn't of this network.
    """
    _load_library(package.library)
    is_gpu, index = device.type == "cuda", -1 if device.index is None else device.index
    compiled: Any = torch.classes.fewstep.Network(str(package.path), is_gpu, num_threads, index)
    compiled.use_weights(_choose(weights_of(network), compiled.weight_names()))

    def run(*inputs: Tensor) -> Tensor:
        output: Tensor = compiled.run([tensor.contiguous() for tensor in inputs])[0]
        return output

    return run


def _choose(weights: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """What the package asks for. It takes layouts for granted, which its recipe has compared."""
    if unknown := sorted(name for name in names if name.removeprefix(PREFIX) not in weights):
        raise CompileError(f"it has constants that are not weights: {unknown[0]}, …")
    return {name: weights[name.removeprefix(PREFIX)].detach() for name in names}


def _load_library(library: Path) -> None:
    """A class can be registered once in a process; files of the same name have the same content."""
    if library.name not in {Path(loaded).name for loaded in torch.classes.loaded_libraries}:
        torch.classes.load_library(str(library))
