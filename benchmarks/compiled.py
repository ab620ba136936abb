"""What compiling a UNet gives beside recording it (on a CPU) or capturing it as graphs (on a GPU), and what it takes.

    python -m benchmarks.compiled                              # some minutes on a CPU
    python -m benchmarks.compiled --networks full --device cuda --dtype float16

Both run as the service runs them, turn and turn about. Each figure is the fastest of several tries: what other work on
the machine adds isn't the network's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.device import time_ms
from benchmarks.shared.diffusers_loop import hush_libraries, parse_dtype
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.report import print_table, write_report
from benchmarks.shared.unets import NAMES, Subject, make_subject
from models.compiling.cache import PackageCache
from models.compiling.compiler import Compiler, Package
from models.compiling.packages import load
from models.compiling.recipe import Blueprint, Recipe, Run, sizes_of
from models.families.latent_diffusion import unet_network
from models.graphs import Graphed
from models.loading import default_device
from models.rows import SharedRows, keep_kernels
from models.tracing import Traced


@dataclass(frozen=True)
class PackageRow:
    """`side` is that of the latents. `compile_s` is at the lowest priority: what else runs on the machine goes first.
    `load_s` is finding and loading the package at a later start."""

    network: str
    side: int
    compile_s: float
    load_s: float
    package_mib: float


@dataclass(frozen=True)
class StepRow:
    """One forward pass. `largest_difference` of the two outputs, and the largest number in the usual one."""

    network: str
    rows: int
    usual_ms: float
    compiled_ms: float
    ratio: float
    largest_difference: float
    largest_output: float


def main() -> None:
    options = parse_options()
    hush_libraries()
    keep_kernels()
    device, dtype = torch.device(options.device), parse_dtype(options.dtype)
    packages: list[PackageRow] = []
    steps: list[StepRow] = []
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            bench = Bench(make_subject(name, device, dtype), Path(folder), options.threads)
            packages.append(bench.package_row)
            print_table(packages[-1:])
            steps += [bench.measure(rows, options.rounds) for rows in options.rows]
            print_table(steps[-len(options.rows) :])
    write_report(options.json, vars(options), {"packages": packages, "steps": steps})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=["mini"])
    parser.add_argument("--device", default=str(default_device()))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--threads", type=int, help="of a CPU; all cores unless given")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-compiled.json")
    return parser.parse_args()


class Bench:
    """One UNet in both forms. It is compiled here, at the priority that the service gives it."""

    def __init__(self, subject: Subject, folder: Path, num_threads: int | None) -> None:
        self._subject, self._device = subject, subject.unet.device
        self._rows = SharedRows(num_threads) if self._device.type == "cpu" else None
        plain = unet_network(subject.unet, subject.added_names)
        blueprint = Blueprint(unet_network, subject.unet, (subject.added_names,))
        recipe = Recipe.of(blueprint, sizes_of(subject.make_inputs(1)), self._device)
        compiled = self._compile(recipe, PackageCache(folder))
        self._usual = self._spread(plain if self._rows is None else Traced(plain))
        self._compiled = self._spread(compiled)

    def measure(self, num_rows: int, num_rounds: int) -> StepRow:
        inputs = self._subject.make_inputs(num_rows)
        if self._rows is not None:
            self._rows.expect(num_rows)
        usual, compiled = self._usual(*inputs), self._compiled(*inputs)
        forms = [partial(form, *inputs) for form in (self._usual, self._compiled)]
        times = [[time_ms(form, self._device) for form in forms] for _ in range(num_rounds)]
        usual_ms, compiled_ms = map(min, zip(*times, strict=True))
        difference, largest = (usual - compiled).abs().max(), usual.abs().max()
        ratio = compiled_ms / usual_ms
        return StepRow(self._subject.name, num_rows, usual_ms, compiled_ms, ratio, float(difference), float(largest))

    def _compile(self, recipe: Recipe, cache: PackageCache) -> Run:
        compiler = Compiler(cache)
        compiler.start()
        package = compiler.ask(recipe).result()
        compiler.stop()
        started_s = time.perf_counter()
        compiled = self._load(Compiler(cache).ask(recipe).result())
        load_s = time.perf_counter() - started_s
        assert package.seconds is not None, "a new folder has nothing"
        size_mib = package.path.stat().st_size / 2**20
        self.package_row = PackageRow(self._subject.name, self._subject.side, package.seconds, load_s, size_mib)
        return compiled

    def _load(self, package: Package) -> Run:
        num_threads = 1 if self._rows is None else self._rows.num_threads
        return load(package, self._subject.unet, self._device, num_threads)

    def _spread(self, network: Callable[..., Any]) -> Callable[..., Any]:
        return Graphed(network) if self._rows is None else self._rows.wrap(network)


if __name__ == "__main__":
    main()
