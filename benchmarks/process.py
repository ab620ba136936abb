"""The worker with its engine in a thread, as it is shipped, against the same worker with its engine in a process.

    python -m benchmarks.process            # about four minutes

A thread shares the interpreter lock with the event loop and the encoders of pictures; a process pays for every request
and every picture that crosses between the two. Both workers are real ones on the real broker, without HTTP: clients in
a process of their own submit jobs to an embedded Redis and read the replies, each its next one when its last one is
answered. The workers take turns, and whoever has no turn is stopped; the table shows the medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import multiprocessing
import os
import queue
import signal
import statistics
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import psutil

from app.parameters import Defaults, complete
from app.schemas import GenerationFields
from benchmarks.diffusers_loop import hush_libraries
from benchmarks.figures import BenchmarkError, format_table
from benchmarks.machine import REPOSITORY
from benchmarks.prompts import endless_prompts
from benchmarks.report import write_report
from benchmarks.servers import READY_WITHIN_S, CpuMeter, signal_group
from broker.embedded import EmbeddedRedis
from broker.messages import Abort, Accepted, Completed, Delivery, Job, ModelStatus, Preview, Started, WarmModel
from broker.redis_broker import RedisBroker
from broker.terms import Limits
from models.catalog import get_spec, load_catalog
from models.pipeline import Conditioning
from workers.engine import EngineOutput
from workers.engine.request import Denoising, RequestState
from workers.engine.runner import ModelRunner
from workers.engine_thread import EngineThread
from workers.settings import WorkerSettings
from workers.worker import Worker

SPAWN = multiprocessing.get_context("spawn")
PATIENCE_S = 60.0  # beside the time asked for
PROGRESS_EVERY_S = 1.0
MIN_SIGMAS = 2.0  # a difference below so many standard errors is none
NOTHING: Any = None


class ThreadWorker(Worker):
    """The shipped worker, but that a batch may grow to the model's limit.

    How far it pays is measured at each start and differs from one to the next, where two sizes are about as good.
    """

    def _welcome(self, runner: ModelRunner) -> None:
        assert runner.warm_model is not None, "a runner is welcomed once it is warm"
        sizes = tuple(replace(costs, max_rows=runner.warm_model.max_batch_size) for costs in runner.warm_model.sizes)
        runner.warm_model = replace(runner.warm_model, sizes=sizes)
        super()._welcome(runner)


# The engine in a process


@dataclass(frozen=True)
class Built:
    """The models are warm, or `error` says why not."""

    warm_models: tuple[WarmModel, ...]
    error: BaseException | None


@dataclass(frozen=True)
class Ended:
    """The engine's loop is over, as it was told to or by an error."""

    error: BaseException | None


Report = Built | Ended | list[EngineOutput]


class RemoteModels:
    """What the worker asks of its WarmSet, as the child told it."""

    def __init__(self) -> None:
        self.ready: Future[None] = Future()
        self.warm_models: tuple[WarmModel, ...] = ()
        self.statuses: tuple[ModelStatus, ...] = ()

    def give_up(self) -> None: ...


