"""The real architectures at full size with random weights, part by part and through the engine, on one GPU.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --tiny     # the same program on miniatures, to try it without a GPU

Each architecture runs at each of its picture sizes in each mode: `eager`; `graphs`, every network as CUDA graphs;
`compiled`, the same after torch.compile. The engine is the service's own, and its warm-up must pass first.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import random
import signal
import statistics
import sys
import time
import warnings
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.architectures import ARCHITECTURES, Architecture, shrink
from benchmarks.counting import META, Attention, Counter
from benchmarks.diffusers_loop import hush_libraries
from benchmarks.machine import REPOSITORY, cpu_name
from benchmarks.prompts import endless_prompts
from benchmarks.random_weights import Parts, build_parts
from benchmarks.report import print_table
from broker.messages import Decoder, Delivery, Job
from models.catalog import ModelSpec, Range, Size, StepRange
from models.families.base import DiffusersFamily
from models.graphs import Capture, Graphed, Replay
from models.loading import FAMILIES, default_device
from models.loras import StyleLoras
from workers.engine import Engine, Finished, GenerationFailed
from workers.engine.calibration import WarmUpError, batch_sizes, warm_up
from workers.engine.engine import run_until_done
from workers.engine.jobs import make_job
from workers.engine.runner import ModelRunner
from workers.images import encode_picture

Mode = Literal["eager", "graphs", "compiled"]
DEFAULT_ARCHITECTURES = ("sdxl-turbo", "sd15-lcm", "sd-turbo")
MODES: tuple[Mode, ...] = ("eager", "graphs", "compiled")
DECODERS: tuple[Decoder, ...] = ("full", "tiny")
STEPS = (1, 2, 4)
ENCODE_THREADS = 2  # the worker's default
MAX_CALL_S = 1.0  # the time that one figure may take once it has its fewest rounds
MIN_ROUNDS = 3
NUM_WAVES = 8
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)  # as AttentionRow has them
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "pillow", "numpy")


# What is measured


@dataclass(frozen=True)
class ParameterRow:
    architecture: str
    network: str
    millions: float
    gib: float


@dataclass(frozen=True)
class PartRow:
    """One call of one part, waited for.

    `roofline_ms` is what all its FLOPs, or all its bytes, take at the device's best. `floor_ms` adds that up operation
    by operation, none of them under the shortest kernel's time; torch.compile makes fewer of them. `kernels` are those
    that the device ran.
    """

    architecture: str
    size: str
    mode: str
    batch: int
    part: str
    ms: float
    tflop: float
    tflop_per_s: float
    roofline_ms: float
    floor_ms: float
    times_floor: float
    kernels: int | None


@dataclass(frozen=True)
class WarmUpRow:
    """What the service's own warm-up measured, which admission goes by, beside the part measured alone."""

    architecture: str
    size: str
    mode: str
    batch: int
    step_ms: float
    decode_ms: float
    preview_ms: float
    text_ms: float
    max_rows: int


@dataclass(frozen=True)
class LatencyRow:
    """One picture of a new prompt, from the engine's `add` to the bytes of its JPEG."""

    architecture: str
    size: str
    mode: str
    decoder: str
    steps: int
    total_ms: float
    slowest_ms: float
    jpeg_ms: float
    jpeg_kib: float


@dataclass(frozen=True)
class ThroughputRow:
    """Pictures of new prompts in full batches, JPEGs included. Memory is the highest since the row's start."""

    architecture: str
    size: str
    mode: str
    batch: int
    steps: int
    images_per_s: float
    allocated_gib: float
    reserved_gib: float


@dataclass(frozen=True)
class CaptureRow:
    """Graphs captured by the end of warm-up, and by the end of a run of varied requests."""

    architecture: str
    size: str
    mode: str
    network: str
    after_warm_up: int
    after_varied: int


@dataclass(frozen=True)
class AttentionRow:
    """One shape of attention in one part: how often, what torch chose for it, and what each backend takes for one."""

    architecture: str
    size: str
    part: str
    count: int
    query: str
    key: str
    causal: bool
    mask: bool
    chosen: str
    default_ms: float
    flash_ms: float | None
    efficient_ms: float | None
    cudnn_ms: float | None
    math_ms: float | None


