"""The engine alone, beside diffusers' own pipeline in batches, in one process on one device.

    python -m benchmarks.engine

Three tables: pictures per batch size and number format; what a step costs, with previews and without, and how much of
it is the network; and how far the engine's pictures are from diffusers'. All programs take turns within each round;
the tables show medians of the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from benchmarks.shared.diffusers_loop import hush_libraries
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.prompts import endless_prompts
from benchmarks.shared.report import print_table, write_report
from broker.messages import Delivery, SamplingParams
from models.catalog import ModelSpec, get_spec, load_catalog
from models.loading import default_device, load_diffusers, load_pipeline
from models.pipeline import FewStepPipeline
from models.rows import CORES
from workers.engine import Engine, EngineOutput, Finished, PreviewReady
from workers.engine.calibration import warm_up
from workers.engine.engine import run_until_done
from workers.engine.jobs import make_job
from workers.engine.outputs import Pixels
from workers.engine.runner import ModelRunner


@dataclass(frozen=True)
class Throughput:
    """`rows` pictures at a time, without encoding them to files."""

    program: str
    dtype: str
    rows: int
    ms: float
    images_per_s: float


@dataclass(frozen=True)
class StepCost:
    """One step of `rows` requests. `previews` are drawn after it where all of them want one, as many as their budget
    allows; `network_share` is the part of the step that the network itself takes."""

    dtype: str
    rows: int
    step_ms: float
    with_previews_ms: float
    previews: float
    preview_share: float
    network_share: float


@dataclass(frozen=True)
class Exactness:
    """Pixel differences, of 255, in one number format; diffusers' pipeline is called with one picture at a time."""

    dtype: str
    setting: str
    largest: int
    mean: float


def main() -> None:
    options = parse_options()
    hush_libraries()
    spec = get_spec(load_catalog(), options.model)
    contenders = [Contender(spec, dtype, options.steps) for dtype in options.dtypes]
    report: dict[str, Sequence[Throughput | StepCost | Exactness]] = {
        "throughput": measure_throughput(contenders, options),
        "step": [measure_step(contender, rows, options.rounds) for contender in contenders for rows in options.rows],
        "exactness": [row for contender in contenders for row in measure_exactness(contender)],
    }
    for rows in report.values():
        print_table(rows)
    write_report(options.json, vars(options), report)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-lcm")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-engine.json")
    return parser.parse_args()


class Contender:
    """One number format: diffusers' pipeline and the engine, both warm."""

    def __init__(self, spec: ModelSpec, dtype: str, steps: int) -> None:
        device = default_device()
        self.spec, self.dtype, self.steps = spec, dtype, steps
        self.pipe = load_diffusers(spec, device, getattr(torch, dtype))
        pipeline = load_pipeline(spec, device, getattr(torch, dtype))
        self.pipeline = NetworkTimer(pipeline)
        self.engine = Engine({spec.name: ModelRunner(cast(FewStepPipeline, self.pipeline))})
        self._warm_up()
        unshared = NetworkTimer(pipeline, shares_rows=False)
        self.unshared_engine = Engine({spec.name: ModelRunner(cast(FewStepPipeline, unshared))})
        self._prompts = endless_prompts(seed=1)
        self._numbers = itertools.count()

    def _warm_up(self) -> None:
        """As a worker does it, but that batches may grow as far as asked for here."""
        runner = self.engine.runners[self.spec.name]
        warm = warm_up(self.engine, self.spec.name)
        sizes = tuple(replace(costs, max_rows=self.spec.max_batch_size) for costs in warm.sizes)
        runner.warm_model = replace(warm, sizes=sizes)

    def draw_with_diffusers(self, all_params: Sequence[SamplingParams]) -> Pixels:
        """All in one call, with all cores: the engine has left its thread with fewer."""
        torch.set_num_threads(CORES)
        images = self.pipe(
            [params.prompt for params in all_params],
            num_inference_steps=all_params[0].num_inference_steps,
            guidance_scale=all_params[0].guidance_scale,
            width=all_params[0].width,
            height=all_params[0].height,
            generator=[torch.Generator("cpu").manual_seed(params.seed) for params in all_params],
            output_type="np",
        ).images
        return np.asarray((images * 255).round(), dtype=np.uint8)

    def draw_with_engine(self, all_params: Sequence[SamplingParams], engine: Engine | None = None) -> list[Finished]:
        """All at once, in the order asked for."""
        engine = engine or self.engine
        names = [self.add(params, engine) for params in all_params]
        outputs: list[EngineOutput] = run_until_done(engine)
        finished = {output.request.request_id: output for output in outputs if isinstance(output, Finished)}
        return [finished[name] for name in names]

    def draw_unshared(self, all_params: Sequence[SamplingParams]) -> list[Finished]:
        """The same where a CPU's threads share each operation instead of the rows."""
        return self.draw_with_engine(all_params, self.unshared_engine)

    def add(self, params: SamplingParams, engine: Engine) -> str:
        """Gives an engine a request; returns its id."""
        request_id = f"r{next(self._numbers)}"
        job = replace(make_job(self.spec, request_id, params.prompt), params=params)
        engine.add(Delivery(job, attempt=1, waited_ms=0))
        return request_id

    def new_params(self, rows: int, **changes: Any) -> list[SamplingParams]:
        wishes = {"num_inference_steps": self.steps} | changes
        return [make_job(self.spec, "", next(self._prompts), seed=row, **wishes).params for row in range(rows)]


