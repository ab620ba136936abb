"""Adversarial diffusion distillation of every layout, as a whole network and as a LoRA: against its own formulas by
autograd, and against diffusers' scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor, nn

from models.training.add import AddDistiller, AddSettings, build_scheduler, chances, student_timesteps
from models.training.entries import turbo_entry
from models.training.errors import TeacherError
from models.training.features import ClassifierFeatures, TeacherFeatures
from models.training.heads import Head, deceive, r1_penalty, tell_apart
from models.training.lcm import RUN
from models.training.teachers import call_unet, open_teacher
from tests.models.training.distillers import HALF, MODES, Look, Mode, assert_is_half, gradients, make_add
from tests.training_data import (
    KINDS,
    SIZE,
    Kind,
    assert_lower,
    change_config,
    first_and_last,
    make_teacher,
    on_one_batch,
)

HEADS_STAND_STILL = AddSettings(distillation=0.0, heads_rate=0.0)  # and a teacher of random weights teaches nothing


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
    adversary = make_add(root, tmp_path, kind, "whole").adversary
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


@pytest.mark.parametrize(
    ("count", "noise_share", "expected"),
    [(4, None, [0.25] * 4), (4, 0.4, [0.4, 0.2, 0.2, 0.2]), (2, 1.0, [1.0, 0.0]), (1, 0.4, [1.0])],
)
def test_a_share_of_the_pictures_begins_with_noise_alone(
    count: int, noise_share: float | None, expected: list[float]
) -> None:
    assert chances(count, noise_share) == pytest.approx(expected)


def test_starts_are_drawn_with_that_share(root: Path, tmp_path: Path) -> None:
    adversary = make_add(root, tmp_path, "sd", "whole", add=AddSettings(noise_share=0.7)).adversary
    starts = adversary.draw_starts(4000)
    assert set(starts.tolist()) == {999, 749, 499, 249}
    assert abs((starts == 999).float().mean().item() - 0.7) < 0.05


def test_a_teacher_that_predicts_pictures_can_not_be_sampled_so(tmp_path: Path) -> None:
    make_teacher(tmp_path, "sd")
    change_config(tmp_path / "sd" / "scheduler", prediction_type="sample")
    with pytest.raises(TeacherError, match=r"prediction_type is 'sample'.*takes epsilon or v_prediction"):
        build_scheduler(open_teacher(str(tmp_path / "sd"), {}))


def assert_deceives(distiller: AddDistiller, out: Path) -> None:
    """More and more, on one batch."""
    distiller.trainer.fit(on_one_batch(distiller))
    first, last = first_and_last(out / RUN, "adversarial")
    assert last < first - 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_students_loss_falls_where_the_heads_stand_still(
    root: Path, tmp_path: Path, kind: Kind, mode: Mode
) -> None:
    assert_deceives(make_add(root, tmp_path, kind, mode, 20, HEADS_STAND_STILL), tmp_path)


def test_the_students_loss_falls_in_bfloat16_too(root: Path, tmp_path: Path) -> None:
    distiller = make_add(root, tmp_path, "sdxl", "lora", 20, HEADS_STAND_STILL, HALF)
    assert_is_half(distiller)
    assert_deceives(distiller, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_teachers_opinion_is_the_distance_to_what_it_makes_of_the_noised_picture(
    root: Path, tmp_path: Path, kind: Kind, guidance: float
) -> None:
    distiller = make_add(root, tmp_path, kind, "whole", add=AddSettings(guidance=guidance))
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


@pytest.mark.parametrize("look", ["teacher", "classifier"])
def test_the_heads_loss_falls_where_the_student_stands_still(root: Path, tmp_path: Path, look: Look) -> None:
    distiller = make_add(root, tmp_path, "sdxl", "whole", 20, look=look, rate=0.0)
    distiller.trainer.fit(on_one_batch(distiller))
    assert_lower(tmp_path / RUN, 0.5, "heads")


def test_the_student_gets_the_gradient_of_its_loss_through_features_and_heads(root: Path, tmp_path: Path) -> None:
    """The loss is differentiated in two parts; here in one."""
    distiller = make_add(root, tmp_path, "sd", "whole")
    ours = gradients(distiller)
    adversary = make_add(root, tmp_path / "again", "sd", "whole").adversary
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
    distiller = make_add(root, tmp_path, "sdxl", "whole", add=AddSettings(r1=0.1))
    ours = gradients(distiller)
    adversary = make_add(root, tmp_path / "again", "sdxl", "whole").adversary
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


@pytest.mark.parametrize("look", ["teacher", "classifier"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_frozen_gets_no_gradient(root: Path, tmp_path: Path, mode: Mode, look: Look) -> None:
    distiller = make_add(root, tmp_path, "sd", mode, look=look)
    assert any(bool(gradient.any()) for gradient in gradients(distiller).values())
    features = distiller.adversary.features
    assert isinstance(features, ClassifierFeatures | TeacherFeatures)
    seen_through = features.network if isinstance(features, ClassifierFeatures) else features.unet
    with distiller.adversary.student.teacher() as teacher:
        named = [*teacher.named_parameters(), *seen_through.named_parameters()]
    frozen = [weight for name, weight in named if "lora" not in name]
    assert frozen
    assert all(weight.grad is None for weight in frozen)


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
    distiller = make_add(root, tmp_path, kind, "whole")
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
    adversary = make_add(root, tmp_path, "sd", "whole").adversary
    seen = adversary.signal_seen(torch.tensor([999, 749, 499, 249]))
    assert float(seen[0]) == 0
    assert torch.equal(seen[1:], adversary.diffusion.signal[[749, 499, 249]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_features_are_what_its_blocks_give_in_a_whole_forward(
    root: Path, tmp_path: Path, kind: Kind
) -> None:
    distiller = make_add(root, tmp_path, kind, "whole")
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
        call_unet(features.unet, noisy, levels, batch.conditions)
        expected, seen = list(seen), []
        torch.manual_seed(5)
        maps = features.extract(batch.latents, levels, batch.conditions)
    assert [each.shape[1] for each in maps] == list(features.channels)
    for one, other in zip(maps, expected, strict=True):
        assert torch.equal(one, other)


def test_noise_levels_are_of_all_timesteps_most_around_the_middle(root: Path, tmp_path: Path) -> None:
    features = make_add(root, tmp_path, "sd", "whole").adversary.features
    levels = features.draw_levels(4000).float()
    assert 0 <= float(levels.min()) < 100
    assert 900 < float(levels.max()) <= 999
    assert float(levels.mean()) == pytest.approx(500, abs=20)
    assert float(((levels > 250) & (levels < 750)).float().mean()) == pytest.approx(0.73, abs=0.04)
