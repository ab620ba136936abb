"""What style LoRAs cost: merged into the weights when the wish changes, or as adapters that stay beside the weights.

    python -m benchmarks.loras                              # about two minutes on a CPU
    python -m benchmarks.loras --networks full --device cuda --dtype float16

A network runs as the service runs it: recorded on a CPU, as a graph on a GPU. A recording holds the strengths of
adapters, so that another wish needs another recording; merged weights change under the recording. Each figure is the
fastest of several tries: what other work on the machine adds isn't the network's.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.shared.device import time_ms
from benchmarks.shared.diffusers_loop import hush_libraries, parse_dtype
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.report import print_table, write_report
from benchmarks.shared.unets import NAMES, Subject, make_subject
from models.catalog import StyleLora, get_spec, load_catalog
from models.families.latent_diffusion import unet_network
from models.graphs import Graphed
from models.loading import default_device
from models.lora_files import LoraReader
from models.loras import StyleLoras
from models.networks import settle
from models.tracing import Traced

TOUCHED = ("to_q", "to_k", "to_v", "to_out.0", "proj", "ff.net.2")
NUM_LORAS = 2


@dataclass(frozen=True)
class StepRow:
    """One forward pass, recorded. `adapters` are those that stay beside the weights."""

    network: str
    rows: int
    plain_ms: float
    merged_ms: float
    one_adapter_ms: float
    two_adapters_ms: float


@dataclass(frozen=True)
class SwitchRow:
    """From one LoRA to another, from nothing to two, and back to nothing. `adapters_ms` is the next wish's first pass
    beyond a usual one: choosing adapters and recording. `read_ms` is reading a file, which happens on another thread,
    and `first_ms` the first merge of a LoRA on top of a usual one: copying the layers that nothing touched before."""

    network: str
    parameters_m: float
    touched_m: float
    merge_ms: float
    merge_two_ms: float
    restore_ms: float
    adapters_ms: float
    read_ms: float
    first_ms: float


def main() -> None:
    options = parse_options()
    hush_libraries()
    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are meant
    device, dtype = torch.device(options.device), parse_dtype(options.dtype)
    steps: list[StepRow] = []
    switches: list[SwitchRow] = []
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            bench = Bench(make_subject(name, device, dtype), Path(folder), options.rank)
            switches.append(bench.measure_switches(options.rounds))
            print_table(switches[-1:])
            steps += [bench.measure_steps(rows, options.rounds) for rows in options.rows]
            print_table(steps[-len(options.rows) :])
    write_report(options.json, vars(options), {"steps": steps, "switches": switches})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=["mini", "mid"])
    parser.add_argument("--device", default=str(default_device()))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-loras.json")
    return parser.parse_args()


class Bench:
    """One UNet, two LoRAs of it as files, and copies of it with one and with both as adapters."""

    def __init__(self, subject: Subject, folder: Path, rank: int) -> None:
        self._subject, self._device = subject, subject.unet.device
        self._paths = [write_lora(subject.unet, folder / f"{index}.safetensors", rank) for index in range(NUM_LORAS)]
        entries = {path.stem: make_entry(path) for path in self._paths}
        networks: dict[str, nn.Module] = {"unet": subject.unet}
        spec = get_spec(load_catalog(), "mini-lcm")
        self._reader = LoraReader(spec, StableDiffusionXLPipeline, networks)
        self._loras = StyleLoras(subject.name, entries, self._device, networks, self._reader)
        self._entries = list(entries.values())
        self._adapted = [self._with_adapters(count + 1) for count in range(NUM_LORAS)]
        self._recorded = [self._record(unet) for unet in (subject.unet, *self._adapted)]

    def measure_steps(self, num_rows: int, num_rounds: int) -> StepRow:
        inputs = self._subject.make_inputs(num_rows)
        networks = self._recorded
        for network in networks:
            for _ in range(3):
                network(*inputs)
        times: list[list[float]] = [[] for _ in range(4)]
        for _ in range(num_rounds):
            self._merge()
            times[0].append(self._time(lambda: networks[0](*inputs)))
            self._merge("0", "1")
            times[1].append(self._time(lambda: networks[0](*inputs)))
            times[2].append(self._time(lambda: networks[1](*inputs)))
            times[3].append(self._time(lambda: networks[2](*inputs)))
        return StepRow(self._subject.name, num_rows, *map(min, times))

    def measure_switches(self, num_rounds: int) -> SwitchRow:
        read_ms = self._time(lambda: self._reader.read(self._entries[0]))
        self._loras.fetch([("0", 1.0), ("1", 1.0)])[1].reading.result()
        first_ms = self._time(lambda: self._merge("0"))
        rounds = [self._measure_merges() for _ in range(num_rounds)]
        merge_ms, merge_two_ms, restore_ms = map(min, zip(*rounds, strict=True))
        adapters_ms = min(self._measure_adapters(1 + index / 10) for index in range(2))
        layers = self._loras.fetch([("0", 1.0)])[0].lora.networks["unet"].values()
        touched = sum(factors.up.shape[0] * factors.down.shape[1] for factors in layers)
        return SwitchRow(
            self._subject.name,
            self._subject.num_parameters / 1e6,
            touched / 1e6,
            merge_ms,
            merge_two_ms,
            restore_ms,
            adapters_ms,
            read_ms,
            max(0.0, first_ms - merge_ms),
        )

    def _measure_merges(self) -> tuple[float, float, float]:
        self._merge("0")
        merge_ms = self._time(lambda: self._merge("1"))
        self._merge()
        merge_two_ms = self._time(lambda: self._merge("0", "1"))
        return merge_ms, merge_two_ms, self._time(self._merge)

    def _measure_adapters(self, strength: float) -> float:
        """Another strength of an adapter that is there already."""
        unet = self._adapted[0]
        inputs = self._subject.make_inputs(1)

        def switch() -> None:
            unet.set_adapters(["0"], [strength])
            unet.requires_grad_(False)  # which choosing an adapter turns on
            network(*inputs)

        network = self._record(unet)
        first_ms = self._time(switch)
        network(*inputs)
        return max(0.0, first_ms - self._time(lambda: network(*inputs)))

    def _merge(self, *names: str) -> None:
        self._loras.use(self._loras.fetch((name, 1.0) for name in names))

    def _with_adapters(self, count: int) -> Any:
        unet = copy.deepcopy(self._subject.unet)
        with torch.inference_mode(False):
            for path in self._paths[:count]:
                unet.load_lora_adapter(load_file(path), prefix="unet", adapter_name=path.stem)
            unet.set_adapters([path.stem for path in self._paths[:count]], [1.0] * count)
        return settle(unet, self._device)

    def _time(self, work: Callable[[], Any]) -> float:
        return time_ms(work, self._device)

    def _record(self, unet: Any) -> Callable[..., Tensor]:
        network = unet_network(unet, self._subject.added_names)
        return Graphed(network) if self._device.type == "cuda" else Traced(network)


def write_lora(unet: nn.Module, path: Path, rank: int) -> Path:
    """Random factors of attention and feed-forward layers, as most LoRAs have them, in 16 bits."""
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if "transformer_blocks" in name and name.endswith(TOUCHED):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features).half() * 0.01
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank).half() * 0.01
    save_file(tensors, path)
    return path


def make_entry(path: Path) -> StyleLora:
    return StyleLora(
        name=path.stem,
        description="random",
        source=str(path),
        models=["mini-lcm"],
        license="none",
        weight_name=path.name,
    )


if __name__ == "__main__":
    main()
