"""What adversarial distillation takes of a GPU's memory and time, counted on the real architectures without any GPU.

    python -m benchmarks.turbo_cost            # some minutes

As `benchmarks.distill_cost` counts latent consistency distillation: *weights* with the heads', their averages and
moments among them, and *step* with everything that student, frozen features and heads keep for their backward passes.
Features are the teacher's own encoder, and compute in bfloat16; the heads compute in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import diffusers
import torch

from benchmarks.distill_cost import (
    TRAINED_BYTES,
    Autocast,
    Cost,
    checkpoint_with_autocast,
    make_conditions,
    run,
)
from benchmarks.shared.architectures import Architecture
from benchmarks.shared.counting import META, Peak
from models.catalog import Size
from models.training.add import AddSettings, Adversary, WholeStudent, build_heads
from models.training.diffusion import Diffusion, build_scheduler
from models.training.features import TeacherFeatures
from models.training.lcm import LoraStudent, Student
from models.training.pictures import Batch
from models.training.trainer import Compute

BATCH_SIZES = (1, 4)
TIMESTEPS = (999, 749, 499, 249)


@dataclass(frozen=True)
class PlayedCompute(Compute):
    """bfloat16 on the meta device, where networks say so."""

    device: torch.device = META

    def autocast(self) -> Autocast:
        return Autocast()


def estimate(
    name: str, architecture: Architecture, size: Size, rank: int | None, batch_size: int, checkpointing: bool
) -> Cost:
    """`rank` of a LoRA; None for a whole network."""
    with torch.device(META):
        adversary = make_adversary(architecture, rank)
    student = adversary.student
    with student.teacher() as teacher:
        networks = (student.unet, teacher, adversary.heads)
        if checkpointing:
            for unet in (student.unet, teacher):
                unet.enable_gradient_checkpointing(checkpoint_with_autocast)
        everything = {id(weight): weight for network in networks for weight in network.parameters()}.values()
    trained = sum(weight.numel() for weight in everything if weight.requires_grad)
    frozen = sum(weight.numel() * weight.element_size() for weight in everything if not weight.requires_grad)
    weights = (frozen + trained * TRAINED_BYTES) / 2**30
    step = measure_step(adversary, architecture, size, batch_size)
    return Cost.of(name, rank, batch_size, checkpointing, trained, weights, step)


def make_adversary(architecture: Architecture, rank: int | None) -> Adversary:
    """Of meta tensors."""
    unet = diffusers.UNet2DConditionModel(**architecture.unet).requires_grad_(False)
    student: Student = (
        WholeStudent(unet, torch.bfloat16) if rank is None else LoraStudent(unet.to(torch.bfloat16), rank)
    )
    diffusion, compute = Diffusion(build_scheduler(), META), PlayedCompute()
    with student.teacher() as teacher:
        features = TeacherFeatures(teacher, diffusion, compute)
    heads = build_heads(features, make_conditions(architecture, 1))
    return Adversary(student, heads, features, diffusion, TIMESTEPS, AddSettings(), compute)


def measure_step(adversary: Adversary, architecture: Architecture, size: Size, batch_size: int) -> Peak:
    """As models.training.add.AddDistiller takes it."""
    width, height = (side // 8 for side in size)
    latents = torch.empty(batch_size, 4, height, width, device=META)
    batch = Batch(latents, make_conditions(architecture, batch_size))
    with Peak(is_training=True) as step:
        loss, _ = adversary.loss(batch, make_conditions(architecture, 1))
        loss.backward()  # type: ignore[no-untyped-call]
    return step


if __name__ == "__main__":
    run(__doc__, "turbo-cost", BATCH_SIZES, estimate)
