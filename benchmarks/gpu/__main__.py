"""The real architectures at full size with random weights, part by part and through the engine, on one GPU.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --tiny     # the same program on miniatures, to try it without a GPU

Each architecture runs at each of its picture sizes in each mode: `eager`; `graphs`, every network as CUDA graphs;
`compiled`, the same after torch.compile. The engine is the service's own, and its warm-up must pass first.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch._dynamo

from benchmarks.gpu.attention import measure_attention
from benchmarks.gpu.engine import run_engine
from benchmarks.gpu.machine import describe
from benchmarks.gpu.parts import Costs, Roofline, count_parameters, measure_parts
from benchmarks.gpu.report import CaptureRow, Report
from benchmarks.gpu.subject import MODES, Mode, Subject, fair_batch, format_size
from benchmarks.shared.architectures import ARCHITECTURES, Architecture, shrink
from benchmarks.shared.device import MIN_ROUNDS, free_memory
from benchmarks.shared.diffusers_loop import hush_libraries
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.random_weights import Parts, build_parts
from models.catalog import Size
from models.loading import default_device

DEFAULT_ARCHITECTURES = ("sdxl-turbo", "sd15-lcm", "sd-turbo")


def main() -> None:
    options = parse_options()
    report = Report(options.device, options.budget_s)
    hush_libraries()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # what was measured is still printed
    torch._dynamo.config.recompile_limit = 64  # beyond it, networks would run uncompiled unnoticed
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    machine = describe(options.device)
    try:
        run(options, report)
    finally:
        report.print(machine)
        report.write(options.json, vars(options), machine)
    check_captures(report.of(CaptureRow), options.device)


def parse_options() -> argparse.Namespace:
    names = [architecture.name for architecture in ARCHITECTURES if architecture.family != "consistency"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--architectures", nargs="+", choices=names, default=DEFAULT_ARCHITECTURES)
    add("--modes", nargs="+", choices=MODES, default=["eager", "graphs"])
    add("--max-batch", type=int, default=32, help="at the smallest size; larger ones have fewer rows")
    add("--max-compiled-batch", type=int, default=1, help="each batch size is compiled anew")
    add("--compile-mode", default="default", help="of torch.compile; or max-autotune-no-cudagraphs")
    add("--cudnn-benchmark", action="store_true", help="let cuDNN try its algorithms; the service doesn't")
    add("--rounds", type=int, default=10, help="calls per figure, fewer where they take long")
    add("--seconds", type=float, default=1.5, help="per figure of images/s")
    add("--budget-s", type=float, default=500.0, help="what is left after this time is skipped")
    add("--peak-tflops", type=float, default=790.0, help="for the floor: the device's best")
    add("--peak-tb-per-s", type=float, default=4.2)
    add("--shortest-kernel-us", type=float, default=4.0)
    add("--device", type=torch.device, default=default_device())
    add("--dtype", help="float16 on CUDA, float32 elsewhere")
    add("--tiny", action="store_true", help="miniatures in small batches, to try the program")
    add("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-gpu.json")
    options = parser.parse_args()
    default_dtype = "float16" if options.device.type == "cuda" else "float32"
    options.dtype = getattr(torch, options.dtype or default_dtype)
    if options.tiny:
        options.max_batch, options.rounds, options.seconds = min(options.max_batch, 8), MIN_ROUNDS, 0.1
    return options


def run(options: argparse.Namespace, report: Report) -> None:
    for architecture in ARCHITECTURES:
        if architecture.name in options.architectures:
            run_architecture(shrink(architecture) if options.tiny else architecture, options, report)
            free_memory(options.device)


def run_architecture(architecture: Architecture, options: argparse.Namespace, report: Report) -> None:
    """What it can't do, or has no time for, is a row of the report too."""
    with report.section(architecture.name):
        report.check_time()
        parts = build_parts(architecture, options.device, options.dtype)
        report.add_each(count_parameters(architecture, parts))
        for size in architecture.sizes:
            run_size(architecture, parts, size, options, report)


def run_size(architecture: Architecture, parts: Parts, size: Size, options: argparse.Namespace, report: Report) -> None:
    roofline = Roofline(options.peak_tflops, options.peak_tb_per_s, options.shortest_kernel_us)
    costs = Costs(architecture, size, options.dtype, roofline)
    for mode in options.modes:
        subject = new_subject(architecture, parts, size, mode, options)
        with report.section(str(subject)):
            report.add_each(measure_parts(subject, costs, options.rounds, report))
        with report.section(f"{subject}, engine"):
            run_engine(subject, options.rounds, options.seconds, report)
    with report.section(f"{architecture.name} {format_size(size)}, attention"):
        report.add_each(measure_attention(costs, options.device, options.rounds, report))


def new_subject(
    architecture: Architecture, parts: Parts, size: Size, mode: Mode, options: argparse.Namespace
) -> Subject:
    is_compiled = mode == "compiled"
    max_batch = options.max_compiled_batch if is_compiled else fair_batch(architecture, size, options.max_batch)
    return Subject(architecture, parts, size, mode, max_batch, options.device, options.dtype, options.compile_mode)


def check_captures(rows: Sequence[CaptureRow], device: torch.device) -> None:
    """Only a GPU pads and decodes row by row, so only there no request may lead to a new capture."""
    grown = [row for row in rows if row.after_varied > row.after_warm_up]
    if device.type == "cuda" and grown:
        names = "; ".join(f"{row.architecture} {row.size} {row.mode}: {row.network}" for row in grown)
        sys.exit(f"varied requests led to new captures after warm-up: {names}")


if __name__ == "__main__":
    main()
