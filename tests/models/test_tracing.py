from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.tracing import Traced


@pytest.mark.parametrize("first_rows", [1, 5])
def test_a_recording_computes_the_same_for_any_number_of_rows(network: nn.Sequential, first_rows: int) -> None:
    traced = Traced(network)
    with torch.inference_mode():
        for rows in (first_rows, 1, 2, 7):
            batch = torch.randn(rows, 4, 8, 8)
            assert torch.equal(traced(batch), network(batch))


def test_each_picture_size_has_its_own_recording() -> None:
    """What a network decides by the size of the picture is decided when it is recorded."""

    def network(batch: Tensor) -> Tensor:
        return batch * 2 if batch.shape[-1] > 4 else batch * 3

    traced = Traced(network)
    for side, factor in ((4, 3), (8, 2), (4, 3)):
        batch = torch.ones(3, 1, side, side)
        assert torch.equal(traced(batch), batch * factor)


def test_the_interpreter_is_not_asked_again() -> None:
    calls = []

    def network(batch: Tensor) -> Tensor:
        calls.append(batch.shape)
        return batch + 1

    traced = Traced(network)
    for rows in (1, 2, 3):
        traced(torch.zeros(rows, 2))
    assert len(calls) == 1
