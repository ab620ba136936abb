"""Adversarial diffusion distillation of every layout, as a whole network and as a LoRA: against its own formulas by
autograd, against diffusers' scheduler, loaded by diffusers' pipelines and by the service."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor, nn

from models.catalog import load_catalog
from models.loading import load_diffusers, load_pipeline
from models.training.add import (
    AddDistiller,
    AddSettings,
    WholeStudent,
    build_scheduler,
    student_timesteps,
)
from models.training.entries import save_table, turbo_entry, turbo_lora_entry
from models.training.errors import TeacherError
from models.training.exporting import copy_unet, save_pipeline
from models.training.features import ClassifierFeatures, Features, LatentClassifier, TeacherFeatures
from models.training.heads import Head, deceive, r1_penalty, tell_apart
from models.training.lcm import RUN, LoraStudent, Student, save_lora
from models.training.teachers import Teacher, call_unet, open_teacher
from models.training.trainer import CHECKPOINT, LOG, Compute, Trainer
from tests.training_data import CPU, KINDS, SIZE, Kind, change_config, make_batches, make_teacher, settings

Mode = str
MODES: tuple[Mode, ...] = ("whole", "lora")
EXACT = Compute(CPU, torch.float32)
GUIDED = AddSettings(guidance=2.0, heads_rate=3e-3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("add")


def make_student(teacher: Teacher, mode: Mode, dtype: torch.dtype = torch.float32) -> Student:
    torch.manual_seed(0)
    if mode == "lora":
        return LoraStudent(teacher.load_unet(CPU, dtype), rank=4)
    return WholeStudent(teacher.load_unet(CPU, torch.float32), dtype)


def make_features(
    student: Student, teacher: Teacher, compute: Compute, classifier: LatentClassifier | None
) -> Features:
    if classifier is not None:
        return ClassifierFeatures(classifier.requires_grad_(False).eval(), compute, "a classifier")
    with student.teacher() as frozen:
        return TeacherFeatures(frozen, teacher.build_diffusion(CPU), compute)


def make_classifier() -> LatentClassifier:
    torch.manual_seed(1)
    network: LatentClassifier = LatentClassifier(num_labels=5, num_colors=3, channels=(16, 32))
    return network


def make_distiller(
    root: Path,
    out: Path,
    kind: Kind,
    mode: Mode,
    steps: int = 8,
    add: AddSettings = GUIDED,
    compute: Compute = EXACT,
    classifier: LatentClassifier | None = None,
    **changes: Any,
) -> AddDistiller:
    teacher = make_teacher(root, kind)
    student = make_student(teacher, mode, compute.dtype)
    return AddDistiller(
        student,
        make_features(student, teacher, compute, classifier),
        teacher.build_diffusion(CPU),
        student_timesteps(build_scheduler(teacher), add.student_timesteps),
        make_batches(root, teacher),
        out,
        settings(steps, **({"rate": 1e-3 if mode == "whole" else 1e-2} | changes)),
        add,
        compute,
    )


def on_one_batch(distiller: AddDistiller) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        torch.manual_seed(0)
        distiller.trainer.rng.seed(0)
        return distiller.loss(step)

    return loss


def logged(out: Path) -> dict[str, list[float]]:
    with (out / RUN / LOG).open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def gradients(distiller: AddDistiller) -> dict[str, Tensor]:
    on_one_batch(distiller)(0).backward()  # type: ignore[no-untyped-call]
    return {name: weight.grad for name, weight in distiller.trainer.trainable.items() if weight.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_is_trained_at_the_timesteps_that_it_is_sampled_at(root: Path, kind: Kind) -> None:
    teacher = make_teacher(root, kind)
    trained = student_timesteps(build_scheduler(teacher), 4)
    theirs = EulerAncestralDiscreteScheduler.from_config(dict(teacher.scheduler_config), timestep_spacing="trailing")
    for steps in (1, 2, 4):
        theirs.set_timesteps(steps)
        assert {int(timestep) for timestep in theirs.timesteps} <= set(trained)
    assert [int(timestep) for timestep in theirs.timesteps] == trained == [999, 749, 499, 249]


@pytest.mark.parametrize("count", range(1, 13))
def test_the_default_number_of_steps_was_trained(root: Path, count: int) -> None:
    teacher = make_teacher(root, "sd")
    scheduler = build_scheduler(teacher)
    trained = student_timesteps(scheduler, count)
    steps = turbo_entry(teacher, SIZE, root, count)["num_inference_steps"]
    assert set(student_timesteps(scheduler, steps["default"])) <= set(trained)
    assert steps["max"] == count


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_at_the_last_timestep_as_the_sampler_does_and_else_with_a_noised_picture(
    root: Path, tmp_path: Path, kind: Kind
) -> None:
    adversary = make_distiller(root, tmp_path, kind, "whole").adversary
    scheduler = build_scheduler(make_teacher(root, kind))
    scheduler.set_timesteps(4)
    latents, noise = torch.randn(2, 4, 8, 8), torch.Generator().manual_seed(3)
    drawn = torch.randn(2, 4, 8, 8, generator=noise)
    torch.manual_seed(3)
    begun = adversary.begin(latents, torch.tensor([999, 499]))
    first = scheduler.scale_model_input(drawn * scheduler.init_noise_sigma, scheduler.timesteps[0])
    assert torch.allclose(begun[0], first[0], atol=1e-5)
    noised = adversary.diffusion.add_noise(latents, drawn, torch.tensor([999, 499]))
    assert torch.equal(begun[1], noised[1])


def test_a_teacher_that_predicts_pictures_can_not_be_sampled_so(tmp_path: Path) -> None:
    make_teacher(tmp_path, "sd")
    change_config(tmp_path / "sd" / "scheduler", prediction_type="sample")
    with pytest.raises(TeacherError, match=r"prediction_type is 'sample'.*takes epsilon or v_prediction"):
        build_scheduler(open_teacher(str(tmp_path / "sd"), {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_students_loss_falls_where_the_heads_stand_still(
    root: Path, tmp_path: Path, kind: Kind, mode: Mode
) -> None:
    """A teacher of random weights teaches nothing, so the heads judge alone."""
    add = AddSettings(distillation=0.0, heads_rate=0.0)
    distiller = make_distiller(root, tmp_path, kind, mode, 20, add)
    distiller.trainer.fit(on_one_batch(distiller))
    losses = logged(tmp_path)["adversarial"]
    assert mean(losses[-4:]) < mean(losses[:4]) - 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_teachers_opinion_is_the_distance_to_what_it_makes_of_the_noised_picture(
    root: Path, tmp_path: Path, kind: Kind, guidance: float
) -> None:
    distiller = make_distiller(root, tmp_path, kind, "whole", add=AddSettings(guidance=guidance))
    adversary, rows = distiller.adversary, distiller.batches.draw(distiller.trainer.rng)
    made, diffusion = torch.randn(4, 4, 8, 8, requires_grad=True), distiller.adversary.diffusion
    nothing = distiller.unconditional.spread_over(rows.conditions)
    torch.manual_seed(2)
    with adversary.student.teacher() as teacher:
        loss = adversary.score(teacher, made, rows.conditions, distiller.unconditional)
        (gradient,) = torch.autograd.grad(loss, made)
        torch.manual_seed(2)
        levels = torch.randint(0, 1000, (4,))
        noisy = diffusion.add_noise(made, torch.randn_like(made), levels)
        with torch.no_grad():
            told, untold = (
                diffusion.split(noisy, call_unet(teacher, noisy, levels, conditions), levels)[0]
                for conditions in (rows.conditions, nothing)
            )
    wanted = untold + guidance * (told - untold)
    weights = diffusion.signal[levels][:, None, None, None]
    assert torch.allclose(loss, (weights * (made - wanted) ** 2).mean(), rtol=1e-3)
    assert torch.allclose(gradient, weights * 2 * (made - wanted) / made.numel(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("classifier", [None, make_classifier()], ids=["teacher", "classifier"])
def test_the_heads_loss_falls_where_the_student_stands_still(
    root: Path, tmp_path: Path, classifier: LatentClassifier | None
) -> None:
    distiller = make_distiller(root, tmp_path, "sdxl", "whole", 20, classifier=classifier, rate=0.0)
    for group in distiller.trainer.optimizer.param_groups[1:]:
        group["initial_lr"] = group["lr"] = 3e-3
    distiller.trainer.fit(on_one_batch(distiller))
    heads = logged(tmp_path)["heads"]
    assert mean(heads[-4:]) < 0.5 * mean(heads[:4])


def test_the_student_gets_the_gradient_of_its_loss_through_features_and_heads(root: Path, tmp_path: Path) -> None:
    """The loss is differentiated in two parts; here in one."""
    distiller = make_distiller(root, tmp_path, "sd", "whole")
    ours = gradients(distiller)
    adversary = make_distiller(root, tmp_path / "again", "sd", "whole").adversary
    student = adversary.student
    torch.manual_seed(0)
    distiller.trainer.rng.seed(0)
    batch = distiller.batches.draw(distiller.trainer.rng)
    starts = adversary.draw_starts(4)
    made = adversary.draw(batch, starts)
    levels = adversary.features.draw_levels(4)
    adversary.features.extract(batch.latents, levels, batch.conditions)
    maps = adversary.features.extract(made, levels, batch.conditions)
    summary = adversary.features.summarize(batch.latents, batch.conditions)
    condition = adversary.heads.condition(batch.conditions, summary, adversary.signal_seen(starts), levels)
    with student.teacher() as teacher:
        distilled = adversary.score(teacher, made, batch.conditions, distiller.unconditional)
    loss = deceive(adversary.heads(maps, condition)) + 2.5 * distilled
    theirs = torch.autograd.grad(loss, list(student.unet.parameters()))
    for (name, _), gradient in zip(student.unet.named_parameters(), theirs, strict=True):
        assert torch.allclose(ours[f"student.{name}"], gradient, rtol=1e-3, atol=1e-6), name


def test_the_heads_get_the_gradient_of_theirs_alone(root: Path, tmp_path: Path) -> None:
    distiller = make_distiller(root, tmp_path, "sdxl", "whole", add=AddSettings(r1=0.1))
    ours = gradients(distiller)
    adversary = make_distiller(root, tmp_path / "again", "sdxl", "whole").adversary
    torch.manual_seed(0)
    distiller.trainer.rng.seed(0)
    batch = distiller.batches.draw(distiller.trainer.rng)
    starts = adversary.draw_starts(4)
    with torch.no_grad():
        made = adversary.draw(batch, starts)
        levels = adversary.features.draw_levels(4)
        real = [
            each.requires_grad_(True) for each in adversary.features.extract(batch.latents, levels, batch.conditions)
        ]
        summary = adversary.features.summarize(batch.latents, batch.conditions)
        maps = adversary.features.extract(made, levels, batch.conditions)
    condition = adversary.heads.condition(batch.conditions, summary, adversary.signal_seen(starts), levels)
    adversary.heads(maps, condition)  # for the student; spectral normalization goes on with each call
    logits = adversary.heads(real, condition)
    loss = tell_apart(logits, adversary.heads(maps, condition)) + 0.1 * r1_penalty(real, logits)
    theirs = torch.autograd.grad(loss, list(adversary.heads.parameters()))
    for (name, _), gradient in zip(adversary.heads.named_parameters(), theirs, strict=True):
        assert torch.allclose(ours[f"heads.{name}"], gradient, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("mode", MODES)
def test_what_is_frozen_gets_no_gradient(root: Path, tmp_path: Path, mode: Mode) -> None:
    for classifier in (None, make_classifier()):
        distiller = make_distiller(root, tmp_path / str(classifier is None), "sd", mode, classifier=classifier)
        assert any(bool(gradient.any()) for gradient in gradients(distiller).values())
        with distiller.adversary.student.teacher() as teacher:
            frozen = [weight for name, weight in teacher.named_parameters() if "lora" not in name]
        features = list(classifier.parameters()) if classifier else []
        assert frozen
        assert all(weight.grad is None for weight in [*frozen, *features])


def test_the_penalty_is_what_autograd_makes_of_its_formula_picture_by_picture() -> None:
    torch.manual_seed(0)
    heads, condition = [Head(16, 8), Head(32, 8)], torch.randn(3, 8)
    for head in heads:
        head.eval()  # so that spectral normalization stands still
    maps = [torch.randn(3, 16, 4, 4, requires_grad=True), torch.randn(3, 32, 2, 2, requires_grad=True)]
    penalty = r1_penalty(maps, [head(each, condition) for head, each in zip(heads, maps, strict=True)])
    expected = 0.0
    for head, each in zip(heads, maps, strict=True):
        for row in range(3):
            picture = each[row : row + 1].detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(head(picture, condition[row : row + 1]).sum(), picture)
            expected += float(gradient.square().sum()) / 3
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-4)


def test_the_penalty_is_differentiable_by_the_heads_weights() -> None:
    """A linear head has the penalty h w |weight|^2, and twice that by its weight."""
    linear = nn.Conv2d(5, 1, 1)
    features = torch.randn(2, 5, 3, 4, requires_grad=True)
    penalty = r1_penalty([features], [linear(features)[:, 0]])
    assert torch.allclose(penalty, 12 * linear.weight.square().sum(), rtol=1e-4)
    (gradient,) = torch.autograd.grad(penalty, linear.weight)
    assert torch.allclose(gradient, 24 * linear.weight, rtol=1e-4)


def test_the_weights_of_heads_are_normalized_by_their_largest_singular_value() -> None:
    torch.manual_seed(0)
    head = Head(32, 8)
    for _ in range(30):
        head(torch.randn(1, 32, 4, 4), torch.randn(1, 8))
    head.eval()
    layers: tuple[Any, ...] = (head.entry, head.mix, head.score)
    for layer in layers:
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_judge_by_the_text_and_by_the_original_as_far_as_it_was_seen(
    root: Path, tmp_path: Path, kind: Kind
) -> None:
    distiller = make_distiller(root, tmp_path, kind, "whole")
    condition = distiller.adversary.heads.condition
    rows, levels = distiller.batches.draw(distiller.trainer.rng).conditions, torch.zeros(4, dtype=torch.long)
    nothing = distiller.unconditional.spread_over(rows)
    one, other = (torch.randn(4, distiller.adversary.features.channels[-1]) for _ in range(2))
    unseen, seen = torch.zeros(4), torch.ones(4)
    assert not torch.allclose(condition(rows, one, unseen, levels), condition(nothing, one, unseen, levels))
    assert torch.equal(condition(rows, one, unseen, levels), condition(rows, other, unseen, levels))
    assert not torch.allclose(condition(rows, one, seen, levels), condition(rows, other, seen, levels))
    assert not torch.allclose(condition(rows, one, seen, levels), condition(rows, one, seen, levels + 500))


def test_of_what_began_as_noise_nothing_of_the_original_is_asked_for(root: Path, tmp_path: Path) -> None:
    adversary = make_distiller(root, tmp_path, "sd", "whole").adversary
    seen = adversary.signal_seen(torch.tensor([999, 749, 499, 249]))
    assert float(seen[0]) == 0
    assert torch.equal(seen[1:], adversary.diffusion.signal[[749, 499, 249]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_features_are_what_its_blocks_give_in_a_whole_forward(
    root: Path, tmp_path: Path, kind: Kind
) -> None:
    distiller = make_distiller(root, tmp_path, kind, "whole")
    features, batch = distiller.adversary.features, distiller.batches.draw(distiller.trainer.rng)
    assert isinstance(features, TeacherFeatures)
    levels = torch.tensor([0, 200, 600, 999])
    seen: list[Tensor] = []
    for block in features.unet.down_blocks:
        last = block.attentions[-1] if hasattr(block, "attentions") else block.resnets[-1]
        last.register_forward_hook(
            lambda _m, _i, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    features.unet.mid_block.register_forward_hook(lambda _m, _i, output: seen.append(output))
    torch.manual_seed(5)
    noisy = features.diffusion.add_noise(batch.latents, torch.randn_like(batch.latents), levels)
    with torch.no_grad():
        distiller.adversary._predict(features.unet, noisy, levels, batch.conditions)
        expected, seen = list(seen), []
        torch.manual_seed(5)
        maps = features.extract(batch.latents, levels, batch.conditions)
    assert [each.shape[1] for each in maps] == list(features.channels)
    for one, other in zip(maps, expected, strict=True):
        assert torch.equal(one, other)


def test_noise_levels_are_of_all_timesteps_most_around_the_middle(root: Path, tmp_path: Path) -> None:
    features = make_distiller(root, tmp_path, "sd", "whole").adversary.features
    levels = features.draw_levels(4000).float()
    assert 0 <= float(levels.min()) < 100
    assert 900 < float(levels.max()) <= 999
    assert float(levels.mean()) == pytest.approx(500, abs=20)
    assert float(((levels > 250) & (levels < 750)).float().mean()) == pytest.approx(0.73, abs=0.04)


@pytest.mark.parametrize(
    ("kind", "mode", "classifier"),
    [("sd", "whole", None), ("sdxl", "lora", None), ("sd-v", "whole", make_classifier())],
    ids=["sd-whole", "sdxl-lora", "sd-v-classifier"],
)
def test_a_resumed_run_equals_an_unbroken_one(
    root: Path, tmp_path: Path, kind: Kind, mode: Mode, classifier: LatentClassifier | None
) -> None:
    def run(out: Path, *untils: int | None) -> AddDistiller:
        for until in untils:
            distiller = make_distiller(root, out, kind, mode, steps=6, classifier=classifier)
            distiller.trainer.fit(distiller.loss, until=until)
        return distiller

    unbroken, resumed = run(tmp_path / "unbroken", None), run(tmp_path / "broken", 2, 3, None)
    assert_same_states(unbroken.trainer, resumed.trainer)
    with unbroken.trainer.averaged_weights(), resumed.trainer.averaged_weights():
        assert_same_states(unbroken.trainer, resumed.trainer)


def assert_same_states(one: Trainer, other: Trainer) -> None:
    """Heads and the buffers of their normalization included."""
    states, others = one.model.state_dict(), other.model.state_dict()
    assert any(name.startswith("heads") and name.endswith("_u") for name in states)
    assert states.keys() == others.keys()
    for name, tensor in states.items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_changes_no_gradient(root: Path, tmp_path: Path, mode: Mode) -> None:
    """Not even where one network is student and teacher, which are then computed twice."""
    plain, checkpointed = (make_distiller(root, tmp_path / name, "sd", mode) for name in ("plain", "checkpointed"))
    for distiller in (plain, checkpointed):  # so that LoRA and teacher differ
        distiller.trainer.fit(on_one_batch(distiller), until=2)
    student = checkpointed.adversary.student
    student.unet.enable_gradient_checkpointing()
    with student.teacher() as teacher:
        teacher.enable_gradient_checkpointing()
    for distiller in (plain, checkpointed):
        distiller.trainer.optimizer.zero_grad()
    ours, theirs = gradients(plain), gradients(checkpointed)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-3, atol=1e-6), name


def test_it_learns_in_bfloat16(root: Path, tmp_path: Path) -> None:
    """Frozen weights in bfloat16, trained ones in float32, as on a GPU."""
    distiller = make_distiller(
        root, tmp_path, "sdxl", "lora", 20, AddSettings(distillation=0.0, heads_rate=0.0), Compute(CPU, torch.bfloat16)
    )
    assert {weight.dtype for weight in distiller.trainer.trainable.values()} == {torch.float32}
    with distiller.adversary.student.teacher() as teacher:
        assert teacher.conv_in.weight.dtype == torch.bfloat16
    distiller.trainer.fit(on_one_batch(distiller))
    losses = logged(tmp_path)["adversarial"]
    assert mean(losses[-4:]) < mean(losses[:4]) - 0.1


def test_of_a_lora_the_checkpoint_holds_lora_and_heads_alone(root: Path, tmp_path: Path) -> None:
    distiller = make_distiller(root, tmp_path, "sdxl", "lora", steps=2)
    distiller.distill(lambda: None)
    state = torch.load(tmp_path / RUN / CHECKPOINT, weights_only=True)
    for names in (state["model"], state["averages"]["averages"]):
        assert {"lora" in name for name in names if name.startswith("student.")} == {True}
        assert any(name.startswith("heads.") for name in names)


def test_each_optimizer_is_clipped_by_its_own_norm(tmp_path: Path) -> None:
    small, large = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
    groups: list[dict[str, Any]] = [
        {"params": list(small.parameters())},
        {"params": list(large.parameters()), "clip": 2.0},
    ]
    trainer = Trainer(nn.ModuleDict({"small": small, "large": large}), tmp_path, settings(1), groups)
    trainer.fit(lambda _step: 0.1 * small(torch.ones(3)).sum() + 1000 * large(torch.ones(3)).sum())
    assert small.weight.grad is not None
    assert large.weight.grad is not None
    assert torch.allclose(small.weight.grad, torch.full((1, 3), 0.1))
    assert float(large.weight.grad.norm()) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_result_loads_in_diffusers_and_in_the_service(root: Path, tmp_path: Path, kind: Kind, mode: Mode) -> None:
    teacher, out = make_teacher(root, kind), tmp_path / "my-turbo"
    distiller = make_distiller(root, out, kind, mode, steps=2)
    scheduler = build_scheduler(teacher)

    def save() -> None:
        unet = distiller.adversary.student.unet
        if mode == "lora":
            save_lora(unet, out)
        else:
            pipe = teacher.build_pipeline(copy_unet(unet, torch.float16), scheduler, torch.float16)
            save_pipeline(pipe, out)

    distiller.distill(save)
    entry = turbo_lora_entry(teacher, SIZE, out, 4) if mode == "lora" else turbo_entry(teacher, SIZE, out, 4)
    spec = load_catalog(extra=save_table("my-turbo", entry, tmp_path))["my-turbo"]
    assert (spec.guidance, spec.num_inference_steps.min, spec.num_inference_steps.max) == ("none", 1, 4)
    assert spec.default_scheduler == "euler-ancestral"
    pipe = load_diffusers(spec, CPU, torch.float32)
    if mode == "whole":
        plain = getattr(diffusers, type(pipe).__name__).from_pretrained(out)
        assert isinstance(plain.scheduler, EulerAncestralDiscreteScheduler)
        assert plain.scheduler.config.timestep_spacing == "trailing"
    for steps in (1, 2, 4):
        images = pipe("a red apple", num_inference_steps=steps, guidance_scale=0.0, output_type="np").images
        assert images.shape == (1, 32, 32, 3)
        assert np.isfinite(images).all()
    served = load_pipeline(spec, CPU, torch.float32)
    (conditioning,) = served.encode_prompts(["a red apple"])
    output = served.predict(torch.randn(1, 4, 8, 8), torch.tensor([999]), [conditioning], torch.zeros(1))
    assert bool(output.isfinite().all())
