"""fewstep distill lcm."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import LCMScheduler

from commands.distilling import Options, Session, told
from models.training.entries import full_lcm_entry, lcm_lora_entry
from models.training.errors import TrainingError
from models.training.lcm import Distiller, FullStudent, LcmSettings

LORA_RATE, FULL_RATE = 1e-4, 8e-6


def distill_lcm(options: Options, rank: int | None, solver_timesteps: int, guidance: tuple[float, float]) -> None:
    """From a teacher to an LCM on disk. `rank` of the LoRA; None for a whole network."""
    with told(options, "leave --full out" if rank is None else f"lower --rank ({rank} now)"):
        _check_guidance(guidance)
        session = Session(options)
        teacher, compute = session.teacher, session.compute
        scheduler = teacher.build_scheduler(LCMScheduler, original_inference_steps=solver_timesteps)
        batches, sheet = session.encode(scheduler, 0.0 if rank else sum(guidance) / 2)
        student = session.make_student(rank, FullStudent)
        distiller = Distiller(
            student,
            teacher.build_diffusion(compute.device),
            batches,
            options.out,
            session.train_settings(FULL_RATE if rank is None else LORA_RATE),
            LcmSettings(solver_timesteps, *guidance),
            compute,
            {**session.identity, "rank": rank},
        )
        distiller.distill(session.saving(student, scheduler, torch.float16, sheet, distiller.trainer))
        session.announce(_entry_of(session, rank, solver_timesteps, guidance))


def _entry_of(
    session: Session, rank: int | None, solver_timesteps: int, guidance: tuple[float, float]
) -> dict[str, Any]:
    teacher, size, out = session.teacher, session.size, session.options.out
    if rank is None:
        return full_lcm_entry(teacher, size, out, solver_timesteps, guidance)
    return lcm_lora_entry(teacher, size, out, solver_timesteps)


def _check_guidance(guidance: tuple[float, float]) -> None:
    low, high = guidance
    if not 1 <= low <= high < math.inf:
        raise TrainingError(f"--guidance {low:g} {high:g}: two numbers are needed, 1 <= LOW <= HIGH")
