from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.graphs import Graphed, Replay

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class CpuCapture:
    """Bound as a CUDA graph is: a replay reads the buffers that it was captured with and writes one tensor."""

    def __init__(self) -> None:
        self.shapes: list[tuple[torch.Size, ...]] = []
        self.buffers: list[weakref.ref[Tensor]] = []

    def __call__(self, network: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Replay:
        self.shapes.append(tuple(tensor.shape for tensor in inputs))
        self.buffers += [weakref.ref(tensor) for tensor in inputs]
        output = network(*inputs)

        def replay() -> Any:
            for old, new in zip(tensors(output), tensors(network(*inputs)), strict=True):
                old.copy_(new)
            return output

        return replay


def tensors(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@pytest.fixture
def capture() -> CpuCapture:
    return CpuCapture()


def add(left: Tensor, right: Tensor) -> Tensor:
    return left + right


def test_each_call_computes_what_the_network_computes(network: nn.Sequential, capture: CpuCapture) -> None:
    graphed = Graphed(network, capture=capture)
    with torch.inference_mode():
        for rows, side in ((1, 8), (2, 8), (1, 8), (2, 4), (2, 8)):
            batch = torch.randn(rows, 4, side, side)
            assert torch.equal(graphed(batch), network(batch))


def test_a_graph_is_captured_once_per_shapes_and_dtypes(capture: CpuCapture) -> None:
    graphed = Graphed(add, capture=capture)
    for rows in (1, 2, 1, 2, 1):
        graphed(torch.zeros(rows, 3), torch.zeros(rows, 1))
    assert capture.shapes == [((1, 3), (1, 1)), ((2, 3), (2, 1))]
    graphed(torch.zeros(1, 3), torch.zeros(1, 3))
    graphed(torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 3))
    assert graphed.num_captures == len(capture.shapes) == 4


def test_an_output_outlives_the_next_call(capture: CpuCapture) -> None:
    graphed = Graphed(add, capture=capture)
    first = graphed(torch.ones(2), torch.ones(2))
    second = graphed(torch.zeros(2), torch.ones(2))
    assert first.tolist() == [2, 2]
    assert second.tolist() == [1, 1]


def test_an_output_may_be_several_tensors(capture: CpuCapture) -> None:
    graphed = Graphed(lambda batch: (batch + 1, batch.sum()), capture=capture)
    first = graphed(torch.ones(2))
    second = graphed(torch.zeros(2))
    assert [tensor.tolist() for tensor in first] == [[2, 2], 2]
    assert [tensor.tolist() for tensor in second] == [[1, 1], 0]


def test_inputs_are_copied_whatever_their_layout(capture: CpuCapture) -> None:
    graphed = Graphed(add, capture=capture)
    given = torch.ones(1).expand(4), torch.arange(8.0)[::2]
    assert graphed(*given).tolist() == [1, 3, 5, 7]
    assert graphed(torch.zeros(4), torch.arange(4.0)).tolist() == [0, 1, 2, 3]
    assert [tensor.tolist() for tensor in given] == [[1] * 4, [0, 2, 4, 6]]


def test_the_graph_used_longest_ago_is_dropped(capture: CpuCapture) -> None:
    graphed = Graphed(add, max_graphs=2, capture=capture)
    for rows in (1, 2, 1, 3, 1, 3):
        graphed(torch.zeros(rows), torch.zeros(rows))
    assert graphed.num_captures == 3
    assert [buffer() is None for buffer in capture.buffers] == [False, False, True, True, False, False]
    graphed(torch.zeros(2), torch.zeros(2))
    assert graphed.num_captures == 4


def test_graphs_of_some_sizes_can_be_dropped_whatever_their_rows(capture: CpuCapture) -> None:
    graphed = Graphed(add, capture=capture)
    for rows, width in ((1, 3), (2, 3), (1, 5)):
        graphed(torch.zeros(rows, width), torch.zeros(rows, 1))
    graphed.forget((torch.zeros(7, 3), torch.zeros(7, 1)))
    assert [buffer() is None for buffer in capture.buffers] == [True, True, True, True, False, False]
    graphed(torch.zeros(1, 5), torch.zeros(1, 1))
    assert graphed.num_captures == 3
    graphed(torch.zeros(1, 3), torch.zeros(1, 1))
    assert graphed.num_captures == 4


@pytest.mark.parametrize("captured_in_inference_mode", [True, False])
def test_a_graph_serves_inside_and_outside_of_inference_mode(captured_in_inference_mode: bool) -> None:
    graphed = Graphed(torch.neg, capture=lambda network, inputs: lambda: network(*inputs))
    for inference_mode in (captured_in_inference_mode, not captured_in_inference_mode):
        with torch.inference_mode(inference_mode):
            assert graphed(torch.ones(2)).tolist() == [-1, -1]
    assert graphed.num_captures == 1


def test_a_failed_capture_is_tried_again(capture: CpuCapture) -> None:
    is_broken = True

    def network(batch: Tensor) -> Tensor:
        if is_broken:
            raise RuntimeError("no memory")
        return batch + 1

    graphed = Graphed(network, capture=capture)
    with pytest.raises(RuntimeError, match="no memory"):
        graphed(torch.zeros(1))
    is_broken = False
    assert graphed(torch.zeros(1)).tolist() == [1]
    assert graphed.num_captures == 1


@needs_cuda
def test_on_cuda_a_graph_computes_what_the_network_computes(network: nn.Sequential) -> None:
    network.to("cuda")
    graphed = Graphed(network, max_graphs=2)
    with torch.inference_mode():
        kept = []
        for rows in (2, 1, 2, 3, 2, 1):
            batch = torch.randn(rows, 4, 8, 8, device="cuda")
            kept.append((graphed(batch), network(batch)))
        for output, wanted in kept:
            torch.testing.assert_close(output, wanted)
    assert graphed.num_captures == 4


@needs_cuda
def test_on_cuda_the_interpreter_is_not_asked_again() -> None:
    calls = []

    def network(batch: Tensor) -> Tensor:
        calls.append(batch.shape)
        return batch + 1

    graphed = Graphed(network)
    graphed(torch.zeros(2, device="cuda"))
    num_calls = len(calls)
    assert graphed(torch.ones(2, device="cuda")).tolist() == [2, 2]
    assert len(calls) == num_calls