class NetworkTimer:
    """A pipeline that also adds up the time its network takes, and may keep a CPU from sharing a batch by rows."""

    def __init__(self, pipeline: FewStepPipeline, *, shares_rows: bool = True) -> None:
        self._pipeline, self._shares_rows = pipeline, shares_rows
        self.network_s = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def expect_rows(self, num_rows: int) -> None:
        self._pipeline.expect_rows(num_rows if self._shares_rows else 1)

    def predict(self, *arguments: Any) -> torch.Tensor:
        started_s = time.perf_counter()
        output = self._pipeline.predict(*arguments)
        if output.is_cuda:
            torch.cuda.synchronize()
        self.network_s += time.perf_counter() - started_s
        return output


def measure_throughput(contenders: Sequence[Contender], options: argparse.Namespace) -> list[Throughput]:
    table = []
    for rows in options.rows:
        programs: dict[tuple[str, str], Callable[[], object]] = {}
        for contender in contenders:
            programs["diffusers", contender.dtype] = partial(draw, contender, contender.draw_with_diffusers, rows)
            programs["engine", contender.dtype] = partial(draw, contender, contender.draw_with_engine, rows)
            programs["engine, rows not shared", contender.dtype] = partial(
                draw, contender, contender.draw_unshared, rows
            )
        times_ms = take_turns(programs, options.rounds)
        table += [Throughput(*key, rows, ms, rows / ms * 1000) for key, ms in times_ms.items()]
    return table


def draw(contender: Contender, program: Callable[[Sequence[SamplingParams]], object], rows: int) -> None:
    program(contender.new_params(rows))


def take_turns(programs: dict[tuple[str, str], Callable[[], object]], rounds: int) -> dict[tuple[str, str], float]:
    """The median milliseconds of each program, after a first call that doesn't count."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in programs}
    for number in range(rounds + 1):
        for key, program in programs.items():
            started_s = time.perf_counter()
            program()
            if number:
                times[key].append((time.perf_counter() - started_s) * 1000)
    return {key: statistics.median(values) for key, values in times.items()}


def measure_step(contender: Contender, rows: int, rounds: int) -> StepCost:
    plain, previewed, network, previews = [], [], [], []
    steps = max(4, contender.steps)  # the last one has no preview, the first also encodes prompts
    for _ in range(rounds):
        contender.pipeline.network_s = 0.0
        plain.append(time_steps(contender, rows, steps, previews=False)[0])
        network.append(contender.pipeline.network_s * 1000 / steps)
        with_previews_ms, num_previews = time_steps(contender, rows, steps, previews=True)
        previewed.append(with_previews_ms)
        previews.append(num_previews)
    step, preview = statistics.median(plain), statistics.median(previewed)
    share = statistics.median(network) / step
    return StepCost(contender.dtype, rows, step, preview, statistics.mean(previews), preview / step - 1, share)


def time_steps(contender: Contender, rows: int, steps: int, *, previews: bool) -> tuple[float, float]:
    """Mean milliseconds and previews of the steps between the first and the last."""
    for params in contender.new_params(rows, num_inference_steps=steps, previews=previews):
        contender.add(params, contender.engine)
    contender.engine.step()
    num_previews = 0
    started_s = time.perf_counter()
    for _ in range(steps - 2):
        num_previews += sum(isinstance(output, PreviewReady) for output in contender.engine.step())
    elapsed_ms = (time.perf_counter() - started_s) * 1000 / (steps - 2)
    run_until_done(contender.engine)
    return elapsed_ms, num_previews / (steps - 2)


def measure_exactness(contender: Contender, pictures: int = 8) -> list[Exactness]:
    """Each picture alone, and all in one batch, where half of them take twice the steps."""
    steps = [contender.steps * (1 + row % 2) for row in range(pictures)]
    asked = [
        replace(params, num_inference_steps=count)
        for params, count in zip(contender.new_params(pictures), steps, strict=True)
    ]
    by_diffusers = [contender.draw_with_diffusers([params])[0] for params in asked]
    alone = [contender.draw_with_engine([params])[0].pixels[0] for params in asked]
    together = [output.pixels[0] for output in contender.draw_with_engine(asked)]
    return [
        Exactness(contender.dtype, setting, *differences(wanted, drawn))
        for setting, wanted, drawn in (
            ("alone, from diffusers", by_diffusers, alone),
            (f"in a mixed batch of {pictures}, from diffusers", by_diffusers, together),
            (f"in a mixed batch of {pictures}, from alone", alone, together),
        )
    ]


def differences(wanted: Sequence[Pixels], drawn: Sequence[Pixels]) -> tuple[int, float]:
    delta = np.abs(np.stack(wanted).astype(int) - np.stack(drawn).astype(int))
    return int(delta.max()), float(delta.mean())


if __name__ == "__main__":
    main()
