"""What is measured: one architecture at one size in one mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.shared.architectures import Architecture
from benchmarks.shared.random_weights import Parts
from models.catalog import ModelSpec, Range, Size, StepRange
from models.families.base import DiffusersFamily
from models.graphs import Capture, Graphed, Replay
from models.loading import FAMILIES
from models.loras import StyleLoras

Mode = Literal["eager", "graphs", "compiled"]
MODES: tuple[Mode, ...] = ("eager", "graphs", "compiled")
Graphs = dict[str, Graphed[Any]]


@dataclass
class Subject:
    """`max_batch` is lowered to what was found to fit."""

    architecture: Architecture
    parts: Parts
    size: Size
    mode: Mode
    max_batch: int
    device: torch.device
    dtype: torch.dtype
    compile_mode: str = "default"

    def __str__(self) -> str:
        return " ".join(self.labels)

    @property
    def labels(self) -> tuple[str, str, str]:
        """The first three columns of its rows."""
        return self.architecture.name, format_size(self.size), self.mode

    @property
    def batches(self) -> list[int]:
        return [2**power for power in range(self.max_batch.bit_length())]

    def make_spec(self, max_batch_size: int) -> ModelSpec:
        """A catalog entry for this size alone. Guidance is allowed where a guided request's two rows fit."""
        return ModelSpec(
            name=self.architecture.name,
            description="random weights",
            family=self.architecture.family,
            source="random weights",
            license="none",
            schedulers={"default": self.architecture.scheduler},
            default_scheduler="default",
            num_inference_steps=StepRange(default=self.architecture.steps, min=1, max=8),
            guidance_scale=Range(default=0, min=0, max=2 if max_batch_size > 1 else 1),
            sizes=[self.size],
            warm_sizes=[self.size],
            max_batch_size=max_batch_size,
            max_num_images=1,
        )

    def new_pipeline(self) -> tuple[DiffusersFamily, Graphs]:
        """The family's own pipeline, nothing captured yet, and its networks where they are captured."""
        graphs: Graphs = {}
        kind = FAMILIES[self.architecture.family].kind
        in_mode = type(kind.__name__, (kind,), {"fast": lambda _, network: self._fast(network, graphs)})
        pipeline: DiffusersFamily = in_mode(
            self.make_spec(self.max_batch),
            self.device,
            self.dtype,
            pipe=self.parts.pipe,
            tiny_vae=self.parts.tiny_vae,
            scheduler_config=dict(self.parts.pipe.scheduler.config),
            revision="random weights",
            loras=StyleLoras(self.architecture.name, {}, self.device),
        )
        return pipeline, graphs

    def _fast(self, network: Callable[..., Any], graphs: Graphs) -> Callable[..., Any]:
        if self.mode == "eager":
            return network
        name = f"{len(graphs) + 1} {network.__qualname__.split('.')[0].strip('_')}"
        if self.mode == "compiled":
            network = torch.compile(network, mode=self.compile_mode, dynamic=False)
        graphs[name] = Graphed(network, capture=capture_for(self.device))
        return graphs[name]


def capture_for(device: torch.device) -> Capture | None:
    """Without CUDA there are no graphs: the network runs, and only the bookkeeping around it is tried."""

    def run_again(network: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Replay:
        return lambda: network(*inputs)

    return None if device.type == "cuda" else run_again


def fair_batch(architecture: Architecture, size: Size, max_batch: int) -> int:
    """As many pixels at each size; `max_batch` is for the smallest."""
    (width, height), (smallest_width, smallest_height) = size, architecture.sizes[0]
    return max(1, max_batch * smallest_width * smallest_height // (width * height))


def format_size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
