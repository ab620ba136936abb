"""The look at finished pictures that Stable Diffusion ships: CLIP's view of each, held against embedded concepts.

diffusers' StableDiffusionSafetyChecker is the network and the oracle; its verdicts are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.pipeline import to_device

CARE_MARGIN = 0.01  # a picture that needs special care is blocked this much sooner
DECIMALS = 3  # what diffusers rounds scores to before it asks whether they are above 0

Scores = tuple[Tensor, Tensor]
Fast = Callable[[Callable[..., Scores]], Callable[..., Scores]]


class SafetyChecker:
    """`checker` is diffusers' network on its device, `extractor` the feature extractor that was made for it.

    `fast` may wrap the network, from pictures "b 3 h w" to scores "b care" and "b concepts", as the device likes it.
    """

    def __init__(self, checker: Any, extractor: Any, fast: Fast) -> None:
        self._device, self._dtype = checker.device, checker.dtype
        self._extract = extractor
        self._network = fast(_score_network(checker))
        self._care_thresholds = checker.special_care_embeds_weights.float().cpu().numpy()
        self._concept_thresholds = checker.concept_embeds_weights.float().cpu().numpy()

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[bool]:
        """Which of the pictures "height width 3", which may have different sizes, are blocked."""
        features = self._extract([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
        care, concepts = self._network(to_device(features.to(self._dtype), self._device))
        return self._judge(care.float().cpu().numpy(), concepts.float().cpu().numpy())

    def _judge(self, care: NDArray[np.float32], concepts: NDArray[np.float32]) -> list[bool]:
        """A score that isn't a number is no clean bill."""
        needs_care = (np.round(care - self._care_thresholds, DECIMALS) > 0).any(axis=1, keepdims=True)
        scores = np.round(concepts - self._concept_thresholds + CARE_MARGIN * needs_care, DECIMALS)
        return [bool(blocked) for blocked in (~(scores <= 0)).any(axis=1)]


def _score_network(checker: Any) -> Callable[..., Scores]:
    def network(pixels: Tensor) -> Scores:
        embeds = checker.visual_projection(checker.vision_model(pixels)[1])
        return _cosines(embeds, checker.special_care_embeds), _cosines(embeds, checker.concept_embeds)

    return network


def _cosines(embeds: Tensor, concepts: Tensor) -> Tensor:
    return F.normalize(embeds) @ F.normalize(concepts).T
