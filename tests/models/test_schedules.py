"""predict_x0 is held against the four schedulers that give their own prediction."""

from __future__ import annotations

import pytest
import torch

from models.catalog import SchedulerSpec
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


def test_an_unknown_prediction_type_is_named() -> None:
    schedule = ScheduleFactory(SchedulerSpec(class_name="DDIMScheduler"), FOLDER | {"prediction_type": "flow"}).new(4)
    with pytest.raises(ValueError, match="prediction_type 'flow'"):
        predict_x0(schedule, torch.ones(1), schedule.timesteps[0], torch.ones(1))
