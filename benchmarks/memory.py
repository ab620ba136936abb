"""What the models of the catalog take of a GPU's memory, counted on their real architectures without any GPU.

    python -m benchmarks.memory            # half a minute

*Weights* are the parameters of all networks at two bytes each; a fused LoRA adds none. *Step* is the most that the
tensors of one UNet call take at once, in the largest batch of the entry at its largest size, and *decode* the same for
the full decoder of one picture, since a GPU decodes row by row. A decode runs beside the next step, so `memory_gib` of
an entry is the sum of the three, rounded up to a tenth. It leaves out what no shape tells: the CUDA context, the
libraries' workspaces, and the pools of CUDA graphs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.shared.architectures import ARCHITECTURES, Architecture
from benchmarks.shared.counting import META, Peak
from benchmarks.shared.diffusers_loop import hush_libraries
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.random_weights import Parts, build_parts
from benchmarks.shared.report import print_table, write_report
from models.catalog import ModelSpec, Size, get_spec, load_catalog


@dataclass(frozen=True)
class Memory:
    """GiB of one entry. `listed` is what the catalog says, None for nothing."""

    model: str
    rows: int
    size: str
    weights: float
    step: float
    decode: float
    memory_gib: float
    listed: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[architecture.name for architecture in ARCHITECTURES])
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-memory.json")
    options = parser.parse_args()
    hush_libraries()
    rows = estimate_all(options.models)
    print_table(rows)
    write_report(options.json, vars(options), {"memory": rows})


def estimate_all(names: Sequence[str]) -> list[Memory]:
    catalog = load_catalog()
    chosen = [architecture for architecture in ARCHITECTURES if architecture.name in names]
    return [estimate(architecture, get_spec(catalog, architecture.name)) for architecture in chosen]


def estimate(architecture: Architecture, spec: ModelSpec) -> Memory:
    parts = build_parts(architecture, META, torch.float16)
    size = max(spec.sizes, key=math.prod)
    weights = parts.num_bytes / 2**30
    step = peak_gib(lambda: call_unet(architecture, parts, size, spec.max_batch_size))
    decode = peak_gib(lambda: call_decoder(parts, size)) if architecture.vae else 0.0
    total = math.ceil((weights + step + decode) * 10) / 10
    rows = spec.max_batch_size
    return Memory(spec.name, rows, f"{size[0]}x{size[1]}", weights, step, decode, total, spec.memory_gib)


def peak_gib(call: Callable[[], object]) -> float:
    with Peak() as peak:
        call()
    return peak.num_bytes / 2**30


def call_unet(architecture: Architecture, parts: Parts, size: Size, rows: int) -> object:
    unet, timesteps = parts.pipe.unet, torch.zeros(rows, device=META)
    if architecture.vae is None:
        labels = torch.zeros(rows, dtype=torch.long, device=META)
        return unet(new_tensor(rows, 3, size[1], size[0]), timesteps, class_labels=labels)
    config = unet.config
    pooled = architecture.text_encoders[-1]["projection_dim"]
    is_xl = config.addition_embed_type is not None
    return unet(
        new_latents(rows, size),
        timesteps,
        encoder_hidden_states=new_tensor(rows, 77, config.cross_attention_dim),
        timestep_cond=new_tensor(rows, config.time_cond_proj_dim) if config.time_cond_proj_dim else None,
        added_cond_kwargs={"text_embeds": new_tensor(rows, pooled), "time_ids": new_tensor(rows, 6)} if is_xl else None,
    )


def call_decoder(parts: Parts, size: Size) -> object:
    return parts.pipe.vae.decode(new_latents(1, size))


def new_latents(rows: int, size: Size) -> torch.Tensor:
    return new_tensor(rows, 4, size[1] // 8, size[0] // 8)


def new_tensor(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, device=META)


if __name__ == "__main__":
    main()