@dataclass(frozen=True)
class SkippedRow:
    what: str
    why: str


ROW_TYPES = (
    ParameterRow, PartRow, WarmUpRow, LatencyRow, ThroughputRow, CaptureRow, AttentionRow, SkippedRow,
)  # fmt: skip


@dataclass
class Report:
    """Rows of all tables as they come; what couldn't be measured is a row too."""

    machine: dict[str, object]
    rows: list[Any] = field(default_factory=list)

    def add(self, *rows: Any) -> None:
        self.rows += rows

    def add_each(self, rows: Iterable[Any]) -> None:
        """As they come, so that those before a failure are kept."""
        for row in rows:
            self.add(row)

    def of(self, kind: type[Any]) -> list[Any]:
        return [row for row in self.rows if isinstance(row, kind)]

    def print(self) -> None:
        print(json.dumps(self.machine, indent=2), end="\n\n")
        for kind in ROW_TYPES:
            if rows := self.of(kind):
                print(f"### {kind.__name__.removesuffix('Row')}\n")
                print_table(rows)

    def write(self, path: Path, settings: dict[str, str]) -> None:
        tables = {
            kind.__name__.removesuffix("Row").lower(): [asdict(row) for row in self.of(kind)] for kind in ROW_TYPES
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": self.machine, "settings": settings, **tables}, indent=2))


class OutOfTime(Exception):
    """The budget is spent."""


class Watch:
    """The program's time budget, and the place where it says how far it is."""

    def __init__(self, budget_s: float) -> None:
        self._started_s = time.perf_counter()
        self._budget_s = budget_s

    def check(self) -> None:
        """Raises OutOfTime once the budget is spent."""
        if time.perf_counter() - self._started_s > self._budget_s:
            raise OutOfTime

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._started_s:4.0f} s] {text}", file=sys.stderr, flush=True)


def main() -> None:
    options = parse_options()
    watch = Watch(options.budget_s)
    hush_libraries()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # what was measured is still printed
    torch._dynamo.config.recompile_limit = 64  # beyond it, networks would run uncompiled unnoticed
    if options.cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
    report = Report(describe(options.device))
    try:
        run(options, watch, report)
    finally:
        report.print()
        report.write(options.json, {key: str(value) for key, value in vars(options).items()})
    check_captures(report.of(CaptureRow), options.device)


def parse_options() -> argparse.Namespace:
    names = [architecture.name for architecture in ARCHITECTURES if architecture.family != "consistency"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=names, default=DEFAULT_ARCHITECTURES)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager", "graphs"])
    parser.add_argument("--max-batch", type=int, default=32, help="at the smallest size; larger ones have fewer rows")
    parser.add_argument("--max-compiled-batch", type=int, default=1, help="each batch size is compiled anew")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile; or max-autotune-no-cudagraphs")
    parser.add_argument(
        "--cudnn-benchmark", action="store_true", help="let cuDNN try its algorithms; the service doesn't"
    )
    parser.add_argument("--rounds", type=int, default=10, help="calls per figure, fewer where they take long")
    parser.add_argument("--seconds", type=float, default=1.5, help="per figure of images/s")
    parser.add_argument("--budget-s", type=float, default=500.0, help="what is left after this time is skipped")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="for the floor: the device's best")
    parser.add_argument("--peak-tb-per-s", type=float, default=4.2)
    parser.add_argument("--shortest-kernel-us", type=float, default=4.0)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--dtype", help="float16 on CUDA, float32 elsewhere")
    parser.add_argument("--tiny", action="store_true", help="miniatures in small batches, to try the program")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-gpu.json")
    options = parser.parse_args()
    default_dtype = "float16" if options.device.type == "cuda" else "float32"
    options.dtype = getattr(torch, options.dtype or default_dtype)
    if options.tiny:
        options.max_batch, options.rounds, options.seconds = min(options.max_batch, 8), MIN_ROUNDS, 0.1
    return options


def run(options: argparse.Namespace, watch: Watch, report: Report) -> None:
    for architecture in ARCHITECTURES:
        if architecture.name in options.architectures:
            run_architecture(shrink(architecture) if options.tiny else architecture, options, watch, report)
            free_memory(options.device)


