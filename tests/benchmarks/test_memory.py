"""The memory that the catalog lists is what the real architectures count up to."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import estimate_all
from benchmarks.shared.counting import META, Peak


def test_a_peak_is_what_lives_at_once() -> None:
    weight = torch.empty(1000, device=META)
    with Peak() as peak:
        values = weight.view(10, 100) * 2  # a view takes nothing
        for _ in range(5):
            values = values + 1
        values.add_(1)
    assert peak.num_bytes == 2 * 4000


@pytest.mark.parametrize("name", ["sd15-lcm", "ssd-1b-lcm", "cm-imagenet64"])
def test_the_catalog_lists_what_was_counted(name: str) -> None:
    (memory,) = estimate_all([name])
    assert memory.listed == memory.memory_gib
    assert 0 < memory.step < memory.weights * 1.5
