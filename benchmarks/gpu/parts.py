"""What the engine asks of a model, part by part, beside what a device at its best would take for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from benchmarks.gpu.report import ParameterRow, PartRow, Report
from benchmarks.gpu.subject import Subject
from benchmarks.shared.architectures import Architecture
from benchmarks.shared.counting import META, Counter
from benchmarks.shared.device import kernel_times, median_ms
from benchmarks.shared.prompts import endless_prompts
from benchmarks.shared.random_weights import Parts, build_parts
from models.catalog import Size
from models.families.base import DiffusersFamily


@dataclass(frozen=True)
class Roofline:
    """A device's best."""

    peak_tflops: float
    peak_tb_per_s: float
    shortest_kernel_us: float

    def ms(self, flops: int, num_bytes: int) -> float:
        """Of whatever takes longer, arithmetic or traffic."""
        return max(flops / (self.peak_tflops * 1e9), num_bytes / (self.peak_tb_per_s * 1e9))

    def floor_ms(self, counter: Counter) -> float:
        return sum(max(self.ms(*kernel), self.shortest_kernel_us / 1000) for kernel in counter.kernels)


class Costs:
    """The arithmetic of each part at one size, counted on a copy of the model that has shapes and no memory."""

    def __init__(self, architecture: Architecture, size: Size, dtype: torch.dtype, roofline: Roofline) -> None:
        self.architecture, self.size, self.dtype, self.roofline = architecture, size, dtype, roofline
        self._counted: dict[int, dict[str, Counter]] = {}
        parts = build_parts(architecture, META, dtype)
        self._pipeline, _ = Subject(architecture, parts, size, "eager", 1, META, dtype).new_pipeline()

    def count(self, batch: int) -> dict[str, Counter]:
        if batch not in self._counted:
            with torch.inference_mode(False):
                calls = part_calls(self._pipeline, self.size, batch)
                self._counted[batch] = {name: count_call(call) for name, call in calls.items()}
        return self._counted[batch]

    def compare(self, subject: Subject, batch: int, part: str, ms: float, kernels: int | None) -> PartRow:
        """What a call took, beside what a device at its best takes for it."""
        counter = self.count(batch)[part]
        floor_ms = self.roofline.floor_ms(counter)
        return PartRow(
            *subject.labels,
            batch=batch,
            part=part,
            ms=ms,
            tflop=counter.flops / 1e12,
            tflop_per_s=counter.flops / ms / 1e9,
            roofline_ms=self.roofline.ms(counter.flops, counter.num_bytes),
            floor_ms=floor_ms,
            times_floor=ms / floor_ms,
            kernels=kernels,
        )


def count_call(call: Callable[[], object]) -> Counter:
    with Counter() as counter:
        call()
    return counter


def part_calls(pipeline: DiffusersFamily, size: Size, batch: int) -> dict[str, Callable[[], object]]:
    """By the names that tables call them."""
    device = pipeline.device
    latents = torch.randn(batch, *pipeline.latent_shape(*size), device=device)
    timesteps, scales = torch.full((batch,), 999.0, device=device), torch.zeros(batch, device=device)
    prompts = list(islice(endless_prompts(seed=1), batch))
    conditionings = pipeline.encode_prompts(prompts)
    return {
        "text": lambda: pipeline.encode_prompts(prompts),
        "step": lambda: pipeline.predict(latents, timesteps, conditionings, scales),
        "full decode": lambda: pipeline.decode(latents),
        "tiny decode": lambda: pipeline.preview(latents),
    }


def count_parameters(architecture: Architecture, parts: Parts) -> Iterator[ParameterRow]:
    for name, network in parts.networks.items():
        parameters = list(network.parameters())
        gib = sum(tensor.numel() * tensor.element_size() for tensor in parameters) / 2**30
        yield ParameterRow(architecture.name, name, sum(tensor.numel() for tensor in parameters) / 1e6, gib)


def measure_parts(subject: Subject, costs: Costs, rounds: int, report: Report) -> Iterator[PartRow]:
    """Up to the first batch that doesn't fit, which lowers the subject's `max_batch`."""
    pipeline, _ = subject.new_pipeline()
    for batch in subject.batches:
        report.check_time()
        try:
            yield from measure_batch(subject, pipeline, costs, batch, rounds)
        except RuntimeError as error:
            if batch == 1:
                raise
            report.skip(f"{subject}, batch {batch} and more", error)
            subject.max_batch = batch // 2
            return


@torch.inference_mode()
def measure_batch(subject: Subject, pipeline: DiffusersFamily, costs: Costs, batch: int, rounds: int) -> list[PartRow]:
    rows = []
    for name, call in part_calls(pipeline, subject.size, batch).items():
        if "decode" in name and batch > 1 and subject.mode != "eager":
            continue  # the engine decodes row by row on a GPU
        ms = median_ms(call, subject.device, rounds)
        kernels = kernel_times(call, subject.device) if batch == 1 else []
        rows.append(costs.compare(subject, batch, name, ms, len(kernels) or None))
    return rows
