"""The diffusion process of the miniature: v-prediction (Salimans & Ho, arXiv 2202.00512) on a schedule with zero
terminal SNR and trailing timesteps (Lin et al., arXiv 2305.08891): sampling starts from pure noise, as training does.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor

NUM_TIMESTEPS = 1000


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule, rescaled to zero terminal SNR."""
    return DDIMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


class Diffusion:
    """Signal and noise shares per timestep, and the conversions between v, x0 and the noise."""

    def __init__(self, scheduler: DDIMScheduler | None = None) -> None:
        alphas = (scheduler or build_scheduler()).alphas_cumprod
        self.signal = alphas.sqrt()
        self.noise = (1 - alphas).sqrt()

    def shares(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise share, `"b 1 1 1"` each."""
        return self.signal[timesteps][:, None, None, None], self.noise[timesteps][:, None, None, None]

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, spread = self.shares(timesteps)
        return signal * clean + spread * noise

    def velocity(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network predicts."""
        signal, spread = self.shares(timesteps)
        return signal * noise - spread * clean

    def split(self, noisy: Tensor, velocity: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and the noise that a predicted velocity stands for."""
        signal, spread = self.shares(timesteps)
        return signal * noisy - spread * velocity, signal * velocity + spread * noisy


def draw_timesteps(count: int, noisy_half: bool) -> Tensor:
    """Uniform timesteps `"b"`; with `noisy_half`, half of them from the noisier half, where layout is decided."""
    timesteps = torch.randint(0, NUM_TIMESTEPS, (count,))
    if noisy_half:
        upper = torch.randint(NUM_TIMESTEPS // 2, NUM_TIMESTEPS, (count,))
        timesteps = torch.where(torch.rand(count) < 0.5, upper, timesteps)
    return timesteps
