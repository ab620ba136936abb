"""A CPU's cores, each with a part of a batch's rows.

Threads that share every small operation wait for each other at the end of each one. Rows don't depend on each other: a
thread takes some of them through the whole network, and the threads meet once. A single row still has all cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

CORES = torch.get_num_threads()  # before any batch was shared: `SharedRows` changes it for whoever asks later

# oneDNN makes a kernel for each operation and number of rows, and keeps 1024: fewer than one model has. When it looks
# for the first one, it reads how many to keep.
KERNEL_CACHE = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


def keep_kernels() -> None:
    """To be called before the first network runs in this process; what the environment says already stands."""
    os.environ.setdefault(*KERNEL_CACHE)


class SharedRows:
    """`num_threads` are all cores unless given. Calls come from one thread, the one that owns the device; its number of
    torch threads stays as the last call left it.

    `expect` tells how many rows the coming calls belong to. Threads that share operations spin for a while when one
    ends; so where a batch is shared by rows, what is computed for one of its rows alone must not wake them.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or CORES
        self._pool = ThreadPoolExecutor(max(1, self.num_threads - 1), thread_name_prefix="rows")
        self._threads_per_row = self.num_threads

    def expect(self, num_rows: int) -> None:
        self._threads_per_row = max(1, self.num_threads // max(1, num_rows))

    def counts(self, max_rows: int) -> list[int]:
        """Row counts that between them give parts of every size there is up to `max_rows`."""
        return [rows for rows in range(1, max_rows + 1) if rows < self.num_threads or rows % self.num_threads == 0]

    def wrap(self, network: Callable[..., Any]) -> Callable[..., Any]:
        """`network` takes tensors with rows first and returns one, or a tuple of them."""

        def shared(*inputs: Tensor) -> Any:
            num_parts = min(self.num_threads // self._threads_per_row, len(inputs[0]))
            parts = list(zip(*(torch.tensor_split(tensor, num_parts) for tensor in inputs), strict=True))
            others = [self._pool.submit(self._run, network, part) for part in parts[1:]]
            try:
                first = self._run(network, parts[0])
            finally:
                wait(others)
            return _join([first, *(other.result() for other in others)])

        return shared

    def _run(self, network: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        if torch.get_num_threads() != self._threads_per_row:
            torch.set_num_threads(self._threads_per_row)  # of the calling thread
        with torch.inference_mode():
            return network(*inputs)


def _join(outputs: list[Any]) -> Any:
    if len(outputs) == 1:
        return outputs[0]
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(column) for column in zip(*outputs, strict=True))
    return torch.cat(outputs)
