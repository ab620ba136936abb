"""diffusers' schedulers as the engine uses them: one private copy per request."""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor

from models.catalog import SchedulerSpec


class Schedule(Protocol):
    """What the engine uses of a diffusers scheduler, which keeps its step index inside: one per request."""

    timesteps: Tensor
    init_noise_sigma: float | Tensor
    alphas_cumprod: Tensor
    config: Any

    def set_timesteps(self, num_inference_steps: int, device: str) -> None: ...
    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...
    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **arguments: Any) -> Any: ...


class ScheduleFactory:
    """Makes the private schedulers of one catalog entry's scheduler from the model folder's own scheduler config."""

    def __init__(self, spec: SchedulerSpec, folder_config: dict[str, Any]) -> None:
        self._template: Schedule = getattr(diffusers, spec.class_name).from_config(folder_config, **spec.config)
        accepted = inspect.signature(self._template.step).parameters
        self._prepared = lru_cache(maxsize=256)(self._set_timesteps)
        self.takes_generator = "generator" in accepted
        # As diffusers' pipelines do: eta 0 for whoever takes one, unless the catalog says else.
        self.step_arguments = {key: value for key, value in {"eta": 0.0, **spec.step}.items() if key in accepted}

    def new(self, num_inference_steps: int) -> Schedule:
        """A scheduler set to `num_inference_steps`, its tables on the CPU. Raises ValueError for counts it can't do."""
        template = self._prepared(num_inference_steps)
        tables = {id(value): value for value in vars(template).values() if isinstance(value, Tensor)}
        return copy.deepcopy(template, tables)  # all but the tables, which no scheduler writes into

    def _set_timesteps(self, num_inference_steps: int) -> Schedule:
        schedule = copy.deepcopy(self._template)
        schedule.set_timesteps(num_inference_steps, device="cpu")
        return schedule


def predict_x0(schedule: Schedule, model_output: Tensor, timestep: Tensor, model_input: Tensor) -> Tensor:
    """The clean latents that the network's output at `timestep` points to, for any scheduler.

    `model_input` is what the network saw, which is variance-preserving whatever the scheduler's own space is:
    x_t = alpha x0 + sigma eps (Ho et al. 2020, eq. 4; v-prediction: Salimans and Ho 2022, section 4).
    """
    alpha, sigma = _alpha_sigma(schedule.alphas_cumprod, float(timestep))
    match schedule.config.prediction_type:
        case "epsilon":
            return (model_input - sigma * model_output) / alpha
        case "v_prediction":
            return alpha * model_input - sigma * model_output
        case "sample":
            return model_output
        case unknown:
            raise ValueError(f"prediction_type {unknown!r} is none of epsilon, v_prediction, sample")


def _alpha_sigma(alphas_cumprod: Tensor, timestep: float) -> tuple[float, float]:
    """alpha and sigma at a timestep; between two, sigma / alpha is interpolated, as the sigma schedulers do."""
    below = int(timestep)
    alpha_squared = float(alphas_cumprod[below])
    if timestep != below:
        ratios = ((1 - alphas_cumprod[below : below + 2]) / alphas_cumprod[below : below + 2]).sqrt()
        ratio = float(torch.lerp(ratios[0], ratios[1], timestep - below))
        alpha_squared = 1 / (1 + ratio * ratio)
    return alpha_squared**0.5, (1 - alpha_squared) ** 0.5
