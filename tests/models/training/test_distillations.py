"""What both distillations keep, as a LoRA and as a whole network: a broken run ends where an unbroken one does, and
the result is loaded by diffusers' pipelines and by the service."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler
from safetensors.torch import load_file

from models.catalog import load_catalog
from models.loading import load_diffusers, load_pipeline
from models.training.add import AddDistiller, build_scheduler
from models.training.entries import full_lcm_entry, lcm_lora_entry, save_table, turbo_entry, turbo_lora_entry
from models.training.exporting import copy_unet, save_pipeline
from models.training.lcm import RUN, Distiller, save_lora
from models.training.teachers import Teacher
from models.training.trainer import CHECKPOINT
from tests.models.training.distillers import (
    GUIDANCE,
    METHODS,
    MODES,
    SOLVER_TIMESTEPS,
    Method,
    Mode,
    gradients,
    make_distiller,
    student_of,
)
from tests.training_data import CPU, KINDS, SIZE, Kind, assert_same_training, make_teacher, on_one_batch


@pytest.mark.parametrize(
    ("method", "kind", "mode", "changes"),
    [
        ("lcm", "sd", "lora", {}),
        ("lcm", "sdxl", "lora", {}),
        ("lcm", "sd-v", "whole", {}),
        ("add", "sd", "whole", {}),
        ("add", "sdxl", "lora", {}),
        ("add", "sd-v", "whole", {"look": "classifier"}),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one(
    root: Path, tmp_path: Path, method: Method, kind: Kind, mode: Mode, changes: dict[str, Any]
) -> None:
    def run(out: Path, *untils: int | None) -> Distiller | AddDistiller:
        for until in untils:
            distiller = make_distiller(method, root, out, kind, mode, steps=6, **changes)
            distiller.trainer.fit(distiller.loss, until=until)
        return distiller

    unbroken, resumed = run(tmp_path / "unbroken", None), run(tmp_path / "broken", 2, 3, None)
    assert_same_training(unbroken.trainer, resumed.trainer)


@pytest.mark.parametrize(("method", "of_heads"), [("lcm", set()), ("add", {"heads", "buffers of heads"})])
def test_of_a_lora_the_checkpoint_holds_nothing_that_is_frozen(
    root: Path, tmp_path: Path, method: Method, of_heads: set[str]
) -> None:
    distiller = make_distiller(method, root, tmp_path, "sdxl", "lora", steps=2)
    distiller.distill(lambda: None)
    state = torch.load(tmp_path / RUN / CHECKPOINT, weights_only=True)
    assert {part_of(name) for name in state["model"]} == {"lora"} | of_heads
    assert {part_of(name) for name in state["averages"]["averages"]} == {"lora"} | of_heads - {"buffers of heads"}


def part_of(name: str) -> str:
    """Of a student with a LoRA and of heads with spectral normalization; what is neither is told by its name."""
    if name.startswith("heads."):
        return "buffers of heads" if name.endswith(("._u", "._v")) else "heads"
    return "lora" if "lora" in name else name


@pytest.mark.parametrize(("method", "mode"), [("lcm", "lora"), ("add", "lora"), ("add", "whole")])
def test_gradient_checkpointing_changes_no_gradient(root: Path, tmp_path: Path, method: Method, mode: Mode) -> None:
    """Not even where one network is student and teacher, which are then computed twice."""
    plain, checkpointed = (
        make_distiller(method, root, tmp_path / name, "sd", mode, steps=8) for name in ("plain", "checkpointed")
    )
    for distiller in (plain, checkpointed):  # so that LoRA and teacher differ
        distiller.trainer.fit(on_one_batch(distiller), until=2)
        distiller.trainer.optimizer.zero_grad()
    student = student_of(checkpointed)
    student.unet.enable_gradient_checkpointing()
    with student.teacher() as teacher:
        teacher.enable_gradient_checkpointing()
    ours, theirs = gradients(plain), gradients(checkpointed)
    assert ours.keys() == theirs.keys()
    assert any(bool(gradient.any()) for gradient in ours.values())
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], atol=1e-7), name


# What comes out

SCHEDULERS = {"lcm": LCMScheduler, "add": EulerAncestralDiscreteScheduler}
RULES = {  # of the entry: scheduler, guidance, the least and the most steps
    ("lcm", "lora"): ("lcm", "classifier-free", 1, 8),
    ("lcm", "whole"): ("lcm", "embedded", 1, 8),
    ("add", "lora"): ("euler-ancestral", "none", 1, 4),
    ("add", "whole"): ("euler-ancestral", "none", 1, 4),
}


@dataclass(frozen=True)
class Result:
    """What a distillation wrote into a folder."""

    method: Method
    mode: Mode
    teacher: Teacher
    folder: Path


def distil(root: Path, method: Method, kind: Kind, mode: Mode) -> Result:
    """A few steps, and their result with its catalog file under `root`, when it isn't there yet."""
    teacher, out = make_teacher(root, kind), root / f"out-{method}-{kind}-{mode}"
    result = Result(method, mode, teacher, out)
    if out.exists():
        return result
    rate = 2e-2 if mode == "lora" else 3e-3
    distiller = make_distiller(method, root, out, kind, mode, steps=8, rate=rate)
    unet = student_of(distiller).unet
    if method == "lcm":
        scheduler = teacher.build_scheduler(LCMScheduler, original_inference_steps=SOLVER_TIMESTEPS)
    else:
        scheduler = build_scheduler(teacher)

    def save() -> None:
        if mode == "lora":
            save_lora(unet, out, torch.float16)
            scheduler.save_pretrained(out)
        else:
            save_pipeline(teacher.build_pipeline(copy_unet(unet, torch.float16), scheduler, torch.float16), out)

    distiller.distill(save)
    save_table("mine", entry_of(result), out)
    return result


