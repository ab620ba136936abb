"""The process that compiles one network: python -m models.compiling.build CACHE FOLDER < recipe.

It ends with whoever started it: its standard input, open for as long as that process lives, tells.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor, nn

from models.compiling.cache import SOURCE, PackageCache
from models.compiling.recipe import MAX_ROWS, Blueprint, Recipe, fingerprint, weights_of
from models.memory import GIB
from models.networks import CLASSES, settle

NUM_ROWS = 4  # of the example
FREE_FACTOR = 2  # of the weights' bytes, which must be free on a GPU
NICENESS = 19
CONFIG = {
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,  # else short weights would become numbers in the code
    "cpp.dynamic_threads": True,  # as many as the calling thread has, at each call
}


class Whole(nn.Module):
    """A network as a module, whose weights have the network's own names after "network."."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        self.network = blueprint.network
        self._function = blueprint.make(blueprint.network, *blueprint.arguments)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._function(*inputs)


def main() -> None:
    cache, work = PackageCache(Path(sys.argv[1])), Path(sys.argv[2])
    recipe = Recipe.from_json(sys.stdin.readline())
    end_with_parent()
    os.nice(NICENESS)
    build_library(cache.library, work)
    build_package(recipe, cache.path(recipe), work)


def end_with_parent() -> None:
    """The compilers that run for this process are in its group and end with it."""

    def wait_for_end() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait_for_end, daemon=True).start()


def build_library(path: Path, work: Path) -> None:
    """Small and quick, and so the first to find out that there is no compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    compiler, home = get_cpp_compiler(), Path(torch.__file__).parent
    if path.exists():
        return
    includes = [f"-I{home / folder}" for folder in ("include", "include/torch/csrc/api/include")]
    libraries = [f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    target = work / path.name
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", *includes, str(SOURCE), "-o", str(target), *libraries]
    subprocess.run([compiler, *options], check=True)
    target.replace(path)


def build_package(recipe: Recipe, path: Path, work: Path) -> None:
    device = torch.device(recipe.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    program = export(recipe, device)
    target = work / path.name
    torch._inductor.aoti_compile_and_package(program, package_path=str(target), inductor_configs=dict(CONFIG))
    target.replace(path)


def export(recipe: Recipe, device: torch.device) -> torch.export.ExportedProgram:
    """For any number of rows up to MAX_ROWS."""
    module, _, name = recipe.make.partition(":")
    blueprint = Blueprint(
        getattr(importlib.import_module(module), name), make_network(recipe, device), recipe.arguments
    )
    inputs = tuple(
        torch.ones(NUM_ROWS, *shape, dtype=getattr(torch, dtype), device=device) for shape, dtype in recipe.inputs
    )
    rows = torch.export.Dim("rows", min=1, max=MAX_ROWS)
    with torch.no_grad():
        return torch.export.export(Whole(blueprint), inputs, dynamic_shapes=(tuple({0: rows} for _ in inputs),))


def make_network(recipe: Recipe, device: torch.device) -> Any:
    """Of the same kind as the one that runs. Its weights are whatever the memory held: the package has none."""
    network_class = getattr(importlib.import_module(CLASSES[recipe.class_name]), recipe.class_name)
    with torch.device("meta"):
        network = network_class.from_config(json.loads(recipe.config)).to(getattr(torch, recipe.dtype))
    check_room(network, device)
    network = settle(network.to_empty(device=device), device)
    if fingerprint(network) != recipe.weights:
        raise ValueError(f"the {recipe.class_name} that runs has other weights than its config says")
    return network


def check_room(network: nn.Module, device: torch.device) -> None:
    """A GPU holds the weights a second time meanwhile, and the models that serve must not run out of memory by that."""
    if device.type != "cuda":
        return
    needed = FREE_FACTOR * sum(tensor.nbytes for tensor in weights_of(network).values())
    free, _ = torch.cuda.mem_get_info(device)
    if free < needed:
        raise MemoryError(f"compiling takes {needed / GIB:.1f} GiB of the GPU's memory, and {free / GIB:.1f} are free")


if __name__ == "__main__":
    main()
