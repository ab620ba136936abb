"""diffusers' schedulers as the engine uses them: one private copy per request."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal, Protocol

import diffusers
import torch
from torch import Tensor

from models.catalog import SchedulerSpec

SPACINGS = ("leading", "trailing", "linspace")  # of timesteps; some schedulers take any other word for one of these
STEP_INPUTS = (
    "self",
    "model_output",
    "timestep",
    "sample",
    "generator",
    "noise",
    "variance_noise",
    "return_dict",
)  # no settings


class Schedule(Protocol):
    """What the engine uses of a diffusers scheduler, which keeps its step index inside: one per request."""

    timesteps: Tensor
    init_noise_sigma: float | Tensor
    alphas_cumprod: Tensor
    config: Any

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | None = None, **explicit: Any
    ) -> None: ...
    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor: ...
    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **arguments: Any) -> Any: ...


class ScheduleFactory:
    """Makes the private schedulers of one catalog entry's scheduler from the model folder's own scheduler config.

    Raises ValueError for settings of the catalog that the scheduler hasn't got. A folder's config may have them: it was
    written for another scheduler.
    """

    def __init__(self, spec: SchedulerSpec, folder_config: dict[str, Any]) -> None:
        self._timesteps = spec.timesteps
        scheduler_class = getattr(diffusers, spec.class_name)
        accepted = inspect.signature(scheduler_class.step).parameters
        _check_keys(spec, "config", inspect.signature(scheduler_class).parameters)
        _check_keys(spec, "step", [key for key in accepted if key not in STEP_INPUTS])
        _check_spacing(spec)
        self._template: Schedule = scheduler_class.from_config(folder_config, **spec.config)
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
        if explicit := self._timesteps.get(num_inference_steps):
            schedule.set_timesteps(timesteps=explicit, device="cpu")
        else:
            schedule.set_timesteps(num_inference_steps, device="cpu")
        return schedule


def _check_keys(spec: SchedulerSpec, part: Literal["config", "step"], known: Iterable[str]) -> None:
    names = sorted(known)
    for key in getattr(spec, part):
        if key not in names:
            allowed = f"known are {', '.join(names)}" if names else "it takes none"
            raise ValueError(f"{part}: {spec.class_name} has no {key!r}; {allowed}")


def _check_spacing(spec: SchedulerSpec) -> None:
    spacing = spec.config.get("timestep_spacing", SPACINGS[0])
    if spacing not in SPACINGS:
        raise ValueError(f"config: timestep_spacing {spacing!r} is none of {', '.join(SPACINGS)}")


def predict_x0(schedule: Schedule, model_output: Tensor, timestep: Tensor, model_input: Tensor) -> Tensor:
    """The clean latents that the network's output at `timestep` points to, for any scheduler.

    `model_input` is what the network saw, which is variance-preserving whatever the scheduler's own space is:
    x_t = alpha x0 + sigma eps (Ho et al. 2020, eq. 4; v-prediction: Salimans and Ho 2022, section 4). Consistency
    models have rules of their own.
    """
    if isinstance(schedule, diffusers.CMStochasticIterativeScheduler):
        return _consistency_x0(schedule, model_output, float(timestep), model_input)
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


def _consistency_x0(schedule: Any, model_output: Tensor, timestep: float, model_input: Tensor) -> Tensor:
    """f(x, t) = c_skip(t) x + c_out(t) F(x, t) (Song et al. 2023, eq. 5 and appendix C). Timesteps are logarithms of
    sigma, and the network sees x / sqrt(sigma^2 + sigma_data^2)."""
    sigma = math.exp(timestep / 250)
    c_skip, c_out = schedule.get_scalings_for_boundary_condition(sigma)
    sample = model_input * (sigma**2 + schedule.config.sigma_data**2) ** 0.5
    x0: Tensor = c_out * model_output + c_skip * sample
    return x0.clamp(-1, 1) if schedule.config.clip_denoised else x0


def _alpha_sigma(alphas_cumprod: Tensor, timestep: float) -> tuple[float, float]:
    """alpha and sigma at a timestep; between two, sigma / alpha is interpolated, as the sigma schedulers do."""
    below = int(timestep)
    alpha_squared = float(alphas_cumprod[below])
    if timestep != below:
        ratios = ((1 - alphas_cumprod[below : below + 2]) / alphas_cumprod[below : below + 2]).sqrt()
        ratio = float(torch.lerp(ratios[0], ratios[1], timestep - below))
        alpha_squared = 1 / (1 + ratio * ratio)
    return alpha_squared**0.5, (1 - alpha_squared) ** 0.5