class EngineProcess:
    """What EngineThread offers, with the engine in a child process.

    `models` hears what the warm-up measured and `on_outputs` gets what is ready, without tensors; it is called on a
    thread of this process and must only hand over. Times of the two processes compare, as both clocks are the
    system's on Linux. The child ends with this process: then its pipe has an end.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        models: RemoteModels,
        on_outputs: Callable[[list[EngineOutput]], None],
    ) -> None:
        self._models, self._on_outputs = models, on_outputs
        commands, self._commands = SPAWN.Pipe(duplex=False)
        self._reports, reports = SPAWN.Pipe(duplex=False)
        self._ends_of_child = (commands, reports)
        self._progress_s = SPAWN.RawValue("d", time.monotonic())
        arguments = (settings, commands, reports, self._progress_s)
        self._process = SPAWN.Process(target=run_engine, args=arguments, name="engine", daemon=True)
        self.ended: Future[None] = Future()

    def start(self) -> None:
        self._process.start()
        for end in self._ends_of_child:
            end.close()
        threading.Thread(target=self._listen, name="engine-reports", daemon=True).start()

    def add(self, delivery: Delivery) -> None:
        self._tell(delivery)

    def abort(self, abort: Abort) -> None:
        self._tell(abort)

    def stop(self, timeout_s: float) -> None:
        """Ends the process after its current step, or kills it after `timeout_s`: a thread can't be killed."""
        self._tell(None)
        if self._process.is_alive():
            self._process.join(timeout_s)
            self._process.kill()

    def is_stalled(self, max_stall_s: float) -> bool:
        return time.monotonic() - self.last_progress_s > max_stall_s

    @property
    def last_progress_s(self) -> float:
        return float(self._progress_s.value)

    def _tell(self, command: Delivery | Abort | None) -> None:
        with contextlib.suppress(OSError):  # a dead child: `ended` tells
            self._commands.send(command)

    def _listen(self) -> None:
        try:
            while True:
                self._hear(self._reports.recv())
        except EOFError:
            for future in (self._models.ready, self.ended):
                if not future.done():
                    settle(future, ChildProcessError("the engine's process has ended"))

    def _hear(self, report: Report) -> None:
        match report:
            case Built(warm_models=warm_models, error=error):
                self._progress_s.value = time.monotonic()  # the child's own word comes within a second
                self._models.warm_models = warm_models
                settle(self._models.ready, error)
            case Ended(error=error):
                settle(self.ended, error)
            case outputs:
                self._on_outputs(outputs)


def settle(future: Future[None], error: BaseException | None) -> None:
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def run_engine(settings: WorkerSettings, commands: Connection, reports: Connection, progress_s: Any) -> None:
    hush_libraries()
    EngineHost(settings).obey(commands, reports, progress_s)


class EngineHost(ThreadWorker):
    """The child: a worker that builds its engine thread and never serves."""

    def obey(self, commands: Connection, reports: Connection, progress_s: Any) -> None:
        """Runs the engine until told to stop, or the parent is gone."""
        outbox: queue.SimpleQueue[Report | None] = queue.SimpleQueue()  # a full pipe must not hold up a step
        sender = threading.Thread(target=send_all, args=(outbox, reports), name="sender")
        sender.start()
        models = self._warm_set
        engine = EngineThread(
            self._build_engine, lambda outputs: outbox.put([lighten(output) for output in outputs]), models.start
        )
        models.ready.add_done_callback(lambda ready: outbox.put(Built(models.warm_models, ready.exception())))
        engine.ended.add_done_callback(lambda ended: outbox.put(Ended(ended.exception())))
        engine.start()
        with contextlib.suppress(EOFError):
            while True:
                progress_s.value = engine.last_progress_s
                if not commands.poll(PROGRESS_EVERY_S):
                    continue
                match commands.recv():
                    case Delivery() as delivery:
                        engine.add(delivery)
                    case Abort() as abort:
                        engine.abort(abort)
                    case None:
                        break
        engine.stop(PATIENCE_S)
        outbox.put(None)
        sender.join()

    def _tell_news(self) -> None:
        """There is no event loop here; `Built` tells the parent."""


def send_all(outbox: queue.SimpleQueue[Report | None], reports: Connection) -> None:
    with contextlib.suppress(BrokenPipeError):
        while (report := outbox.get()) is not None:
            reports.send(report)


def lighten(output: EngineOutput) -> EngineOutput:
    """With all that the publisher reads of its request, and no tensor: those would cross by shared memory."""
    request: RequestState = output.request
    return replace(output, request=replace(request, denoising=request.denoising and without_tensors(request.denoising)))


def without_tensors(denoising: Denoising) -> Denoising:
    negative = denoising.negative and Conditioning(NOTHING, truncated=denoising.negative.truncated)
    conditioning = Conditioning(NOTHING, truncated=denoising.conditioning.truncated)
    return Denoising(NOTHING, NOTHING, {}, conditioning, negative, denoising.guidance_scale, denoising.step_index)


# The workers


class ProcessWorker(ThreadWorker):
    """The same but for where its engine runs."""

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings)
        models: Any = RemoteModels()
        engine: Any = EngineProcess(settings, models, self._hand_over)
        self._warm_set, self._engine = models, engine


