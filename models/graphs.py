"""Networks as CUDA graphs.

In eager mode a GPU waits for the interpreter, which launches a thousand kernels and more one by one. A graph launches
them all in one call. It is bound to the shapes and the memory addresses that it was captured with: each shape has its
own graph, inputs are copied into the buffers of that graph, and weights may change in place but not move.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

MAX_GRAPHS = 64  # six picture sizes at the ten batch sizes of a GPU
NUM_WARM_UP_RUNS = 3  # as many as torch.cuda.make_graphed_callables does

Replay = Callable[[], Any]  # computes anew from the inputs it was captured with, into the same tensors each time
Capture = Callable[[Callable[..., Any], tuple[Tensor, ...]], Replay]
Key = tuple[tuple[torch.Size, torch.dtype], ...]


class Graphed(Generic[T]):
    """`network`, captured when inputs of some shapes are first seen and replayed for them from then on.

    It gives a tensor or a tuple of tensors, and does nothing that waits for the device. All inputs are on one CUDA
    device, with their rows in the first dimension. Above `max_graphs` the graph that was used longest ago is dropped.
    Not thread-safe, and its calls must follow each other on the device, as those on one stream do.
    """

    def __init__(
        self, network: Callable[..., T], *, max_graphs: int = MAX_GRAPHS, capture: Capture | None = None
    ) -> None:
        assert max_graphs >= 1, f"max_graphs must be at least 1, got {max_graphs}"
        self.num_captures = 0
        self._network = network
        self._max_graphs = max_graphs
        self._capture = CudaCapture() if capture is None else capture
        self._recordings: OrderedDict[Key, _Recording] = OrderedDict()

    def __call__(self, *inputs: Tensor) -> T:
        key = _key(inputs)
        if key not in self._recordings:
            self._recordings[key] = self._record(inputs)
        self._recordings.move_to_end(key)
        while len(self._recordings) > self._max_graphs:
            # A capture has just waited for the device, so what is dropped here is not running any more.
            self._recordings.popitem(last=False)
        return cast(T, self._recordings[key].run(inputs))

    def forget(self, inputs: tuple[Tensor, ...]) -> None:
        """Drops the graphs for inputs like these, whatever their number of rows. None of them may be running."""
        for key in [key for key in self._recordings if _without_rows(key) == _without_rows(_key(inputs))]:
            del self._recordings[key]

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recording:
        buffers = _copies(inputs)
        replay = self._capture(self._network, buffers)
        self.num_captures += 1
        return _Recording(buffers, replay)


class CudaCapture:
    """Captures CUDA graphs that share one memory pool.

    They may share it because they run one after the other, inputs lie outside of it, and each output is copied before
    the next graph runs. The capture has a stream of its own: matrix products captured on one stream share scratch
    memory, and another network's graphs may run at the same time.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, network: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Replay:
        device = inputs[0].device
        with torch.cuda.device(device):
            if self._stream is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), cast(Any, torch.cuda).Stream(device)
            return self._record(network, inputs)

    def _record(self, network: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UP_RUNS):  # what libraries do only once must not get into the graph
                network(*inputs)
            # "thread_local": other threads may use CUDA meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = network(*inputs)
        torch.cuda.current_stream().wait_stream(self._stream)

        def replay() -> Any:
            graph.replay()
            return output

        return replay


@dataclass(frozen=True, slots=True)
class _Recording:
    """One graph and the buffers that it reads."""

    buffers: tuple[Tensor, ...]
    replay: Replay

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """A copy of the output, since the next replay overwrites it."""
        for buffer, tensor in zip(self.buffers, inputs, strict=True):
            buffer.copy_(tensor)
        output = self.replay()
        return output.clone() if isinstance(output, Tensor) else tuple(tensor.clone() for tensor in output)


def _key(inputs: tuple[Tensor, ...]) -> Key:
    return tuple((tensor.shape, tensor.dtype) for tensor in inputs)


def _without_rows(key: Key) -> Key:
    return tuple((shape[1:], dtype) for shape, dtype in key)


def _copies(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ordinary tensors even under `inference_mode`: an inference tensor could not be written to outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        return tuple(torch.empty_like(tensor).copy_(tensor) for tensor in inputs)
