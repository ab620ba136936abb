"""Networks without their Python.

At batch 1 a miniature network on a CPU spends much of its time in the interpreter, between the operations. A recording
keeps the operations alone. It computes exactly what the network computes, for any number of rows.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.jit._trace import TracerWarning

T = TypeVar("T")

jit: Any = torch._C


class Traced(Generic[T]):
    """`network`, recorded (by TorchScript's tracer) when a picture size is first seen and replayed from then on.

    All inputs have their rows in the first dimension.
    """

    def __init__(self, network: Callable[..., T]) -> None:
        self._network = network
        self._recording = threading.Lock()
        self._recordings: dict[torch.Size, Callable[..., T]] = {}

    def __call__(self, *inputs: Tensor) -> T:
        shape = inputs[0].shape[1:]
        with self._recording:
            if shape not in self._recordings:
                self._recordings[shape] = _record(self._network, inputs)
        return self._recordings[shape](*inputs)


def _record(network: Callable[..., T], inputs: tuple[Tensor, ...]) -> Callable[..., T]:
    """Recorded with two copies of the first row: with a single one, a fixed 1 could not be told from the row count."""
    two_rows = tuple(tensor[:1].repeat(2, *[1] * (tensor.dim() - 1)) for tensor in inputs)
    with warnings.catch_warnings():
        # What depends on the picture's size may be fixed, since each size has its own recording.
        warnings.simplefilter("ignore", TracerWarning)
        # What torch.jit.trace itself does, but that it would keep every recording, and with it the network's weights,
        # for as long as the process lives. Of its successors torch.export keeps the interpreter, and torch.compile
        # takes a minute to start.
        graph, _ = jit._create_graph_by_tracing(network, two_rows, lambda _: "", True, False)
        return cast(Callable[..., T], jit._create_function_from_graph("network", graph))