Program = Literal["thread", "process"]
PROGRAMS: dict[Program, type[Worker]] = {"thread": ThreadWorker, "process": ProcessWorker}


def run_worker(program: Program, settings: WorkerSettings) -> None:
    os.setsid()  # a group of its own, which is stopped and ended as one
    logging.basicConfig(level=logging.ERROR)  # after each rest a read times out and is tried again, with a warning
    hush_libraries()
    asyncio.run(serve(PROGRAMS[program](settings)))


async def serve(worker: Worker) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.request_stop)
    await worker.serve()


class Contender:
    """A worker that is ready, with a queue of its own; it runs in its turns only."""

    def __init__(self, program: Program, settings: WorkerSettings) -> None:
        self.program, self.settings = program, settings
        self._process = SPAWN.Process(target=run_worker, args=(program, settings), name=program)

    def __enter__(self) -> Contender:
        self._process.start()
        try:
            asyncio.run(self._wait_until_ready())
        except BaseException:
            self.__exit__()
            raise
        signal_group(self._pid, signal.SIGSTOP)
        return self

    def __exit__(self, *_: object) -> None:
        signal_group(self._pid, signal.SIGCONT)
        self._process.terminate()
        self._process.join(30)
        signal_group(self._pid, signal.SIGKILL)
        self._process.kill()

    @contextlib.contextmanager
    def awake(self) -> Iterator[CpuMeter]:
        """For the time of its turn, of which the meter tells the CPU time."""
        signal_group(self._pid, signal.SIGCONT)
        try:
            yield CpuMeter(psutil.Process(self._pid))
        finally:
            signal_group(self._pid, signal.SIGSTOP)

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    async def _wait_until_ready(self) -> None:
        end_s = time.monotonic() + READY_WITHIN_S
        async with RedisBroker(self.settings.redis_url, prefix=self.settings.redis_prefix) as broker:
            while not any(info.state == "ready" for info in await broker.workers()):
                if not self._process.is_alive() or time.monotonic() > end_s:
                    raise BenchmarkError(f"the worker with its engine in a {self.program} is not ready, see above")
                await asyncio.sleep(0.2)


# The clients, in a process of their own


@dataclass(frozen=True)
class Load:
    clients: int
    previews: bool = False

    def __str__(self) -> str:
        return f"{self.clients} {'client' if self.clients == 1 else 'clients'}{', previews' if self.previews else ''}"


@dataclass(frozen=True)
class Task:
    """What the clients of one turn do; `settings` are the worker's."""

    settings: WorkerSettings
    load: Load
    steps: int
    warmup_s: float
    seconds: float
    seed: int


@dataclass
class Seen:
    """What the clients saw: waits and step times of the pictures that count, numbers of all.

    Clients who share a batch are answered together, so pictures are counted from one answer to another: from the last
    one before the window, at `start_s`, to the last one in it, at `end_s`.
    """

    waits_ms: list[float] = field(default_factory=list)
    steps_ms: list[float] = field(default_factory=list)
    num_pictures: int = 0
    num_previews: int = 0
    start_s: float = 0.0
    end_s: float = 0.0

    @property
    def images_per_s(self) -> float:
        return len(self.waits_ms) / (self.end_s - self.start_s)


def run_clients(task: Task) -> Seen:
    return asyncio.run(ask_together(task))


async def ask_together(task: Task) -> Seen:
    async with RedisBroker(task.settings.redis_url, prefix=task.settings.redis_prefix) as broker:
        try:
            return await asyncio.wait_for(Clients(broker, task).run(), task.warmup_s + task.seconds + PATIENCE_S)
        except TimeoutError:
            raise BenchmarkError(f"{task.load}: some request has no answer") from None


