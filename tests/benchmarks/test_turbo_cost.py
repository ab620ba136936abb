"""What adversarial distillation takes of memory and time, counted on small networks of the real layers."""

from __future__ import annotations

import pytest

from benchmarks.distill_cost import TRAINED_BYTES
from benchmarks.shared.architectures import SD15, SDXL, Architecture, shrink
from benchmarks.turbo_cost import estimate, make_adversary

SIZE = (128, 128)


@pytest.mark.parametrize("architecture", [shrink(SD15), shrink(SDXL)], ids=["sd", "sdxl"])
@pytest.mark.parametrize("rank", [8, None])
def test_more_pictures_take_more_and_checkpointing_takes_less(architecture: Architecture, rank: int | None) -> None:
    one, four, checkpointed = (
        estimate("small", architecture, SIZE, rank, batch_size, checkpointing)
        for batch_size, checkpointing in ((1, False), (4, False), (4, True))
    )
    assert one.weights == four.weights == checkpointed.weights
    assert one.step < four.step
    assert checkpointed.step < four.step
    assert one.total == one.weights + one.step
    assert four.tflop == pytest.approx(4 * one.tflop, rel=0.01)
    assert checkpointed.tflop > four.tflop
    assert one.a100_h == pytest.approx(4000 * one.tflop / (0.4 * 312) / 3600)


def test_the_heads_are_trained_beside_the_student() -> None:
    adversary = make_adversary(shrink(SD15), None)
    student, heads = (
        sum(weight.numel() for weight in network.parameters()) for network in (adversary.student.unet, adversary.heads)
    )
    counted = estimate("small", shrink(SD15), SIZE, None, 1, False)
    assert counted.trained_millions * 1e6 == student + heads
    assert counted.weights * 2**30 == pytest.approx(2 * student + TRAINED_BYTES * (student + heads))