def run_architecture(architecture: Architecture, options: argparse.Namespace, watch: Watch, report: Report) -> None:
    """What it can't do, or has no time for, is a row of the report too."""
    name = architecture.name
    with rows_of(name, options.device, watch, report):
        watch.check()
        parts = build_parts(architecture, options.device, options.dtype)
        report.add_each(count_parameters(architecture, parts))
        for size in architecture.sizes:
            costs = Costs(architecture, size, options)
            for mode in options.modes:
                subject = Subject(architecture, parts, size, mode, options)
                with rows_of(str(subject), options.device, watch, report):
                    report.add_each(measure_parts(subject, costs, options, watch, report))
                with rows_of(f"{subject}, engine", options.device, watch, report):
                    run_engine(subject, options, watch, report)
            with rows_of(f"{name} {format_size(size)}, attention", options.device, watch, report):
                report.add_each(measure_attention(costs, options, watch))


@contextmanager
def rows_of(what: str, device: torch.device, watch: Watch, report: Report) -> Iterator[None]:
    """Names what fails or is out of time, and goes on with the rest. A device that is lost ends the program."""
    free_memory(device)
    watch.say(what)
    try:
        yield
    except OutOfTime:
        report.add(SkippedRow(what, "no time left"))
    except (RuntimeError, WarmUpError) as error:
        watch.say(f"{what} failed: {error}")
        report.add(SkippedRow(what, first_line(error)))
        wait_for(device)


# The models


Graphs = list[tuple[str, Graphed[Any]]]