class Clients:
    """A closed loop: each asks for its next picture when its last one is there."""

    def __init__(self, broker: RedisBroker, task: Task) -> None:
        self._broker, self._task = broker, task
        self._gateway_id = uuid.uuid4().hex
        self._jobs = endless_jobs(task, self._gateway_id)
        self._answered = asyncio.Semaphore(0)
        self._waiting: dict[str, asyncio.Future[Completed]] = {}
        self._seen = Seen()
        self._start_s = self._end_s = math.inf

    async def run(self) -> Seen:
        clients = (self._keep_asking() for _ in range(self._task.load.clients))
        await asyncio.gather(self._read_replies(), self._open_window(), *clients)
        await self._broker.drop_gateway(self._gateway_id)
        return self._seen

    async def _open_window(self) -> None:
        """After the warm-up, and not before as many answers as there are clients."""
        await asyncio.sleep(self._task.warmup_s)
        for _ in range(self._task.load.clients):
            await self._answered.acquire()
        self._start_s = time.perf_counter()
        self._end_s = self._start_s + self._task.seconds

    async def _keep_asking(self) -> None:
        while (asked_s := time.perf_counter()) < self._end_s:
            job = next(self._jobs)
            reply = self._waiting[job.request_id] = asyncio.get_running_loop().create_future()
            await self._broker.submit(job, Limits())
            completed = await reply
            self._note(completed, asked_s, time.perf_counter())

    def _note(self, completed: Completed, asked_s: float, answered_s: float) -> None:
        self._answered.release()
        self._seen.num_pictures += 1
        if answered_s < self._start_s:
            self._seen.start_s = answered_s
        elif answered_s < self._end_s:
            self._seen.end_s = answered_s
            self._seen.waits_ms.append((answered_s - asked_s) * 1000)
            self._seen.steps_ms += completed.timings.steps_ms

    async def _read_replies(self) -> None:
        after = "0"
        while self._waiting or time.perf_counter() < self._end_s:
            after, replies = await self._broker.read_replies(self._gateway_id, after)
            for reply in replies:
                match reply.event:
                    case Completed() as completed:
                        self._waiting.pop(completed.request_id).set_result(completed)
                    case Preview():
                        self._seen.num_previews += 1
                    case Accepted() | Started():
                        pass
                    case other:
                        raise BenchmarkError(f"{self._task.load}: a request ended with {other}")


def endless_jobs(task: Task, gateway_id: str) -> Iterator[Job]:
    """Each has a prompt of its own, so that no cache of texts helps."""
    spec = get_spec(load_catalog(), task.settings.models)
    asked = GenerationFields(prompt="-", num_inference_steps=task.steps, previews=task.load.previews)
    template = complete(asked, spec, Defaults(output_format="png"))
    for number, prompt in enumerate(endless_prompts(task.seed), task.seed * 1_000_000):
        params = replace(template, prompt=f"{prompt}, no. {number}", seed=number)
        yield Job(uuid.uuid4().hex, spec.name, params, "api", owner="benchmark", gateway_id=gateway_id, keep_s=0)


# Turns and figures


@dataclass(frozen=True)
class Turn:
    """One turn of one program, or the medians of several. `step_ms` is the engine's, `cpu_ms` per picture."""

    program: Program
    load: Load
    images_per_s: float
    p50_ms: float
    p95_ms: float
    step_ms: float
    cpu_ms: float
    previews_per_image: float


FIGURES = [figure.name for figure in fields(Turn)[2:]]
COLUMNS = ("load", "program", "images/s", "P50 ms", "P95 ms", "step ms", "CPU ms/picture", "previews/picture")


def main() -> None:
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that no worker is left behind
    try:
        measure(options)
    except BenchmarkError as error:
        sys.exit(f"benchmark failed: {error}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-lcm")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--preview-clients", type=int, nargs="*", default=[8], help="who also ask for previews")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="that count, of each turn")
    parser.add_argument("--warmup", type=float, default=1.5, help="seconds before them")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-process.json")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(EmbeddedRedis())
        contenders = [
            stack.enter_context(Contender(program, new_settings(options, redis.url, program))) for program in PROGRAMS
        ]
        pool = stack.enter_context(ProcessPoolExecutor(1, SPAWN))
        rounds = [turn for number in range(options.rounds) for turn in run_round(pool, contenders, options, number)]
    table = take_medians(rounds)
    verdict = judge(rounds)
    print(format_table(COLUMNS, (row_of(turn) for turn in table)))
    print(verdict)
    figures = {"medians": table, "verdict": verdict, "rounds": rounds}
    write_report(options.json, vars(options), figures)
    print(f"\nEvery round: {options.json}")


