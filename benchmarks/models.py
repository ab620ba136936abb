"""The models of the catalog at full size with random weights, each through the whole service.

    python -m benchmarks.models                             # on a GPU: about a minute a model
    python -m benchmarks.models --models sd-turbo sdxl-lcm
    python -m benchmarks.models --small                     # narrow twins, to try the program on a CPU

Each model is built as published (`architectures.py`), saved as a folder in half precision, with a LoRA where
its entry has one, and served by `fewstep serve` (gateway, Redis, worker) with the entry's own limits at its default
size. *Cold start* runs from the command to the first 200 of `/readyz`, warm-up of every batch size included. *Step* and
*decode* are what warm-up measured; the larger batch is the one up to which a batch pays. *P50* is of single pictures
over HTTP, JPEG, the entry's default steps, each prompt a new one. *Peak* is what the device's used memory grew by, the
CUDA context and all caches included; on a CPU it is the worker's resident memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from benchmarks.shared.architectures import ARCHITECTURES, Architecture, find_architecture, shrink
from benchmarks.shared.device import free_memory
from benchmarks.shared.diffusers_loop import hush_libraries
from benchmarks.shared.figures import BenchmarkError
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.prompts import endless_prompts
from benchmarks.shared.random_weights import build_parts
from benchmarks.shared.report import print_table, write_report
from benchmarks.shared.servers import Server, find_role, free_port, running
from models.catalog import LoraSpec, ModelSpec, get_spec, load_catalog
from models.loading import default_device

CLASS_NAMES = ("goldfish", "ostrich", "bald eagle", "tree frog")
LORA_RANK = 64
LORA_LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
SMALL_BATCH = 4
SAMPLE_EVERY_S = 0.2
ANSWER_WITHIN_S = 60


@dataclass(frozen=True)
class Row:
    model: str
    size: str
    weights_gib: float
    peak_gib: float
    cold_start_s: float
    step_ms: float
    useful_batch: int
    batch_step_ms: float
    decode_ms: float
    steps: int
    p50_ms: float


@dataclass(frozen=True)
class Skipped:
    model: str
    why: str


def main() -> None:
    options = parse_options()
    hush_libraries()
    started_s = time.perf_counter()
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for name in options.models:
        if time.perf_counter() - started_s > options.budget_s:
            skipped.append(Skipped(name, "no time left"))
            continue
        print(f"[{time.perf_counter() - started_s:4.0f} s] {name}", file=sys.stderr, flush=True)
        try:
            rows.append(measure(name, options))
        except (BenchmarkError, OSError, RuntimeError) as error:
            skipped.append(Skipped(name, str(error)[-600:].replace("|", "/").replace("\n", " ")))
        write_report(options.json, vars(options) | device_names(), {"models": rows, "skipped": skipped})
    for table in (rows, skipped):
        if table:
            print_table(table)


def parse_options() -> argparse.Namespace:
    names = [architecture.name for architecture in ARCHITECTURES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--small", action="store_true", help="narrow twins in small batches, to try the program")
    parser.add_argument("--pictures", type=int, default=30, help="over HTTP, for the P50")
    parser.add_argument("--cuda-graphs", action="store_true", help="as FEWSTEP_CUDA_GRAPHS=1")
    parser.add_argument("--budget-s", type=float, default=400.0, help="no further model is begun after this time")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-models.json")
    return parser.parse_args()


def device_names() -> dict[str, object]:
    device = default_device()
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}


def measure(name: str, options: argparse.Namespace) -> Row:
    with tempfile.TemporaryDirectory(prefix="fewstep-models-") as folder:
        weights_gib, spec = make_model(name, Path(folder), is_small=options.small)
        free_memory(default_device())
        with MemoryMeter() as memory, service(spec, Path(folder), options.cuda_graphs) as (server, ready_s):
            costs = read_costs(server, spec)
            p50_ms = statistics.median(draw(server, spec, number) for number in range(options.pictures))
        return Row(
            name, costs["size"], weights_gib, memory.peak_gib, ready_s, costs["step_ms"]["1"], costs["max_rows"],
            costs["step_ms"][str(costs["max_rows"])], costs["decode_ms"]["1"], spec.num_inference_steps.default, p50_ms,
        )  # fmt: skip


# The model


def make_model(name: str, folder: Path, *, is_small: bool) -> tuple[float, ModelSpec]:
    """Saves it under `folder`. GiB of its weights, and its catalog entry with these folders for sources."""
    architecture = find_architecture(name)
    if is_small:
        architecture = shrink(architecture)
    parts = build_parts(architecture, default_device(), torch.float16)
    parts.pipe.save_pretrained(folder / "model")
    if parts.tiny_vae is not None:
        parts.tiny_vae.save_pretrained(folder / "tiny")
    spec = local_spec(get_spec(load_catalog(), name), architecture, folder, is_small=is_small)
    if spec.lora is not None:
        save_lora(parts.pipe.unet, folder / "lora")
    return parts.num_bytes / 2**30, spec


def local_spec(spec: ModelSpec, architecture: Architecture, folder: Path, *, is_small: bool) -> ModelSpec:
    """Only the default size, since each size is warmed by the same program."""
    size = architecture.sizes[0] if is_small else spec.default_size
    own: dict[str, Any] = {
        "source": str(folder / "model"),
        "revision": None,
        "variant": None,
        "unet": None,
        "vae": None,
        "tiny_vae": str(folder / "tiny") if spec.tiny_vae else None,
        "lora": LoraSpec(source=str(folder / "lora")) if spec.lora else None,
        "sizes": [size],
        "warm_sizes": [size],
    }
    if is_small:
        own |= {"max_batch_size": SMALL_BATCH, "max_num_images": 1}
    return spec.model_copy(update=own)


def save_lora(unet: Any, folder: Path) -> None:
    """Over the layers of the LCM-LoRA, at its rank; its random weights change little."""
    names = {name for name, _ in unet.named_modules()}
    layers = [layer for layer in LORA_LAYERS if any(name.endswith(f".{layer}") for name in names)]
    unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=layers))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    unet.delete_adapters("default")


def write_entry(spec: ModelSpec, path: Path) -> Path:
    """A catalog of that one model."""
    fields = spec.model_dump(mode="json", exclude={"name", "loras"}, exclude_none=True)
    path.write_text(f"[{spec.name}]\n" + "".join(f"{key} = {to_toml(value)}\n" for key, value in fields.items()))
    return path


def to_toml(value: object) -> str:
    """One line; JSON writes strings, numbers and truth values as TOML does."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{json.dumps(key)} = {to_toml(item)}' for key, item in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(to_toml, value))}]"
    return json.dumps(value)


