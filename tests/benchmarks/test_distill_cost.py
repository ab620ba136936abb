"""What a distillation takes of memory and time, counted on small networks of the real layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.distill_cost import TRAINED_BYTES, Autocast, estimate, make_student
from benchmarks.shared.architectures import SD15, SDXL, Architecture, shrink
from benchmarks.shared.counting import Peak

SIZE = (128, 128)
SHALLOW_SDXL = replace(shrink(SDXL), unet=shrink(SDXL).unet | {"transformer_layers_per_block": 1})


@pytest.mark.parametrize("architecture", [shrink(SD15), SHALLOW_SDXL], ids=["sd", "sdxl"])
@pytest.mark.parametrize("rank", [8, None])
def test_more_pictures_take_more_and_checkpointing_takes_less(architecture: Architecture, rank: int | None) -> None:
    one, four, checkpointed = (
        estimate("small", architecture, SIZE, rank, batch_size, checkpointing)
        for batch_size, checkpointing in ((1, False), (4, False), (4, True))
    )
    assert one.weights == four.weights == checkpointed.weights
    assert one.step < four.step < 4 * one.step
    assert checkpointed.step < four.step
    assert one.total == one.weights + one.step
    assert four.tflop == pytest.approx(4 * one.tflop, rel=0.01)
    assert checkpointed.tflop > four.tflop
    assert one.a100_h == pytest.approx(4000 * one.tflop / (0.4 * 312) / 3600)


def test_of_a_lora_only_the_lora_is_trained() -> None:
    whole, lora = (estimate("small", shrink(SD15), SIZE, rank, 1, False) for rank in (None, 8))
    num_weights = sum(weight.numel() for weight in make_student(shrink(SD15), None).unet.parameters())
    assert whole.trained_millions * 1e6 == num_weights
    assert 0 < lora.trained_millions < whole.trained_millions
    frozen = lora.weights * 2**30 - lora.trained_millions * 1e6 * TRAINED_BYTES
    guidance_input = 256 * 32
    assert frozen == pytest.approx(2 * (num_weights - guidance_input))


def test_gradients_are_followed() -> None:
    weight = torch.empty(1000, device="meta", requires_grad=True)
    with Peak(is_training=True) as peak:
        (weight * 2).sum().backward()  # type: ignore[no-untyped-call]
    assert 4000 < peak.num_bytes < 8100


def test_arithmetic_is_that_of_the_forward_and_the_backward_pass() -> None:
    rows, weight = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((10, 20), (20, 30)))
    with Peak(is_training=True) as step:
        (rows @ weight).sum().backward()  # type: ignore[no-untyped-call]
    assert step.flops == 3 * 2 * 10 * 20 * 30


def test_attention_counts_as_one_kernel_that_keeps_no_scores() -> None:
    heads, tokens, width = 2, 256, 8
    query, key, value = (torch.empty(1, heads, tokens, width, device="meta", requires_grad=True) for _ in range(3))
    with Peak(is_training=True) as step, Autocast():
        F.scaled_dot_product_attention(query, key, value).sum().backward()  # type: ignore[no-untyped-call]
    forward = 2 * 2 * heads * tokens**2 * width
    assert step.flops == 3.5 * forward  # backwards the scores are computed again, and four products more
    assert step.num_bytes < 2 * heads * tokens**2
