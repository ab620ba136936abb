"""Latent consistency distillation of every layout, as a LoRA and as a whole network: against diffusers' schedulers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor

from models.training.diffusion import Diffusion
from models.training.lcm import RUN, Consistency, FullStudent, LcmSettings, embed_guidance
from models.training.teachers import Conditions, call_unet
from tests.models.training.distillers import HALF, MODES, Mode, assert_is_half, make_lcm
from tests.training_data import CPU, EXACT, KINDS, Kind, assert_lower, make_batches, make_teacher, on_one_batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_loss_falls_on_one_batch(root: Path, tmp_path: Path, kind: Kind, mode: Mode) -> None:
    distiller = make_lcm(root, tmp_path, kind, mode, steps=20)
    distiller.trainer.fit(on_one_batch(distiller))
    assert_lower(tmp_path / RUN, 0.8)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_falls_in_bfloat16_with_gradient_checkpointing(root: Path, tmp_path: Path, mode: Mode) -> None:
    distiller = make_lcm(root, tmp_path, "sdxl", mode, steps=20, compute=HALF)
    distiller.student.unet.enable_gradient_checkpointing()
    assert_is_half(distiller)
    distiller.trainer.fit(on_one_batch(distiller))
    assert_lower(tmp_path / RUN, 0.8)


def test_one_network_is_student_target_and_teacher(root: Path, tmp_path: Path) -> None:
    teacher = make_teacher(root, "sd")
    distiller = make_lcm(root, tmp_path, "sd", "lora", steps=6)
    distiller.trainer.fit(distiller.loss)
    unet, batch = distiller.student.unet, make_batches(root, teacher).draw(distiller.trainer.rng)
    timesteps = torch.tensor([499] * 4)

    def draw(network: Any) -> Tensor:
        with torch.no_grad():
            return call_unet(network, batch.latents, timesteps, batch.conditions)

    student = draw(unet)
    with distiller.trainer.averaged_weights():
        target = draw(unet)
    with distiller.student.teacher() as without:
        teachers = draw(without)
    assert torch.equal(draw(unet), student), "it is the student again"
    assert torch.equal(teachers, draw(teacher.load_unet(CPU, torch.float32)))
    assert not torch.allclose(student, target, atol=1e-4)
    assert not torch.allclose(target, teachers, atol=1e-4)
    assert all(weight.requires_grad for weight in distiller.trainer.trainable.values())


def test_a_whole_student_begins_as_its_teacher(root: Path) -> None:
    student = FullStudent(make_teacher(root, "sd-v").load_unet(CPU, torch.float32), torch.float32)
    noisy, timesteps, states = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 16, 32)
    embedded = student.embed(torch.tensor([3.0, 9.0]))
    with torch.no_grad(), student.teacher() as frozen:
        ours = call_unet(student.unet, noisy, timesteps, Conditions(states), embedded)
        assert torch.equal(ours, call_unet(frozen, noisy, timesteps, Conditions(states)))
    assert student.unet.config.time_cond_proj_dim == 256
    assert not any(weight.requires_grad for weight in frozen.parameters())


# What is computed


@pytest.mark.parametrize("kind", ["sd", "sd-v"])
@pytest.mark.parametrize("index", [50, 25, 2])
def test_a_solver_step_is_ddims_own(root: Path, kind: Kind, index: int) -> None:
    """With guidance, and from the highest timestep of all."""
    teacher = make_teacher(root, kind)
    consistency = Consistency(LcmSettings(50), teacher.build_diffusion(CPU), EXACT)
    unet, scales = teacher.load_unet(CPU, torch.float32), torch.tensor([3.0, 9.0])
    encoders = teacher.load_encoders(CPU)
    rows, nothing = encoders.encode_captions(["a red apple", "two"]), encoders.encode_captions([None])
    noisy, start = torch.randn(2, 4, 8, 8), torch.tensor([index * 20 - 1] * 2)
    solved = consistency.solve(unet, noisy, start, start - 20, rows, nothing, scales)
    scheduler = teacher.build_scheduler(DDIMScheduler)
    scheduler.set_timesteps(50)
    with torch.no_grad():
        conditional = call_unet(unet, noisy, start, rows)
        unconditional = call_unet(unet, noisy, start, nothing.spread_over(rows))
    output = unconditional + scales[:, None, None, None] * (conditional - unconditional)
    theirs = scheduler.step(output, int(start[0]), noisy).prev_sample
    assert torch.allclose(solved, theirs, atol=1e-4)


@pytest.mark.parametrize("solver_timesteps", [20, 50])
def test_the_solvers_grid_is_the_samplers(solver_timesteps: int) -> None:
    scheduler = LCMScheduler(original_inference_steps=solver_timesteps)
    scheduler.set_timesteps(solver_timesteps)
    consistency = Consistency(LcmSettings(solver_timesteps), Diffusion(scheduler), EXACT)
    start, end = consistency.draw_timesteps(5000)
    assert set(start.tolist()) == set(scheduler.timesteps.tolist())
    assert set(end.tolist()) == {0, *scheduler.timesteps[1:].tolist()}
    assert bool((start > end).all())


def test_boundary_scalings_are_the_samplers() -> None:
    scheduler = LCMScheduler()
    consistency = Consistency(LcmSettings(), Diffusion(scheduler), EXACT)
    for timestep in (0, 1, 19, 500, 999):
        c_skip, c_out = consistency.boundary(torch.tensor([timestep]))
        theirs = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(timestep))
        assert (float(c_skip), float(c_out)) == pytest.approx([float(value) for value in theirs])


@pytest.mark.parametrize("kind", KINDS)
def test_at_timestep_zero_the_target_is_what_it_is_given(root: Path, tmp_path: Path, kind: Kind) -> None:
    distiller = make_lcm(root, tmp_path, kind, "lora", steps=2)
    batch = distiller.batches.draw(distiller.trainer.rng)
    timesteps = torch.zeros(4, dtype=torch.long)
    with torch.no_grad(), distiller.trainer.averaged_weights():
        output = distiller.consistency.apply(distiller.student.unet, batch.latents, timesteps, batch.conditions)
    assert torch.equal(output, batch.latents)


def test_guidance_is_embedded_as_the_pipelines_do_it() -> None:
    scales = torch.tensor([1.0, 3.0, 8.5, 15.0])
    theirs = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=256)
    assert torch.allclose(embed_guidance(scales), theirs, atol=1e-3)


def test_guidance_is_drawn_within_its_range() -> None:
    drawn = Consistency(LcmSettings(50, 3, 15), Diffusion(), EXACT).draw_guidance(2000)
    assert 3 <= float(drawn.min()) < 3.2
    assert 14.8 < float(drawn.max()) <= 15
    assert float(drawn.mean()) == pytest.approx(9, abs=0.4)
    assert Consistency(LcmSettings(50, 2, 2), Diffusion(), EXACT).draw_guidance(9).tolist() == [2.0] * 9


def test_the_loss_is_square_near_zero_and_straight_far_off() -> None:
    consistency = Consistency(LcmSettings(), Diffusion(), EXACT)
    zero = torch.zeros(1)
    assert float(consistency.loss(zero, zero)) == 0
    assert float(consistency.loss(zero, torch.tensor([3.0]))) == pytest.approx(3 - 1e-3, rel=1e-4)
    assert float(consistency.loss(zero, torch.tensor([1e-3]))) == pytest.approx((math.sqrt(2) - 1) * 1e-3, rel=1e-3)
