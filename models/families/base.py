"""What all families share: networks run the way that is fast on their device, and a safety checker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.catalog import ModelSpec
from models.compiling.compiler import Compiler
from models.compiling.recipe import Blueprint
from models.compiling.swapping import Swapped
from models.graphs import Graphed
from models.loras import StyleLoras
from models.pipeline import FewStepPipeline
from models.rows import SharedRows
from models.safety import SafetyChecker
from models.tracing import Traced

T = TypeVar("T")


class DiffusersFamily(FewStepPipeline):
    """The parts of a loaded diffusers pipeline. `safety` are a network and a feature extractor for SafetyChecker.

    `scheduler_config` is the model folder's own, which every scheduler of the catalog entry starts from. With
    `cuda_graphs` a GPU replays networks as graphs, one per number of rows: the caller keeps these few. A `compiler`
    compiles what `compiled` is asked for.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        dtype: torch.dtype,
        *,
        safety: tuple[Any, Any] | None = None,
        scheduler_config: dict[str, Any],
        revision: str,
        loras: StyleLoras,
        cuda_graphs: bool = False,
        compiler: Compiler | None = None,
    ) -> None:
        super().__init__(spec, device, dtype, scheduler_config, revision, loras)
        self._has_graphs = cuda_graphs and device.type == "cuda"
        self._compiler = compiler
        self._rows = SharedRows() if device.type == "cpu" else None
        self._safety_checker = None if safety is None else SafetyChecker(*safety, self.fast)

    def fast(self, network: Callable[..., T]) -> Callable[..., T]:
        """On a CPU networks are recorded, since the interpreter is a large part of a small step, and shared by rows."""
        return self._spread(network if self._rows is None else Traced(network))

    def compiled(
        self, make: Callable[..., Callable[..., Tensor]], network: Any, *arguments: Any
    ) -> Callable[..., Tensor]:
        """What `make(network, *arguments)` gives, fast, and compiled once that is done where there is a compiler."""
        usual = self.fast(make(network, *arguments))
        if self._compiler is None:
            return usual
        return Swapped(
            usual,
            Blueprint(make, network, arguments),
            self._compiler,
            model=self.spec.name,
            device=self.device,
            num_threads=1 if self._rows is None else self._rows.num_threads,
            wrap=self._spread,
            forget=usual.forget if isinstance(usual, Graphed) else lambda _: None,
        )

    def _spread(self, network: Callable[..., T]) -> Callable[..., T]:
        """A CPU's batches are shared by rows, a GPU's kernels launched at once."""
        if self._rows is not None:
            return self._rows.wrap(network)
        return Graphed(network) if self._has_graphs else network

    def expect_rows(self, num_rows: int) -> None:
        if self._rows is not None:
            self._rows.expect(num_rows)

    def row_counts(self, max_rows: int) -> list[int]:
        return [] if self._rows is None else self._rows.counts(max_rows)

    def check(self, images: Sequence[NDArray[np.uint8]]) -> list[bool]:
        assert self._safety_checker is not None, f"{self.spec.name} has no safety checker"
        return self._safety_checker(images)
