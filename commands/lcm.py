"""fewstep distill lcm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LCMScheduler

from commands.distilling import Options, Session, told
from models.training.entries import full_lcm_entry, lcm_lora_entry
from models.training.errors import TrainingError
from models.training.lcm import Distiller, FullStudent, LcmSettings

LORA_RATE, FULL_RATE = 1e-4, 8e-6
USUAL_RANK = 64


@dataclass(frozen=True)
class LcmOptions:
    """What only this distillation is told."""

    full: bool
    rank: int | None
    solver_timesteps: int
    guidance: tuple[float, float]
    huber: float

    def check(self) -> None:
        """Raises TrainingError."""
        if self.full and self.rank:
            raise TrainingError(f"--rank {self.rank} and --full: a whole network has no rank")
        low, high = self.guidance
        if not 1 <= low <= high < math.inf:
            raise TrainingError(f"--guidance {low:g} {high:g}: two numbers are needed, 1 <= LOW <= HIGH")


def distill_lcm(options: Options, own: LcmOptions) -> None:
    """From a teacher to an LCM on disk."""
    rank = None if own.full else own.rank or USUAL_RANK
    with told(options, "leave --full out" if rank is None else f"lower --rank ({rank} now)"):
        own.check()
        session = Session(options)
        teacher, compute = session.teacher, session.compute
        scheduler = teacher.build_scheduler(LCMScheduler, original_inference_steps=own.solver_timesteps)
        batches, sheet = session.encode(scheduler, 0.0 if rank else sum(own.guidance) / 2)
        student = session.make_student(rank, FullStudent)
        distiller = Distiller(
            student,
            teacher.build_diffusion(compute.device),
            batches,
            options.out,
            session.train_settings(FULL_RATE if rank is None else LORA_RATE),
            LcmSettings(own.solver_timesteps, *own.guidance, own.huber),
            compute,
            {**session.identity, "rank": rank},
        )
        distiller.distill(session.saving(student, scheduler, torch.float16, sheet, distiller.trainer))
        session.announce(_entry_of(session, own))


def _entry_of(session: Session, own: LcmOptions) -> dict[str, Any]:
    teacher, size, out = session.teacher, session.size, session.options.out
    if own.full:
        return full_lcm_entry(teacher, size, out, own.solver_timesteps, own.guidance)
    return lcm_lora_entry(teacher, size, out, own.solver_timesteps)