class Subject:
    """One architecture at one size in one mode. `max_batch` is lowered to what was found to fit."""

    def __init__(
        self, architecture: Architecture, parts: Parts, size: Size, mode: Mode, options: argparse.Namespace
    ) -> None:
        self.architecture, self.parts, self.size, self.mode = architecture, parts, size, mode
        self.device: torch.device = options.device
        self._dtype: torch.dtype = options.dtype
        self._compile_mode: str = options.compile_mode
        self.max_batch: int = (
            options.max_compiled_batch if mode == "compiled" else fair_batch(architecture, size, options)
        )

    def __str__(self) -> str:
        return " ".join(self.labels)

    @property
    def labels(self) -> tuple[str, str, str]:
        """The first three columns of its rows."""
        return self.architecture.name, format_size(self.size), self.mode

    def new_pipeline(self) -> tuple[DiffusersFamily, Graphs]:
        """The family's own pipeline, nothing captured yet, and its networks where they are captured."""
        graphs: Graphs = []
        kind = FAMILIES[self.architecture.family].kind
        in_mode = type(kind.__name__, (kind,), {"fast": lambda _, network: self._fast(network, graphs)})
        pipeline: DiffusersFamily = in_mode(
            make_spec(self.architecture, self.size, self.max_batch),
            self.device,
            self._dtype,
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
            network = torch.compile(network, mode=self._compile_mode, dynamic=False)
        graphed = Graphed(network, capture=capture_for(self.device))
        graphs.append((name, graphed))
        return graphed


def capture_for(device: torch.device) -> Capture | None:
    """Without CUDA there are no graphs: the network runs, and only the bookkeeping around it is tried."""

    def run_again(network: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Replay:
        return lambda: network(*inputs)

    return None if device.type == "cuda" else run_again


def fair_batch(architecture: Architecture, size: Size, options: argparse.Namespace) -> int:
    """As many pixels at each size."""
    (width, height), (smallest_width, smallest_height) = size, architecture.sizes[0]
    max_batch: int = options.max_batch
    return max(1, max_batch * smallest_width * smallest_height // (width * height))


def count_parameters(architecture: Architecture, parts: Parts) -> Iterator[ParameterRow]:
    for name, network in parts.networks.items():
        parameters = list(network.parameters())
        gib = sum(tensor.numel() * tensor.element_size() for tensor in parameters) / 2**30
        yield ParameterRow(architecture.name, name, sum(tensor.numel() for tensor in parameters) / 1e6, gib)


# Parts


def part_calls(pipeline: DiffusersFamily, size: Size, batch: int) -> dict[str, Callable[[], object]]:
    """What the engine asks of a model, by the names that tables call it."""
    device = pipeline.device
    latents = torch.randn(batch, *pipeline.latent_shape(*size), device=device)
    timesteps, scales = torch.full((batch,), 999.0, device=device), torch.zeros(batch, device=device)
    prompts = list(itertools.islice(endless_prompts(seed=1), batch))
    conditionings = pipeline.encode_prompts(prompts)
    return {
        "text": lambda: pipeline.encode_prompts(prompts),
        "step": lambda: pipeline.predict(latents, timesteps, conditionings, scales),
        "full decode": lambda: pipeline.decode(latents),
        "tiny decode": lambda: pipeline.preview(latents),
    }


def make_spec(architecture: Architecture, size: Size, max_batch_size: int) -> ModelSpec:
    """A catalog entry for one picture size. Guidance is allowed where a guided request's two rows fit."""
    return ModelSpec(
        name=architecture.name,
        description="random weights",
        family=architecture.family,
        source="random weights",
        license="none",
        schedulers={"default": architecture.scheduler},
        default_scheduler="default",
        num_inference_steps=StepRange(default=architecture.steps, min=1, max=8),
        guidance_scale=Range(default=0, min=0, max=2 if max_batch_size > 1 else 1),
        sizes=[size],
        warm_sizes=[size],
        max_batch_size=max_batch_size,
        max_num_images=1,
    )


class Costs:
    """The arithmetic of each part, counted on a copy of the model that has shapes and no memory."""

    def __init__(self, architecture: Architecture, size: Size, options: argparse.Namespace) -> None:
        parts = build_parts(architecture, META, options.dtype)
        self.architecture, self.size, self._options = architecture, size, options
        self._counted: dict[int, dict[str, Counter]] = {}
        self._pipeline = FAMILIES[architecture.family].kind(
            make_spec(architecture, size, 1),
            META,
            options.dtype,
            pipe=parts.pipe,
            tiny_vae=parts.tiny_vae,
            scheduler_config=dict(parts.pipe.scheduler.config),
            revision="random weights",
            loras=StyleLoras(architecture.name, {}, META),
        )

    def count(self, batch: int) -> dict[str, Counter]:
        if batch not in self._counted:
            self._counted[batch] = {}
            for name, call in part_calls(self._pipeline, self.size, batch).items():
                with Counter() as self._counted[batch][name]:
                    call()
        return self._counted[batch]

    def describe(self, counter: Counter, ms: float) -> tuple[float, float, float, float, float]:
        """The columns of a PartRow from `tflop` to `times_floor`."""
        flops_per_ms, bytes_per_ms = self._options.peak_tflops * 1e9, self._options.peak_tb_per_s * 1e9
        shortest_ms = self._options.shortest_kernel_us / 1000
        flops = sum(kernel_flops for kernel_flops, _ in counter.kernels)
        num_bytes = sum(kernel_bytes for _, kernel_bytes in counter.kernels)
        floor_ms = sum(
            max(kernel_flops / flops_per_ms, kernel_bytes / bytes_per_ms, shortest_ms)
            for kernel_flops, kernel_bytes in counter.kernels
        )
        roofline_ms = max(flops / flops_per_ms, num_bytes / bytes_per_ms)
        return flops / 1e12, flops / ms / 1e9, roofline_ms, floor_ms, ms / floor_ms


def measure_parts(
    subject: Subject, costs: Costs, options: argparse.Namespace, watch: Watch, report: Report
) -> Iterator[PartRow]:
    """Up to the first batch that doesn't fit, which lowers the subject's `max_batch`."""
    pipeline, _ = subject.new_pipeline()
    for batch in (2**power for power in range(subject.max_batch.bit_length())):
        watch.check()
        try:
            yield from measure_batch(subject, pipeline, costs, batch, options)
        except RuntimeError as error:
            if batch == 1:
                raise
            report.add(SkippedRow(f"{subject}, batch {batch} and more", first_line(error)))
            subject.max_batch = batch // 2
            wait_for(subject.device)
            return


@torch.inference_mode()
def measure_batch(
    subject: Subject, pipeline: DiffusersFamily, costs: Costs, batch: int, options: argparse.Namespace
) -> list[PartRow]:
    with torch.inference_mode(False):
        counters = costs.count(batch)
    rows = []
    for name, call in part_calls(pipeline, subject.size, batch).items():
        if "decode" in name and batch > 1 and subject.mode != "eager":
            continue  # the engine decodes row by row on a GPU
        ms = median_ms(call, subject.device, options.rounds)
        kernels = count_kernels(call, subject.device) if batch == 1 else None
        rows.append(PartRow(*subject.labels, batch, name, ms, *costs.describe(counters[name], ms), kernels))
    return rows


def median_ms(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Of single calls, each waited for, after two that don't count."""
    for _ in range(2):
        call()
    wait_for(device)
    times_ms: list[float] = []
    started_s = time.perf_counter()
    while len(times_ms) < rounds and (len(times_ms) < MIN_ROUNDS or time.perf_counter() - started_s < MAX_CALL_S):
        call_started_s = time.perf_counter()
        call()
        wait_for(device)
        times_ms.append((time.perf_counter() - call_started_s) * 1000)
    return statistics.median(times_ms)


def count_kernels(call: Callable[[], object], device: torch.device) -> int | None:
    return len(kernel_times(call, device)) if device.type == "cuda" else None


def kernel_times(call: Callable[[], object], device: torch.device) -> list[tuple[str, float]]:
    """The kernels that the device ran during a call: names and microseconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        wait_for(device)
    events = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    return [(event.name, event.time_range.elapsed_us()) for event in events if not event.name.startswith("Mem")]


# The engine


@dataclass
class Bench:
    """An engine with one warm model, and the requests that it is given."""

    subject: Subject
    engine: Engine
    rows_seen: Tally[int]
    prompts: Iterator[str]
    numbers: Iterator[int]

    def new_job(self, steps: int, decoder: Decoder = "full", **changes: Any) -> Job:
        number = next(self.numbers)
        spec = self.runner.pipeline.spec
        wishes = {"num_inference_steps": steps, "decoder": decoder, "seed": number, "output_format": "jpeg"}
        size = dict(zip(("width", "height"), self.subject.size, strict=True))
        return make_job(spec, f"r{number}", next(self.prompts), **(wishes | size | {"metadata": True} | changes))

    def add(self, job: Job) -> None:
        self.engine.add(Delivery(job, attempt=1, waited_ms=0))

    @property
    def runner(self) -> ModelRunner:
        return self.engine.runners[self.subject.architecture.name]

    def draw(self, jobs: Sequence[Job]) -> list[Finished]:
        """All in one batch."""
        return list(self.run(jobs, len(jobs)))

    def run(self, jobs: Sequence[Job], batch: int) -> Iterator[Finished]:
        """Pictures as they come. An engine that falls back to single requests hides that a batch failed: not here."""
        self.rows_seen.clear()
        for job in jobs:
            self.add(job)
        while self.engine.has_work:
            yield from only_finished(self.engine.step())
        if set(self.rows_seen) != {batch}:
            raise RuntimeError(f"{len(jobs)} requests ran in batches of {sorted(self.rows_seen)}, not {batch}")


def run_engine(subject: Subject, options: argparse.Namespace, watch: Watch, report: Report) -> None:
    """Warm-up first, then everything that it must have prepared for."""
    watch.check()
    pipeline, graphs = subject.new_pipeline()
    bench = start_engine(subject, pipeline)
    report.add_each(warm(bench, subject, watch))
    after_warm_up = [graphed.num_captures for _, graphed in graphs]
    run_varied(bench, subject.max_batch)
    for (name, graphed), before in zip(graphs, after_warm_up, strict=True):
        report.add(CaptureRow(*subject.labels, name, before, graphed.num_captures))
    bench.runner.warm_model = None  # batches may grow beyond what pays
    for decoder, steps in itertools.product(DECODERS, STEPS):
        watch.check()
        report.add(measure_latency(bench, decoder, steps, options.rounds))
    for batch in (2**power for power in range(subject.max_batch.bit_length())):
        watch.check()
        report.add(measure_throughput(bench, batch, options.seconds))


def start_engine(subject: Subject, pipeline: DiffusersFamily) -> Bench:
    rows_seen: Tally[int] = Tally()

    def observe(_model: str, num_rows: int, _seconds: float) -> None:
        rows_seen[num_rows] += 1

    runner = ModelRunner(pipeline, batch_sizes(pipeline.spec, subject.device))
    engine = Engine({pipeline.spec.name: runner}, observe)
    return Bench(subject, engine, rows_seen, endless_prompts(seed=2), itertools.count())


def warm(bench: Bench, subject: Subject, watch: Watch) -> Iterator[WarmUpRow]:
    """The service's own warm-up, at every batch size."""
    spec = bench.runner.pipeline.spec
    warm_model = warm_up(bench.engine, spec.name, lambda detail: watch.say(f"warming {detail}"))
    if missing := [size for size in batch_sizes(spec, subject.device) if not bench.rows_seen[size]]:
        raise RuntimeError(f"warm-up never ran batches of {missing}")
    costs = warm_model.find_costs(*subject.size)
    for batch, step_ms in costs.step_ms.items():
        yield WarmUpRow(
            *subject.labels,
            batch,
            step_ms,
            costs.decode_ms[batch],
            costs.preview_ms[batch],
            warm_model.text_ms,
            costs.max_rows,
        )


def run_varied(bench: Bench, max_batch: int) -> None:
    """Requests of all kinds that come while others run."""
    dice = random.Random(0)
    for _ in range(NUM_WAVES):
        for _ in range(dice.randint(1, max_batch)):
            bench.add(vary(bench, dice, max_batch))
        for _ in range(dice.randint(1, 3)):
            only_finished(bench.engine.step())
    only_finished(run_until_done(bench.engine))


def vary(bench: Bench, dice: random.Random, max_batch: int) -> Job:
    """No wider than a batch, as the catalog guarantees."""
    is_guided = max_batch >= 2 and dice.random() < 0.2
    is_pair = max_batch >= 4 and dice.random() < 0.2
    return bench.new_job(
        steps=dice.choice(STEPS),
        decoder=dice.choice(DECODERS),
        guidance_scale=1.5 if is_guided else 0.0,
        negative_prompt=dice.choice((None, "", "blurry")) if is_guided else None,
        num_images=2 if is_pair else 1,
        previews=dice.random() < 0.5,
    )


def only_finished(outputs: Sequence[object]) -> list[Finished]:
    for output in outputs:
        if isinstance(output, GenerationFailed):
            raise RuntimeError(f"{output.request.request_id} failed: {output.error}") from output.error
    return [output for output in outputs if isinstance(output, Finished)]


def measure_latency(bench: Bench, decoder: Decoder, steps: int, rounds: int) -> LatencyRow:
    totals_ms, jpegs_ms, sizes = [], [], []
    for number in range(rounds + 1):
        job = bench.new_job(steps, decoder)
        started_s = time.perf_counter()
        (finished,) = bench.draw([job])
        drawn_s = time.perf_counter()
        picture = encode_picture(job, 0, finished.pixels[0])
        ended_s = time.perf_counter()
        if number:
            totals_ms.append((ended_s - started_s) * 1000)
            jpegs_ms.append((ended_s - drawn_s) * 1000)
            sizes.append(len(picture.data) / 1024)
    medians = statistics.median(totals_ms), max(totals_ms), statistics.median(jpegs_ms), statistics.median(sizes)
    return LatencyRow(*bench.subject.labels, decoder, steps, *medians)


def measure_throughput(bench: Bench, batch: int, seconds: float) -> ThroughputRow:
    """At the architecture's own number of steps. Decoding and encoding run beside the next batch, as in the worker."""
    subject, steps = bench.subject, bench.subject.architecture.steps
    bench.runner.pipeline.spec = make_spec(subject.architecture, subject.size, batch)
    started_s = time.perf_counter()
    bench.draw([bench.new_job(steps) for _ in range(batch)])
    num_batches = max(MIN_ROUNDS, int(seconds / (time.perf_counter() - started_s)))
    reset_peaks(subject.device)
    started_s = time.perf_counter()
    with ThreadPoolExecutor(ENCODE_THREADS) as pool:
        jobs = [bench.new_job(steps) for _ in range(batch * num_batches)]
        encoded = [
            pool.submit(encode_picture, it.request.delivery.job, 0, it.pixels[0]) for it in bench.run(jobs, batch)
        ]
    images_per_s = len([future.result() for future in encoded]) / (time.perf_counter() - started_s)
    return ThroughputRow(*subject.labels, batch, steps, images_per_s, *read_peaks(subject.device))


# Attention


def measure_attention(costs: Costs, options: argparse.Namespace, watch: Watch) -> Iterator[AttentionRow]:
    labels = costs.architecture.name, format_size(costs.size)
    for part, counter in costs.count(1).items():
        for attention, count in counter.attentions.items():
            watch.check()
            call = attention_call(attention, options)
            times_ms = [time_backend(backend, call, options) for backend in BACKENDS]
            shapes = format_shape(attention.query), format_shape(attention.key)
            chosen = describe_kernels(call, options.device)
            default_ms = median_ms(call, options.device, options.rounds)
            flags = attention.is_causal, attention.has_mask
            yield AttentionRow(*labels, part, count, *shapes, *flags, chosen, default_ms, *times_ms)


def attention_call(attention: Attention, options: argparse.Namespace) -> Callable[[], object]:
    """Laid out in memory as diffusers and transformers do, heads beside each other within a token."""
    shapes = attention.query, attention.key, attention.key
    query, key, value = (
        torch.randn(b, tokens, heads, width, device=options.device, dtype=options.dtype).transpose(1, 2)
        for b, heads, tokens, width in shapes
    )
    mask_shape = attention.query[0], 1, attention.query[2], attention.key[2]
    mask = torch.zeros(mask_shape, device=options.device, dtype=options.dtype) if attention.has_mask else None
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=attention.is_causal
    )


def time_backend(backend: Any, call: Callable[[], object], options: argparse.Namespace) -> float | None:
    """None where the backend can't do it; torch then warns of each reason."""
    with warnings.catch_warnings(), sdpa_kernel([backend]):
        warnings.simplefilter("ignore")
        try:
            return median_ms(call, options.device, options.rounds)
        except RuntimeError:
            return None


def describe_kernels(call: Callable[[], object], device: torch.device) -> str:
    """The name of the longest kernel of a call, which tells the backend."""
    if device.type != "cuda":
        return "-"
    name, _ = max(kernel_times(call, device), key=lambda kernel: kernel[1], default=("-", 0.0))
    return name[:60].replace("|", "/")


# The device


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_peaks(device: torch.device) -> tuple[float, float]:
    """GiB allocated and reserved; graphs' pools are only reserved between their replays."""
    if device.type != "cuda":
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.max_memory_reserved(device) / 2**30


def describe(device: torch.device) -> dict[str, object]:
    """Where it was measured, and what the device can do at best: the floor's own figures are options."""
    machine: dict[str, object] = {
        "device": str(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device.type != "cuda":
        return machine
    properties = torch.cuda.get_device_properties(device)
    return machine | {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "measured_tflops": round(measure_tflops(device), 1),
        "measured_tb_per_s": round(measure_tb_per_s(device), 2),
    }


def measure_tflops(device: torch.device, side: int = 8192) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=torch.float16) for _ in range(2))
    return 2 * side**3 / median_ms(lambda: left @ right, device, rounds=20) / 1e9


def measure_tb_per_s(device: torch.device, num_bytes: int = 2**31) -> float:
    """Read and written together, by a copy."""
    source = torch.zeros(num_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_ms(lambda: target.copy_(source), device, rounds=20) / 1e9


# Words


def format_size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def format_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160].replace("|", "/")


def check_captures(rows: Sequence[CaptureRow], device: torch.device) -> None:
    """Only a GPU pads and decodes row by row, so only there no request may lead to a new capture."""
    grown = [row for row in rows if row.after_varied > row.after_warm_up]
    if device.type == "cuda" and grown:
        names = "; ".join(f"{row.architecture} {row.size} {row.mode}: {row.network}" for row in grown)
        sys.exit(f"varied requests led to new captures after warm-up: {names}")


if __name__ == "__main__":
    main()
