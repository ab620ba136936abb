"""What a network predicts, and what follows from it: against diffusers' own arithmetic."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler

from models.training.diffusion import Diffusion, PredictionType, build_scheduler, draw_timesteps


def make_scheduler(prediction_type: str, zero_snr: bool = False) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        clip_sample=False,
        set_alpha_to_one=False,
    )


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_a_perfect_prediction_gives_back_picture_and_noise(prediction_type: str) -> None:
    diffusion = Diffusion(make_scheduler(prediction_type))
    clean, noise, timesteps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    noisy = diffusion.add_noise(clean, noise, timesteps)
    output = diffusion.target(clean, noise, timesteps)
    found_clean, found_noise = diffusion.split(noisy, output, timesteps)
    assert torch.allclose(found_clean, clean, atol=1e-4)
    assert torch.allclose(found_noise, noise, atol=1e-4)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@pytest.mark.parametrize(("start", "end"), [(999, 979), (499, 299), (19, 0)])
def test_a_step_is_ddims_own(prediction_type: str, start: int, end: int) -> None:
    scheduler = make_scheduler(prediction_type)
    scheduler.set_timesteps(1000 // (start - end) if start > 19 else 1000 // 19)
    diffusion = Diffusion(scheduler)
    noisy, output = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    clean, noise = diffusion.split(noisy, output, torch.tensor([start]))
    signal, spread = diffusion.shares(torch.tensor([start - 1000 // scheduler.num_inference_steps]))
    theirs = scheduler.step(output, start, noisy).prev_sample
    assert torch.allclose(signal * clean + spread * noise, theirs, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_last_timestep_of_pure_noise_gives_finite_numbers(prediction_type: str) -> None:
    diffusion = Diffusion(make_scheduler(prediction_type, zero_snr=True))
    assert float(diffusion.signal[-1]) == 0
    for part in diffusion.split(torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([999])):
        assert bool(part.isfinite().all())


def test_noise_tells_nothing_of_a_picture_where_there_is_only_noise() -> None:
    with pytest.raises(ValueError, match="prediction_type is epsilon, but the last timestep is pure noise"):
        Diffusion(make_scheduler("epsilon", zero_snr=True))


def test_an_unknown_prediction_is_named() -> None:
    scheduler = make_scheduler("epsilon")
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="'flow' is none of epsilon, v_prediction, sample"):
        Diffusion(scheduler)


def test_the_miniatures_schedule_ends_in_pure_noise() -> None:
    assert float(Diffusion(build_scheduler()).signal[-1]) == 0


@pytest.mark.parametrize(("noisy_half", "noisy_share"), [(False, 0.5), (True, 0.75)])
def test_each_batch_of_timesteps_is_spread_evenly(noisy_half: bool, noisy_share: float) -> None:
    batches = torch.stack([draw_timesteps(40, noisy_half) for _ in range(200)])
    seen = set(batches.flatten().tolist())
    assert seen <= set(range(1000))
    assert len(seen) > 900
    noisy = (batches >= 500).sum(dim=1)
    assert bool((noisy - 40 * noisy_share).abs().le(1).all())
