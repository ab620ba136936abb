"""What a distillation takes of a GPU's memory and time, counted on the real architectures without any GPU.

    python -m benchmarks.distill_cost            # some minutes

*Weights* are what lies in memory all the time: frozen networks in bfloat16, and of each trained weight itself, its
average and Adam's two moments in fp32. *Step* is the most that one training step's tensors take at once, the gradients
among them: activations of the student's forward and backward pass. The teacher's guided pass comes before it and takes
less. *tflop* is the arithmetic of one training step, in 10^12 operations, and the hours are what 4,000 such steps take
at two fifths of what the GPUs' data sheets promise, which is an assumption.

Autocast is played on the meta device by its rules: convolutions, products and attention in bfloat16, normalisations in
fp32. Text encoders and VAE have left memory by then. It leaves out what no shape tells: the CUDA context and the
libraries' workspaces, usually one to two GiB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from benchmarks.shared.architectures import SD15, SDXL, Architecture
from benchmarks.shared.counting import META, Peak
from benchmarks.shared.diffusers_loop import hush_libraries
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.report import print_table, write_report
from models.catalog import Size
from models.training.diffusion import Diffusion, build_scheduler
from models.training.lcm import Consistency, FullStudent, GuidedStudent, LcmSettings, LoraStudent
from models.training.teachers import Conditions
from models.training.trainer import Compute

RANK = 64
TRAINED_BYTES = 4 + 4 + 8  # of a weight: itself, its average, Adam's moments
FULL_PRECISION = Compute(META, torch.float32)  # of what Autocast doesn't cast
ARCHITECTURES = {"SD 1.5": (SD15, (512, 512)), "SDXL": (SDXL, (1024, 1024))}
BATCH_SIZES = (1, 4, 8)


NUM_STEPS = 4000
KEPT = 0.4  # of a GPU's peak
PEAKS = {"RTX 4090": 165, "A100": 312, "H100": 989}  # TFLOP/s in bfloat16, dense, by NVIDIA's data sheets


@dataclass(frozen=True)
class Cost:
    """Of one distillation: memory in GiB, time in hours."""

    model: str
    student: str
    batch: int
    checkpointing: bool
    trained_millions: float
    weights: float
    step: float
    total: float
    tflop: float
    rtx_4090_h: float
    a100_h: float
    h100_h: float

    @classmethod
    def of(
        cls, model: str, rank: int | None, batch: int, checkpointing: bool, trained: int, weights: float, step: Peak
    ) -> Cost:
        """`trained` is a number of weights, `weights` the GiB of all, `step` what one training step took."""
        kind, gib, tflop = "whole" if rank is None else f"LoRA, rank {rank}", step.num_bytes / 2**30, step.flops / 1e12
        hours = [NUM_STEPS * tflop / (KEPT * peak) / 3600 for peak in PEAKS.values()]
        return cls(model, kind, batch, checkpointing, trained / 1e6, weights, gib, weights + gib, tflop, *hours)


def run(description: str | None, name: str, batch_sizes: Sequence[int], estimate: Callable[..., Cost]) -> None:
    """The program of one kind of distillation: a table over architectures, students, batches, and checkpointing."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=batch_sizes)
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / f"benchmark-{name}.json")
    options = parser.parse_args()
    hush_libraries()
    cases = product(ARCHITECTURES, (RANK, None), options.batch_sizes, (False, True))
    rows = [estimate(name, *ARCHITECTURES[name], *case) for name, *case in cases]
    print_table(rows)
    write_report(options.json, vars(options), {"distillation": rows})


def estimate(
    name: str, architecture: Architecture, size: Size, rank: int | None, batch_size: int, checkpointing: bool
) -> Cost:
    """`rank` of a LoRA; None for a whole network."""
    with torch.device(META):
        student = make_student(architecture, rank)
    if checkpointing:
        student.unet.enable_gradient_checkpointing(checkpoint_with_autocast)
    with student.teacher() as teacher:
        networks = {id(weight): weight for network in (teacher, student.unet) for weight in network.parameters()}
    frozen = sum(weight.numel() * weight.element_size() for weight in networks.values() if not weight.requires_grad)
    trained = sum(weight.numel() for weight in student.unet.parameters() if weight.requires_grad)
    weights = (frozen + trained * TRAINED_BYTES) / 2**30
    with Peak(is_training=True) as step, Autocast():
        take_step(student, architecture, size, batch_size)
    return Cost.of(name, rank, batch_size, checkpointing, trained, weights, step)


def make_student(architecture: Architecture, rank: int | None) -> GuidedStudent:
    unet = diffusers.UNet2DConditionModel(**architecture.unet).requires_grad_(False)
    return FullStudent(unet, torch.bfloat16) if rank is None else LoraStudent(unet.to(torch.bfloat16), rank)


def take_step(student: GuidedStudent, architecture: Architecture, size: Size, batch_size: int) -> None:
    """Teacher, target, student, gradients: as models.training.lcm.Distiller does it."""
    consistency = Consistency(LcmSettings(), Diffusion(build_scheduler(), META), FULL_PRECISION)
    width, height = (side // 8 for side in size)
    noisy = torch.empty(batch_size, 4, height, width, device=META)
    rows, nothing = make_conditions(architecture, batch_size), make_conditions(architecture, 1)
    start, end = consistency.draw_timesteps(batch_size)
    embedded = student.embed(torch.empty(batch_size, device=META))
    with torch.no_grad(), student.teacher() as teacher:
        solved = consistency.solve(teacher, noisy, start, end, rows, nothing, consistency.draw_guidance(batch_size))
    with torch.no_grad():
        target = consistency.apply(student.unet, solved, end, rows, embedded)
    loss = consistency.loss(consistency.apply(student.unet, noisy, start, rows, embedded), target)
    loss.backward()  # type: ignore[no-untyped-call]


def make_conditions(architecture: Architecture, rows: int) -> Conditions:
    unet = architecture.unet
    states = torch.empty(rows, 77, unet["cross_attention_dim"], device=META)
    if architecture.family == "sd":
        return Conditions(states)
    pooled = torch.empty(rows, architecture.text_encoders[-1]["projection_dim"], device=META)
    return Conditions(states, pooled, torch.empty(rows, 6, device=META))


class Autocast(TorchFunctionMode):
    """CUDA's autocast to bfloat16 and its fused attention, for tensors on the meta device."""

    LOW = (F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm)
    HIGH = (F.group_norm, F.layer_norm, F.softmax)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is F.scaled_dot_product_attention:
            halves = [_cast(tensor, torch.bfloat16) for tensor in args[:3]]
            return torch.ops.aten._scaled_dot_product_flash_attention(*halves)[0]
        if func in self.LOW or func in self.HIGH:
            dtype = torch.bfloat16 if func in self.LOW else torch.float32
            args = [_cast(value, dtype) for value in args]
            named = {name: _cast(value, dtype) for name, value in named.items()}
        return func(*args, **named)


def checkpoint_with_autocast(module: Any, *inputs: Any) -> Any:
    """diffusers' own way, except that what is computed again in the backward pass, outside of modes, is cast too."""
    return checkpoint(module.__call__, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), Autocast()))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


if __name__ == "__main__":
    run(__doc__, "distill-cost", BATCH_SIZES, estimate)
