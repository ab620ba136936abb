"""The service's own engine: its warm-up, requests of all kinds, one picture at a time, and full batches."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.gpu.report import CaptureRow, LatencyRow, Report, ThroughputRow, WarmUpRow
from benchmarks.gpu.subject import Subject
from benchmarks.shared.device import MIN_ROUNDS, read_peaks, reset_peaks
from benchmarks.shared.prompts import endless_prompts
from broker.messages import Decoder, Delivery, Job
from models.families.base import DiffusersFamily
from workers.engine import Engine, Finished, GenerationFailed
from workers.engine.calibration import batch_sizes, warm_up
from workers.engine.engine import run_until_done
from workers.engine.jobs import make_job
from workers.engine.runner import ModelRunner
from workers.images import encode_picture

DECODERS: tuple[Decoder, ...] = ("full", "tiny")
STEPS = (1, 2, 4)
ENCODE_THREADS = 2  # the worker's default
NUM_WAVES = 8


class Bench:
    """An engine with one model, and the requests that it is given."""

    def __init__(self, subject: Subject, pipeline: DiffusersFamily) -> None:
        self.subject = subject
        self.runner = ModelRunner(pipeline, batch_sizes(pipeline.spec, subject.device))
        self.engine = Engine({pipeline.spec.name: self.runner}, self._observe_step)
        self.rows_seen: set[int] = set()
        self._prompts, self._numbers = endless_prompts(seed=2), itertools.count()

    def new_job(self, steps: int, decoder: Decoder = "full", **changes: Any) -> Job:
        number = next(self._numbers)
        wishes = {"num_inference_steps": steps, "decoder": decoder, "seed": number, "output_format": "jpeg"}
        size = dict(zip(("width", "height"), self.subject.size, strict=True))
        fields = wishes | size | {"metadata": True} | changes
        return make_job(self.runner.pipeline.spec, f"r{number}", next(self._prompts), **fields)

    def add(self, job: Job) -> None:
        self.engine.add(Delivery(job, attempt=1, waited_ms=0))

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
        if self.rows_seen != {batch}:
            raise RuntimeError(f"{len(jobs)} requests ran in batches of {sorted(self.rows_seen)}, not {batch}")

    def _observe_step(self, _model: str, num_rows: int, _seconds: float) -> None:
        self.rows_seen.add(num_rows)


def only_finished(outputs: Sequence[object]) -> list[Finished]:
    for output in outputs:
        if isinstance(output, GenerationFailed):
            raise RuntimeError(f"{output.request.request_id} failed: {output.error}") from output.error
    return [output for output in outputs if isinstance(output, Finished)]


def run_engine(subject: Subject, rounds: int, seconds: float, report: Report) -> None:
    """Warm-up first, then everything that it must have prepared for."""
    report.check_time()
    pipeline, graphs = subject.new_pipeline()
    bench = Bench(subject, pipeline)
    report.add_each(measure_warm_up(bench, report))
    after_warm_up = {name: graphed.num_captures for name, graphed in graphs.items()}
    run_varied(bench)
    for name, graphed in graphs.items():
        report.add(CaptureRow(*subject.labels, name, after_warm_up[name], graphed.num_captures))
    bench.runner.warm_model = None  # batches may grow beyond what pays
    for decoder, steps in itertools.product(DECODERS, STEPS):
        report.check_time()
        report.add(measure_latency(bench, decoder, steps, rounds))
    for batch in subject.batches:
        report.check_time()
        report.add(measure_throughput(bench, batch, seconds))


def measure_warm_up(bench: Bench, report: Report) -> Iterator[WarmUpRow]:
    """The service's own, at every batch size."""
    subject, spec = bench.subject, bench.runner.pipeline.spec
    warm_model = warm_up(bench.engine, spec.name, lambda detail: report.say(f"warming {detail}"))
    if missing := set(batch_sizes(spec, subject.device)) - bench.rows_seen:
        raise RuntimeError(f"warm-up never ran batches of {sorted(missing)}")
    costs = warm_model.find_costs(*subject.size)
    for batch, step_ms in costs.step_ms.items():
        yield WarmUpRow(
            *subject.labels,
            batch=batch,
            step_ms=step_ms,
            decode_ms=costs.decode_ms[batch],
            preview_ms=costs.preview_ms[batch],
            text_ms=warm_model.text_ms,
            max_rows=costs.max_rows,
        )


def run_varied(bench: Bench) -> None:
    """Requests of all kinds that come while others run."""
    dice, max_batch = random.Random(0), bench.subject.max_batch
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


def measure_latency(bench: Bench, decoder: Decoder, steps: int, rounds: int) -> LatencyRow:
    """After one picture that doesn't count."""
    pictures = [time_picture(bench, decoder, steps) for _ in range(rounds + 1)][1:]
    totals_ms, jpegs_ms, sizes_kib = zip(*pictures, strict=True)
    return LatencyRow(
        *bench.subject.labels,
        decoder=decoder,
        steps=steps,
        total_ms=statistics.median(totals_ms),
        slowest_ms=max(totals_ms),
        jpeg_ms=statistics.median(jpegs_ms),
        jpeg_kib=statistics.median(sizes_kib),
    )


def time_picture(bench: Bench, decoder: Decoder, steps: int) -> tuple[float, float, float]:
    """Milliseconds in all and of its JPEG alone, and the KiB of that."""
    job = bench.new_job(steps, decoder)
    started_s = time.perf_counter()
    (finished,) = bench.draw([job])
    drawn_s = time.perf_counter()
    picture = encode_picture(job, 0, finished.pixels[0])
    ended_s = time.perf_counter()
    return (ended_s - started_s) * 1000, (ended_s - drawn_s) * 1000, len(picture.data) / 1024


def measure_throughput(bench: Bench, batch: int, seconds: float) -> ThroughputRow:
    """At the architecture's own number of steps. Decoding and encoding run beside the next batch, as in the worker."""
    subject, steps = bench.subject, bench.subject.architecture.steps
    bench.runner.pipeline.spec = subject.make_spec(batch)
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