# The service


@contextlib.contextmanager
def service(spec: ModelSpec, folder: Path, graphs: bool) -> Iterator[tuple[Server, float]]:
    """Ready, and the seconds that it took."""
    server = Server("fewstep serve", free_port())
    catalog = write_entry(spec, folder / "catalog.toml")
    settings = [f"FEWSTEP_CATALOG={catalog}", f"FEWSTEP_CUDA_GRAPHS={int(graphs)}"]
    serve = [sys.executable, "-m", "cli", "serve", "--model", spec.name, "--port", str(server.port)]
    started_s = time.perf_counter()
    with running(["env", *settings, *serve], server):
        yield server, time.perf_counter() - started_s


def read_costs(server: Server, spec: ModelSpec) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/models/{spec.name}", timeout=5) as answer:
        costs: dict[str, Any] = json.load(answer)["workers"][0]["sizes"][0]
    return costs


def draw(server: Server, spec: ModelSpec, number: int) -> float:
    """Milliseconds from the request to the whole JPEG."""
    prompt = CLASS_NAMES[number % len(CLASS_NAMES)] if spec.classes else next(islice(endless_prompts(number), 1))
    body = json.dumps({"prompt": prompt, "model": spec.name, "seed": number}).encode()
    headers = {"Content-Type": "application/json", "Accept": "image/jpeg"}
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/v1/generations", body, headers)
    started_s = time.perf_counter()
    with urllib.request.urlopen(request, timeout=ANSWER_WITHIN_S) as answer:
        data = answer.read()
    took_ms = (time.perf_counter() - started_s) * 1000
    if not data.startswith(b"\xff\xd8"):
        raise BenchmarkError(f"{spec.name}: no JPEG but {data[:100]!r}")
    return took_ms


# Memory


class MemoryMeter:
    """The most memory in use while it is open, less what was in use before."""

    def __init__(self) -> None:
        self._before = self._peak = used_bytes()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    @property
    def peak_gib(self) -> float:
        return (self._peak - self._before) / 2**30

    def _watch(self) -> None:
        while not self._closed.wait(SAMPLE_EVERY_S):
            self._peak = max(self._peak, used_bytes())


def used_bytes() -> int:
    """Of the GPU by whomever, or of memory by the workers that this program started."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return int(total - free)
    return sum(resident_bytes(child) for child in psutil.Process().children(recursive=True))


def resident_bytes(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return int(process.memory_info().rss) if find_role(process) == "worker" else 0
    return 0


if __name__ == "__main__":
    main()
