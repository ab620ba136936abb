"""Latent consistency distillation of every layout, as a LoRA and as a whole network: against diffusers' schedulers,
loaded by diffusers' pipelines and by the service."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import load_file
from torch import Tensor

from models.catalog import ModelSpec, load_catalog
from models.loading import load_diffusers, load_pipeline
from models.training.diffusion import Diffusion
from models.training.entries import full_lcm_entry, lcm_lora_entry, save_table
from models.training.exporting import copy_unet, save_pipeline
from models.training.lcm import (
    RUN,
    Consistency,
    Distiller,
    FullStudent,
    GuidedStudent,
    LcmSettings,
    LoraStudent,
    embed_guidance,
    save_lora,
)
from models.training.teachers import Conditions, Teacher, call_unet
from models.training.trainer import CHECKPOINT, Compute
from tests.training_data import CPU, KINDS, SIZE, Kind, assert_lower, make_batches, make_teacher, settings

Mode = str
MODES: tuple[Mode, ...] = ("lora", "full")
EXACT = Compute(CPU, torch.float32)
SOLVER_TIMESTEPS = 20
GUIDANCE = (3.0, 7.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lcm")


def make_student(teacher: Teacher, mode: Mode, dtype: torch.dtype = torch.float32) -> GuidedStudent:
    torch.manual_seed(0)
    if mode == "lora":
        return LoraStudent(teacher.load_unet(CPU, dtype), rank=4)
    return FullStudent(teacher.load_unet(CPU, torch.float32), dtype)


def make_distiller(
    root: Path, out: Path, kind: Kind, mode: Mode, steps: int, compute: Compute = EXACT, **changes: Any
) -> Distiller:
    teacher = make_teacher(root, kind)
    student = make_student(teacher, mode, compute.dtype)
    plan = settings(steps, **({"rate": 3e-3 if mode == "lora" else 1e-3} | changes))
    lcm = LcmSettings(SOLVER_TIMESTEPS, *GUIDANCE)
    return Distiller(student, teacher.build_diffusion(CPU), make_batches(root, teacher), out, plan, lcm, compute)


def on_one_batch(distiller: Distiller) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        torch.manual_seed(0)
        distiller.trainer.rng.seed(0)
        return distiller.loss(step)

    return loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_loss_falls_on_one_batch(root: Path, tmp_path: Path, kind: Kind, mode: Mode) -> None:
    distiller = make_distiller(root, tmp_path, kind, mode, steps=20)
    distiller.trainer.fit(on_one_batch(distiller))
    assert_lower(tmp_path / RUN, 0.8)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_falls_in_bfloat16_with_gradient_checkpointing(root: Path, tmp_path: Path, mode: Mode) -> None:
    """Frozen weights in bfloat16, trained ones in float32, as on a GPU."""
    distiller = make_distiller(root, tmp_path, "sdxl", mode, steps=20, compute=Compute(CPU, torch.bfloat16))
    distiller.student.unet.enable_gradient_checkpointing()
    assert {weight.dtype for weight in distiller.trainer.trainable.values()} == {torch.float32}
    with distiller.student.teacher() as teacher:
        assert teacher.conv_in.weight.dtype == torch.bfloat16
    distiller.trainer.fit(on_one_batch(distiller))
    assert_lower(tmp_path / RUN, 0.8)


def test_gradient_checkpointing_changes_no_gradient(root: Path, tmp_path: Path) -> None:
    gradients = []
    for name in ("plain", "checkpointed"):
        distiller = make_distiller(root, tmp_path / name, "sd", "lora", steps=4)
        if name == "checkpointed":
            distiller.student.unet.enable_gradient_checkpointing()
        on_one_batch(distiller)(0).backward()  # type: ignore[no-untyped-call]
        gradients.append([weight.grad for weight in distiller.trainer.trainable.values()])
    assert any(bool(gradient.any()) for gradient in gradients[0] if gradient is not None)
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-7)


@pytest.mark.parametrize(("kind", "mode"), [("sd", "lora"), ("sdxl", "lora"), ("sd-v", "full")])
def test_a_resumed_run_equals_an_unbroken_one(root: Path, tmp_path: Path, kind: Kind, mode: Mode) -> None:
    def run(out: Path, *untils: int | None) -> Distiller:
        for until in untils:
            distiller = make_distiller(root, out, kind, mode, steps=6)
            distiller.trainer.fit(distiller.loss, until=until)
        return distiller

    unbroken, resumed = run(tmp_path / "unbroken", None), run(tmp_path / "broken", 2, 3, None)
    for one, other in zip(unbroken.trainer.trainable.values(), resumed.trainer.trainable.values(), strict=True):
        assert torch.equal(one, other)
    with unbroken.trainer.averaged_weights(), resumed.trainer.averaged_weights():
        for one, other in zip(unbroken.trainer.trainable.values(), resumed.trainer.trainable.values(), strict=True):
            assert torch.equal(one, other)


def test_of_a_lora_the_checkpoint_holds_the_lora_alone(root: Path, tmp_path: Path) -> None:
    distiller = make_distiller(root, tmp_path, "sdxl", "lora", steps=2)
    distiller.distill(lambda: None)
    state = torch.load(tmp_path / RUN / CHECKPOINT, weights_only=True)
    for names in (state["model"], state["averages"]["averages"]):
        assert names
        assert all("lora" in name for name in names)


def test_one_network_is_student_target_and_teacher(root: Path, tmp_path: Path) -> None:
    teacher = make_teacher(root, "sd")
    distiller = make_distiller(root, tmp_path, "sd", "lora", steps=6)
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
    teacher = make_teacher(root, "sd-v")
    student = make_student(teacher, "full")
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
    distiller = make_distiller(root, tmp_path, kind, "lora", steps=2)
    batch = distiller.batches.draw(distiller.trainer.rng)
    timesteps = torch.zeros(4, dtype=torch.long)
    with torch.no_grad(), distiller.trainer.averaged_weights():
        output = distiller.consistency.apply(distiller.student.unet, batch.latents, timesteps, batch.conditions)
    assert torch.equal(output, batch.latents)


def test_guidance_is_embedded_as_the_pipelines_do_it() -> None:
    scales = torch.tensor([1.0, 3.0, 8.5, 15.0])
    theirs = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, embedding_dim=256)
    assert torch.allclose(embed_guidance(scales), theirs, atol=1e-3)


def test_guidance_is_drawn_within_its_range(root: Path) -> None:
    diffusion = make_teacher(root, "sd").build_diffusion(CPU)
    drawn = Consistency(LcmSettings(50, 3, 15), diffusion, EXACT).draw_guidance(2000)
    assert 3 <= float(drawn.min()) < 3.2
    assert 14.8 < float(drawn.max()) <= 15
    assert float(drawn.mean()) == pytest.approx(9, abs=0.4)
    assert Consistency(LcmSettings(50, 2, 2), diffusion, EXACT).draw_guidance(9).tolist() == [2.0] * 9


def test_the_loss_is_square_near_zero_and_straight_far_off(root: Path) -> None:
    consistency = Consistency(LcmSettings(), make_teacher(root, "sd").build_diffusion(CPU), EXACT)
    zero = torch.zeros(1)
    assert float(consistency.loss(zero, zero)) == 0
    assert float(consistency.loss(zero, torch.tensor([3.0]))) == pytest.approx(3 - 1e-3, rel=1e-4)
    assert float(consistency.loss(zero, torch.tensor([1e-3]))) == pytest.approx((math.sqrt(2) - 1) * 1e-3, rel=1e-3)


# What comes out


def distil(root: Path, out: Path, kind: Kind, mode: Mode) -> Teacher:
    """A few steps, and the result in `out` with its catalog file."""
    teacher = make_teacher(root, kind)
    distiller = make_distiller(root, out, kind, mode, steps=8, rate=2e-2 if mode == "lora" else 3e-3)
    unet, scheduler = distiller.student.unet, teacher.build_scheduler(LCMScheduler, original_inference_steps=20)

    def save() -> None:
        if mode == "lora":
            save_lora(unet, out, torch.float16)
            scheduler.save_pretrained(out)
        else:
            save_pipeline(teacher.build_pipeline(copy_unet(unet, torch.float16), scheduler, torch.float16), out)

    distiller.distill(save)
    lora, full = lcm_lora_entry(teacher, SIZE, out, 20), full_lcm_entry(teacher, SIZE, out, 20, GUIDANCE)
    save_table("mine", lora if mode == "lora" else full, out)
    return teacher


@pytest.fixture(scope="module", params=[(kind, mode) for kind in KINDS for mode in MODES], ids=lambda it: " ".join(it))
def distilled(root: Path, request: pytest.FixtureRequest) -> tuple[Teacher, Mode, Path]:
    kind, mode = request.param
    out = root / f"out-{kind}-{mode}"
    return distil(root, out, kind, mode), mode, out


def load_theirs(teacher: Teacher, mode: Mode, out: Path) -> Any:
    """By a plain user of diffusers."""
    pipeline_class = teacher.pipeline_class
    arguments = {"safety_checker": None} if teacher.layout == "sd" else {}
    if mode == "full":
        pipe = pipeline_class.from_pretrained(out, **arguments)
    else:
        pipe = pipeline_class.from_pretrained(teacher.folder, **arguments)
        pipe.scheduler = LCMScheduler.from_pretrained(out)
        pipe.load_lora_weights(out)
        pipe.fuse_lora()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, guidance_scale: float) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    image = pipe(
        "a red apple", num_inference_steps=4, guidance_scale=guidance_scale, generator=generator, width=32, height=32
    ).images[0]
    return np.asarray(image).astype(int)


def test_diffusers_draws_other_pictures_with_it(distilled: tuple[Teacher, Mode, Path]) -> None:
    teacher, mode, out = distilled
    pipe = load_theirs(teacher, mode, out)
    assert pipe.scheduler.config.original_inference_steps == 20
    assert pipe.scheduler.config.prediction_type == teacher.scheduler_config["prediction_type"]
    plain = teacher.build_pipeline(teacher.load_unet(CPU, torch.float32), pipe.scheduler, torch.float32)
    assert np.abs(draw(pipe, 0) - draw(plain, 0)).max() > 5


def test_two_guidance_scales_are_two_pictures_of_a_whole_lcm(root: Path) -> None:
    teacher = distil(root, root / "guided", "sd", "full")
    pipe = load_theirs(teacher, "full", root / "guided")
    assert np.abs(draw(pipe, 3) - draw(pipe, 7)).max() > 0


def read_entry(out: Path) -> ModelSpec:
    return load_catalog(extra=out / "catalog.toml")["mine"]


def test_the_service_draws_what_diffusers_draws(distilled: tuple[Teacher, Mode, Path]) -> None:
    """By the catalog entry that the distillation wrote."""
    teacher, mode, out = distilled
    spec = read_entry(out)
    assert (spec.family, spec.guidance) == (teacher.layout, "embedded" if mode == "full" else "classifier-free")
    scale = GUIDANCE[1] if mode == "full" else 0
    ours, theirs = load_diffusers(spec, CPU, torch.float32), load_theirs(teacher, mode, out)
    assert np.abs(draw(ours, scale) - draw(theirs, scale)).max() <= 1
    pipeline = load_pipeline(spec, CPU, torch.float32)
    (conditioning,) = pipeline.encode_prompts(["a red apple"])
    output = pipeline.predict(torch.randn(1, 4, 8, 8), torch.tensor([999.0]), [conditioning], torch.tensor([scale]))
    assert bool(output.isfinite().all())


def test_weights_are_in_half_precision(distilled: tuple[Teacher, Mode, Path]) -> None:
    _, mode, out = distilled
    paths = [out / "pytorch_lora_weights.safetensors"] if mode == "lora" else sorted(out.glob("*/*.safetensors"))
    assert len(paths) >= 1
    tensors = [tensor for path in paths if RUN not in path.parts for tensor in load_file(path).values()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}
