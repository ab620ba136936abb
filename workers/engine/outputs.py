"""What a step of the engine gives back. Pixels are uint8 numpy arrays "n height width 3"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from workers.engine.request import RequestState

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PreviewReady:
    """The predicted pictures of a request after its step `step` (from 1)."""

    request: RequestState
    step: int
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Finished:
    request: RequestState
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Blocked:
    """A finished request of whose pictures the safety checker blocked `num_blocked`. It ends without any of them."""

    request: RequestState
    num_blocked: int


@dataclass(frozen=True, slots=True)
class Aborted:
    """A request that was stopped at a step boundary."""

    request: RequestState
    reason: Literal["cancelled", "newer", "lost", "expired"]

    @property
    def is_late(self) -> bool:
        """Whether a step was computed for it after somebody wished to stop it: the one that was under way."""
        return bool(self.request.steps_ms) and self.request.denoised_s > self.request.asked_to_stop_s


@dataclass(frozen=True, slots=True)
class GenerationFailed:
    """A request that failed although it ran alone: `error` is what its computation raised."""

    request: RequestState
    error: Exception


EngineOutput = PreviewReady | Finished | Blocked | Aborted | GenerationFailed
