"""predict_x0 is held against the four schedulers that give their own prediction."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import diffusers
import pytest
import torch

from models.catalog import SchedulerSpec, load_catalog
from models.catalog.specs import TAKES_TIMESTEPS, SchedulerClass
from models.schedules import ScheduleFactory, predict_x0

FOLDER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
CLASSES = ("LCMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("class_name", CLASSES)
def test_x0_is_what_the_scheduler_predicts(class_name: str, spacing: str, prediction_type: str) -> None:
    config = FOLDER | {"prediction_type": prediction_type, "timestep_spacing": spacing}
    schedule = ScheduleFactory(SchedulerSpec(class_name=class_name), config).new(4)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator) * schedule.init_noise_sigma
    for timestep in schedule.timesteps:
        model_input = schedule.scale_model_input(sample, timestep)
        output = torch.randn(1, 4, 8, 8, generator=generator)
        x0 = predict_x0(schedule, output, timestep, model_input)
        step = schedule.step(output, timestep, sample)
        expected = step.denoised if class_name == "LCMScheduler" else step.pred_original_sample
        # LCM's boundary scalings (c_skip, c_out) move its prediction by up to 1e-4 of its size at small timesteps.
        torch.testing.assert_close(x0, expected, rtol=1e-3, atol=2e-2)
        sample = step.prev_sample


@pytest.mark.parametrize("clip_denoised", [True, False])
def test_x0_of_a_consistency_model_is_what_its_scheduler_adds_noise_to(clip_denoised: bool) -> None:
    """The scheduler keeps its denoised value to itself, but a single step, which adds no noise, returns it."""
    spec = SchedulerSpec(class_name="CMStochasticIterativeScheduler", config={"clip_denoised": clip_denoised})
    generator = torch.Generator().manual_seed(0)
    for number in range(0, 40, 3):
        schedule = ScheduleFactory(spec.model_copy(update={"timesteps": {1: [number]}}), {}).new(1)
        (timestep,) = schedule.timesteps
        sample = torch.randn(1, 3, 8, 8, generator=generator)
        model_input = schedule.scale_model_input(sample, timestep)
        output = torch.randn(1, 3, 8, 8, generator=generator)
        x0 = predict_x0(schedule, output, timestep, model_input)
        torch.testing.assert_close(x0, schedule.step(output, timestep, sample).prev_sample, rtol=1e-4, atol=1e-5)


def test_timesteps_of_the_catalog_stand_for_their_number_of_steps() -> None:
    spec = SchedulerSpec(class_name="CMStochasticIterativeScheduler", timesteps={2: [22, 0]})
    listed, even = ScheduleFactory(spec, {}), ScheduleFactory(spec.model_copy(update={"timesteps": {}}), {})
    wanted = diffusers.CMStochasticIterativeScheduler()
    wanted.set_timesteps(timesteps=[22, 0])
    assert listed.new(2).timesteps.tolist() == wanted.timesteps.tolist()
    assert listed.new(2).timesteps.tolist() != even.new(2).timesteps.tolist()
    assert listed.new(3).timesteps.tolist() == even.new(3).timesteps.tolist()


def test_who_takes_timesteps() -> None:
    takes = [
        class_name
        for class_name in get_args(SchedulerClass)
        if "timesteps" in inspect.signature(getattr(diffusers, class_name).set_timesteps).parameters
    ]
    assert tuple(takes) == TAKES_TIMESTEPS


def test_each_request_has_its_own() -> None:
    factory = ScheduleFactory(SchedulerSpec(class_name="DPMSolverMultistepScheduler"), FOLDER)
    one, other = factory.new(4), factory.new(4)
    sample = torch.ones(1, 4, 2, 2)
    for timestep in one.timesteps:
        sample = one.step(sample, timestep, sample).prev_sample
    other.step(sample, other.timesteps[0], sample)  # would raise, had it shared the step index


def test_eta_is_zero_unless_the_catalog_says_else() -> None:
    assert ScheduleFactory(SchedulerSpec(class_name="TCDScheduler"), FOLDER).step_arguments == {"eta": 0.0}
    spec = SchedulerSpec(class_name="TCDScheduler", step={"eta": 0.3})
    assert ScheduleFactory(spec, FOLDER).step_arguments == {"eta": 0.3}
    assert ScheduleFactory(SchedulerSpec(class_name="LCMScheduler"), FOLDER).step_arguments == {}


@pytest.mark.parametrize(
    ("class_name", "changes", "message"),
    [
        (
            "LCMScheduler",
            {"config": {"timestep_spacin": "trailing"}},
            "config: LCMScheduler has no 'timestep_spacin'; .*",
        ),
        ("TCDScheduler", {"step": {"etta": 0.3}}, "step: TCDScheduler has no 'etta'; known are eta$"),
        ("LCMScheduler", {"step": {"eta": 0.3}}, "step: LCMScheduler has no 'eta'; it takes none"),
        ("DDIMScheduler", {"step": {"sample": 0}}, "step: DDIMScheduler has no 'sample'"),
        (
            "EulerDiscreteScheduler",
            {"config": {"timestep_spacing": "even"}},
            "'even' is none of leading, trailing, lin",
        ),
    ],
)
def test_settings_that_a_scheduler_has_not_got(class_name: str, changes: dict[str, Any], message: str) -> None:
    spec = SchedulerSpec.model_validate({"class_name": class_name} | changes)
    with pytest.raises(ValueError, match=message):
        ScheduleFactory(spec, FOLDER)


def test_a_folder_may_have_settings_of_another_scheduler() -> None:
    ScheduleFactory(SchedulerSpec(class_name="LCMScheduler"), FOLDER | {"skip_prk_steps": True})


def test_every_scheduler_of_the_shipped_catalog_takes_its_settings() -> None:
    for spec in load_catalog().values():
        for scheduler in spec.schedulers.values():
            ScheduleFactory(scheduler, {})


def test_an_unknown_prediction_type_is_named() -> None:
    schedule = ScheduleFactory(SchedulerSpec(class_name="DDIMScheduler"), FOLDER | {"prediction_type": "flow"}).new(4)
    with pytest.raises(ValueError, match="prediction_type 'flow'"):
        predict_x0(schedule, torch.ones(1), schedule.timesteps[0], torch.ones(1))