def new_settings(options: argparse.Namespace, redis_url: str, program: Program) -> WorkerSettings:
    """An hour is no hang here: whoever rests makes no progress."""
    prefix = f"benchmark-{program}"
    return WorkerSettings.load(redis_url=redis_url, redis_prefix=prefix, models=options.model, max_stall_s=3600)


def run_round(
    pool: Executor, contenders: Sequence[Contender], options: argparse.Namespace, number: int
) -> Iterator[Turn]:
    """Who goes first changes from round to round."""
    loads = [*map(Load, options.clients), *(Load(clients, previews=True) for clients in options.preview_clients)]
    for index, load in enumerate(loads):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            seed = 100 * number + index
            task = Task(contender.settings, load, options.steps, options.warmup, options.seconds, seed)
            yield run_turn(pool, contender, task)
    print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)


def run_turn(pool: Executor, contender: Contender, task: Task) -> Turn:
    with contender.awake() as meter:
        seen = pool.submit(run_clients, task).result()
        cpu_ms = sum(meter.read_ms(seen.num_pictures).values())
    if len(seen.waits_ms) < 2:
        raise BenchmarkError(f"only {len(seen.waits_ms)} pictures in {task.seconds:g} s: more --seconds are needed")
    cuts = statistics.quantiles(seen.waits_ms, n=100, method="inclusive")
    return Turn(
        program=contender.program,
        load=task.load,
        images_per_s=seen.images_per_s,
        p50_ms=cuts[49],
        p95_ms=cuts[94],
        step_ms=statistics.median(seen.steps_ms),
        cpu_ms=cpu_ms,
        previews_per_image=seen.num_previews / seen.num_pictures,
    )


def take_medians(rounds: Sequence[Turn]) -> list[Turn]:
    keys = dict.fromkeys((turn.load, program) for turn in rounds for program in PROGRAMS)
    return [take_median([turn for turn in rounds if (turn.load, turn.program) == key]) for key in keys]


def take_median(same: Sequence[Turn]) -> Turn:
    return replace(same[0], **{name: statistics.median(getattr(turn, name) for turn in same) for name in FIGURES})


def row_of(turn: Turn) -> list[str]:
    return [str(turn.load), turn.program, *(f"{getattr(turn, name):.1f}" for name in FIGURES)]


@dataclass(frozen=True)
class Ratio:
    """The process's images/s by the thread's; `error` is the standard error of its logarithm."""

    log: float
    error: float

    def __str__(self) -> str:
        return f"{math.exp(self.log):.3f} ± {math.exp(self.log) * self.error:.3f}"


def judge(rounds: Sequence[Turn]) -> str:
    """Which is better, by images/s. Each turn is held against the other program's of the same load and round."""
    thread, process = ([turn for turn in rounds if turn.program == program] for program in PROGRAMS)
    pairs = list(zip(thread, process, strict=True))
    loads = dict.fromkeys(turn.load for turn in thread)
    ratios = {load: compare([pair for pair in pairs if pair[0].load == load]) for load in loads}
    error = math.hypot(*(ratio.error for ratio in ratios.values())) / len(ratios)
    overall = Ratio(statistics.mean(ratio.log for ratio in ratios.values()), error)
    cpu = statistics.geometric_mean(theirs.cpu_ms / ours.cpu_ms for ours, theirs in pairs)
    by_load = ", ".join(f"{load}: {ratio}" for load, ratio in ratios.items())
    figures = f"{overall} times the thread's images/s ({by_load}) for {cpu:.2f} times its CPU time per picture"
    return f"Better: {name_better(overall)}. The process gives {figures}."


def compare(pairs: Sequence[tuple[Turn, Turn]]) -> Ratio:
    logs = [math.log(theirs.images_per_s / ours.images_per_s) for ours, theirs in pairs]
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    return Ratio(statistics.mean(logs), error)


def name_better(ratio: Ratio) -> str:
    if abs(ratio.log) <= MIN_SIGMAS * ratio.error:
        return "neither"
    return "process" if ratio.log > 0 else "thread"


if __name__ == "__main__":
    main()