def entry_of(result: Result) -> dict[str, Any]:
    teacher, out = result.teacher, result.folder
    match result.method, result.mode:
        case "lcm", "lora":
            return lcm_lora_entry(teacher, SIZE, out, SOLVER_TIMESTEPS)
        case "lcm", "whole":
            return full_lcm_entry(teacher, SIZE, out, SOLVER_TIMESTEPS, GUIDANCE)
        case "add", "lora":
            return turbo_lora_entry(teacher, SIZE, out, 4)
        case _:
            return turbo_entry(teacher, SIZE, out, 4)


@pytest.fixture(scope="module", params=list(product(METHODS, KINDS, MODES)), ids=" ".join)
def result(root: Path, request: pytest.FixtureRequest) -> Result:
    return distil(root, *request.param)


def load_theirs(result: Result) -> Any:
    """By a plain user of diffusers."""
    pipeline_class, teacher = result.teacher.pipeline_class, result.teacher
    arguments = {"safety_checker": None} if teacher.layout == "sd" else {}
    if result.mode == "whole":
        pipe = pipeline_class.from_pretrained(result.folder, **arguments)
    else:
        pipe = pipeline_class.from_pretrained(teacher.folder, **arguments)
        pipe.scheduler = SCHEDULERS[result.method].from_pretrained(result.folder)
        pipe.load_lora_weights(result.folder)
        pipe.fuse_lora()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, guidance_scale: float = 0.0, steps: int = 4) -> np.ndarray:
    """In brightnesses of 0 to 255."""
    generator = torch.Generator().manual_seed(0)
    (image,) = pipe(
        "a red apple",
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=generator,
        output_type="np",
    ).images
    assert image.shape == (32, 32, 3)
    return 255 * np.asarray(image)


def test_diffusers_draws_other_pictures_with_it(result: Result) -> None:
    pipe, teacher = load_theirs(result), result.teacher
    assert type(pipe.scheduler).__name__ == SCHEDULERS[result.method].__name__
    config = pipe.scheduler.config
    assert config.prediction_type == teacher.scheduler_config["prediction_type"]
    if result.method == "lcm":
        assert config.original_inference_steps == SOLVER_TIMESTEPS
    else:
        assert config.timestep_spacing == "trailing"
    plain = teacher.build_pipeline(teacher.load_unet(CPU, torch.float32), pipe.scheduler, torch.float32)
    assert np.abs(draw(pipe) - draw(plain)).max() > 5


def test_two_guidance_scales_are_two_pictures_of_a_whole_lcm(root: Path) -> None:
    pipe = load_theirs(distil(root, "lcm", "sd", "whole"))
    assert np.abs(draw(pipe, 3) - draw(pipe, 7)).max() > 0.5


def test_the_service_draws_what_diffusers_draws(result: Result) -> None:
    """By the catalog entry that the distillation wrote."""
    spec = load_catalog(extra=result.folder / "catalog.toml")["mine"]
    steps, scale = spec.num_inference_steps, GUIDANCE[1] if spec.guidance == "embedded" else 0.0
    assert (spec.default_scheduler, spec.guidance, steps.min, steps.max) == RULES[result.method, result.mode]
    assert spec.family == result.teacher.layout
    ours, theirs = load_diffusers(spec, CPU, torch.float32), load_theirs(result)
    for count in (1, 2, 4):
        assert np.abs(draw(ours, scale, count) - draw(theirs, scale, count)).max() <= 0.1
    pipeline = load_pipeline(spec, CPU, torch.float32)
    (conditioning,) = pipeline.encode_prompts(["a red apple"])
    output = pipeline.predict(torch.randn(1, 4, 8, 8), torch.tensor([999.0]), [conditioning], torch.tensor([scale]))
    assert bool(output.isfinite().all())


def test_weights_are_in_half_precision(result: Result) -> None:
    paths = sorted(result.folder.glob("*.safetensors" if result.mode == "lora" else "*/*.safetensors"))
    assert paths
    tensors = [tensor for path in paths for tensor in load_file(path).values()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}


@pytest.mark.parametrize(("solver_timesteps", "steps"), [(2, (2, 2)), (6, (4, 6)), (50, (4, 8))])
def test_an_lcm_of_few_timesteps_offers_no_more_steps(
    root: Path, solver_timesteps: int, steps: tuple[int, int]
) -> None:
    entry = lcm_lora_entry(make_teacher(root, "sd"), SIZE, root, solver_timesteps)
    assert entry["num_inference_steps"] == {"default": steps[0], "min": 1, "max": steps[1]}
