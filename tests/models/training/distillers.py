"""Small distillers of both methods, on teachers of every layout, and what their tests ask of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from models.training.add import AddDistiller, AddSettings, WholeStudent, build_scheduler, student_timesteps
from models.training.features import ClassifierFeatures, Features, LatentClassifier, TeacherFeatures
from models.training.lcm import Distiller, FullStudent, LcmSettings, LoraStudent, Student
from models.training.teachers import Teacher
from models.training.trainer import Compute
from tests.training_data import CPU, EXACT, Kind, Training, make_batches, make_teacher, on_one_batch, settings

Method = Literal["lcm", "add"]
METHODS: tuple[Method, ...] = ("lcm", "add")
Mode = Literal["lora", "whole"]
MODES: tuple[Mode, ...] = ("lora", "whole")
Look = Literal["teacher", "classifier"]  # what the heads of adversarial distillation look through

Whole = TypeVar("Whole", bound=Student)

HALF = Compute(CPU, torch.bfloat16)
SOLVER_TIMESTEPS = 20
GUIDANCE = (3.0, 7.0)
GUIDED = AddSettings(guidance=2.0, heads_rate=3e-3)


def make_distiller(
    method: Method, root: Path, out: Path, kind: Kind, mode: Mode, steps: int, **changes: Any
) -> Distiller | AddDistiller:
    make: Any = make_lcm if method == "lcm" else make_add
    made: Distiller | AddDistiller = make(root, out, kind, mode, steps, **changes)
    return made


def student_of(distiller: Distiller | AddDistiller) -> Student:
    return distiller.student if isinstance(distiller, Distiller) else distiller.adversary.student


def make_student(
    teacher: Teacher, mode: Mode, whole: Callable[[Any, torch.dtype], Whole], dtype: torch.dtype
) -> LoraStudent | Whole:
    torch.manual_seed(0)
    if mode == "lora":
        return LoraStudent(teacher.load_unet(CPU, dtype), rank=4)
    return whole(teacher.load_unet(CPU, torch.float32), dtype)


def make_lcm(
    root: Path, out: Path, kind: Kind, mode: Mode, steps: int = 8, compute: Compute = EXACT, **changes: Any
) -> Distiller:
    teacher = make_teacher(root, kind)
    return Distiller(
        make_student(teacher, mode, FullStudent, compute.dtype),
        teacher.build_diffusion(CPU),
        make_batches(root, teacher),
        out,
        settings(steps, **({"rate": 3e-3 if mode == "lora" else 1e-3} | changes)),
        LcmSettings(SOLVER_TIMESTEPS, *GUIDANCE),
        compute,
    )


def make_add(
    root: Path,
    out: Path,
    kind: Kind,
    mode: Mode,
    steps: int = 8,
    add: AddSettings = GUIDED,
    compute: Compute = EXACT,
    look: Look = "teacher",
    **changes: Any,
) -> AddDistiller:
    teacher = make_teacher(root, kind)
    student = make_student(teacher, mode, WholeStudent, compute.dtype)
    return AddDistiller(
        student,
        _make_features(student, teacher, compute, look),
        teacher.build_diffusion(CPU),
        student_timesteps(build_scheduler(teacher), add.student_timesteps),
        make_batches(root, teacher),
        out,
        settings(steps, **({"rate": 1e-2 if mode == "lora" else 1e-3} | changes)),
        add,
        compute,
    )


def _make_features(student: Student, teacher: Teacher, compute: Compute, look: Look) -> Features:
    if look == "classifier":
        torch.manual_seed(1)
        classifier: LatentClassifier = LatentClassifier(num_labels=5, num_colors=3, channels=(16, 32))
        return ClassifierFeatures(classifier.requires_grad_(False).eval(), compute, "a classifier")
    with student.teacher() as frozen:
        return TeacherFeatures(frozen, teacher.build_diffusion(CPU), compute)


def gradients(training: Training) -> dict[str, Tensor]:
    """Of all that is trained."""
    on_one_batch(training)(0).backward()  # type: ignore[no-untyped-call]
    found = {name: weight.grad for name, weight in training.trainer.trainable.items()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_is_half(distiller: Distiller | AddDistiller) -> None:
    """Frozen weights in bfloat16, trained ones in float32, as on a GPU."""
    assert {weight.dtype for weight in distiller.trainer.trainable.values()} == {torch.float32}
    with student_of(distiller).teacher() as teacher:
        assert teacher.conv_in.weight.dtype == torch.bfloat16
