"""The diffusion process of a teacher: x_t = signal x0 + noise eps (Ho et al., arXiv 2006.11239, eq. 4), and what its
network predicts of it: the noise, v = signal eps - noise x0 (Salimans & Ho, arXiv 2202.00512, section 4), or x0.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from diffusers import DDIMScheduler
from torch import Tensor

NUM_TIMESTEPS = 1000

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def build_scheduler() -> DDIMScheduler:
    """The miniature's: Stable Diffusion's schedule, rescaled to zero terminal SNR, with trailing timesteps (Lin et al.,
    arXiv 2305.08891). Sampling starts from pure noise, as training does."""
    return DDIMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )


class Diffusion:
    """Signal and noise shares per timestep, and the conversions between the network's output, x0 and the noise.

    `scheduler` is any of diffusers' that has `alphas_cumprod`. Raises ValueError where no x0 can be told from what the
    network predicts.
    """

    def __init__(self, scheduler: Any | None = None, device: torch.device | None = None) -> None:
        scheduler = scheduler or build_scheduler()
        self.prediction_type = _known_prediction(scheduler.config.prediction_type)
        alphas = scheduler.alphas_cumprod.to(device)
        self.num_timesteps = len(alphas)
        self.signal = alphas.sqrt()
        self.noise = (1 - alphas).sqrt()
        if self.prediction_type == "epsilon" and float(self.signal[-1]) == 0:
            raise ValueError(
                "prediction_type is epsilon, but the last timestep is pure noise (rescale_betas_zero_snr), "
                "of which the noise tells no picture: v_prediction or sample is needed"
            )

    def shares(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise share, `"b 1 1 1"` each."""
        return self.signal[timesteps][:, None, None, None], self.noise[timesteps][:, None, None, None]

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal, spread = self.shares(timesteps)
        return signal * clean + spread * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect network would predict."""
        signal, spread = self.shares(timesteps)
        match self.prediction_type:
            case "epsilon":
                return noise
            case "v_prediction":
                return signal * noise - spread * clean
            case "sample":
                return clean

    def split(self, noisy: Tensor, output: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and the noise that the network's output stands for."""
        signal, spread = self.shares(timesteps)
        match self.prediction_type:
            case "epsilon":
                return (noisy - spread * output) / signal, output
            case "v_prediction":
                return signal * noisy - spread * output, signal * output + spread * noisy
            case "sample":
                return output, (noisy - signal * output) / spread


def _known_prediction(name: str) -> PredictionType:
    if name not in get_args(PredictionType):
        raise ValueError(f"prediction_type {name!r} is none of {', '.join(get_args(PredictionType))}")
    return cast(PredictionType, name)


def draw_timesteps(count: int, noisy_half: bool) -> Tensor:
    """Uniform timesteps `"b"`; with `noisy_half`, half of them from the noisier half, where layout is decided.

    They are spread evenly over each batch, from a random start, so that the loss varies less from batch to batch
    (the low-discrepancy sampler of variational diffusion models, Kingma et al., arXiv 2107.00630).
    """
    shares = (torch.arange(count) + torch.rand(())) / count
    if noisy_half:
        shares = torch.where(shares < 0.25, 2 * shares, (1 + 2 * shares) / 3)
    return (shares * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)
