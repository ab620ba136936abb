"""The worker: startup, main_loop, shutdown.

The event loop only talks to Redis; the device belongs to the engine thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Literal, cast

import torch

from broker.errors import BrokerError, BrokerUnavailable
from broker.messages import Abort, Delivery, WorkerInfo
from broker.redis_broker import RedisBroker
from broker.renewal import LeaseRenewer
from broker.settings import SettingsError
from models.catalog import CatalogError, ModelSpec, get_spec, load_catalog
from models.compiling.cache import PackageCache
from models.compiling.compiler import Compiler
from models.loading import default_device, default_dtype, load_pipeline
from models.networks import Networks
from workers.engine import Engine, EngineOutput, PreviewReady
from workers.engine.calibration import batch_sizes
from workers.engine.runner import ModelRunner
from workers.engine_thread import EngineThread
from workers.holdings import Holdings
from workers.metrics import WorkerMetrics
from workers.publisher import Publisher
from workers.reading import take_over
from workers.settings import WorkerSettings, new_worker_id
from workers.warm_set import MemoryBudget, Report, WarmSet

logger = logging.getLogger(__name__)

HEARTBEAT_S, MIN_HEARTBEAT_S = 3.0, 0.2
STALL_FACTOR = 5
ENGINE_STOP_S = 20.0  # a step, or the loading of a file, can't be interrupted


class WorkerState(enum.Enum):
    NEW = "new"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class EngineLost(Exception):
    """The engine has died or hangs: only a new process helps."""


class Worker:
    """One device and the models it keeps warm. `report(model, detail)` hears of each stage of the start, the last of
    which is "warm" or "failed"; it is called on the engine thread."""

    def __init__(self, settings: WorkerSettings, report: Report = lambda *_: None) -> None:
        self.settings = settings
        self.worker_id = new_worker_id()
        self.metrics = WorkerMetrics()
        self.state = WorkerState.NEW
        catalog = load_catalog(settings.catalog, settings.extra_catalog)
        self._specs = {name: get_spec(catalog, name) for name in settings.model_names}
        self._device, self._dtype = place(settings)
        self._report_to = report
        self._detail = ""
        self._holdings = Holdings(self._specs)
        self._revisions: dict[str, str] = {}
        self._networks = Networks()
        self._compiler = make_compiler(settings)
        self._has_room = {name: asyncio.Event() for name in self._specs}
        self._has_news = asyncio.Event()
        self._stop = asyncio.Event()
        self._publishing: set[asyncio.Task[None]] = set()
        self._heard_until = "0"  # how far the aborts were read
        self._broker = RedisBroker(settings.redis_url, prefix=settings.redis_prefix)
        self._warm_set = WarmSet(
            self._specs,
            self._load,
            device=self._device,
            dtype_of=lambda spec: _name_of(self._dtype_of(spec)),
            make_budget=lambda: MemoryBudget(self._device, settings.memory_gib, settings.lock_file),
            metrics=self.metrics,
            on_warm=self._welcome,
            on_change=self._tell_news,
            report=self._report,
        )
        self._engine = EngineThread(self._build_engine, self._hand_over, self._prepare)
        if self._compiler is not None:
            self.metrics.watch_compiler(self._compiler)
        self._renewer = LeaseRenewer(
            settings.redis_url,
            settings.redis_prefix,
            self.worker_id,
            settings.lease_s,
            self._renewable,
            self._hear_from_renewer,
        )
        self._publisher = Publisher(
            self._broker,
            self.worker_id,
            self._holdings,
            self.metrics,
            self._revisions,
            settings.encode_threads,
        )

    # Lifecycle

    async def serve(self) -> None:
        """Runs until `request_stop`. Raises NothingToServe, SettingsError or BrokerError when the start fails,
        EngineLost whenever the device or its thread is lost."""
        async with self._broker:
            try:
                await self.startup()
                await self.main_loop()
            except ExceptionGroup as group:
                if lost := group.subgroup(EngineLost):
                    raise lost.exceptions[0] from None
                raise
            finally:
                await self.shutdown()

    def request_stop(self) -> None:
        self._stop.set()

    def reload(self) -> None:
        """Reads the catalog again and takes over what a running worker can. A catalog that can't be read changes
        nothing. To be called on the event loop's thread."""
        try:
            catalog = load_catalog(self.settings.catalog, self.settings.extra_catalog)
        except CatalogError as error:
            logger.error("the catalog stays as it was: %s", error)
            return
        self._specs = specs = take_over(self._specs, catalog)
        self._engine.call(lambda _: self._warm_set.update(specs))

    async def startup(self) -> None:
        """Until one model is warm. The engine thread loads them all; the registry shows the progress."""
        self._enter(WorkerState.NEW, WorkerState.STARTING)
        self._loop = asyncio.get_running_loop()
        self._serve_metrics()
        self._engine.start()
        while not (self._warm_set.ready.done() or self._engine.ended.done() or self._stop.is_set()):
            try:
                await self._heartbeat()
            except BrokerUnavailable as error:
                logger.warning("Redis is away while the models load: %s", error)
            await asyncio.sleep(0.2)
        if self._engine.ended.done():
            raise EngineLost(f"the engine has died: {self._engine.ended.exception()!r}")
        if not self._stop.is_set():
            self._warm_set.ready.result()

    async def main_loop(self) -> None:
        """Receives, computes and publishes until asked to stop, then lets running requests finish."""
        if self._stop.is_set():
            return
        self._enter(WorkerState.STARTING, WorkerState.READY)
        self._renewer.start()
        self._hear_news()
        async with asyncio.TaskGroup() as background:
            receivers = [
                background.create_task(_keep_doing(self._receive, name, until=self._stop)) for name in self._specs
            ]
            reclaim = background.create_task(_keep_doing(self._reclaim))
            lasting = [
                background.create_task(_keep_doing(work))
                for work in (self._beat, self._obey_aborts, self._watch_engine)
            ]
            await self._stop.wait()
            self._enter(WorkerState.READY, WorkerState.DRAINING)
            self._warm_set.give_up()
            # Take nothing new. A read under way is not cancelled: what it was just given would be lost.
            reclaim.cancel()
            for has_room in self._has_room.values():
                has_room.set()
            await asyncio.wait(receivers)
            # Let what runs finish; leases are renewed and aborts obeyed meanwhile.
            await self._drain()
            for task in lasting:
                task.cancel()

    async def shutdown(self) -> None:
        """Gives back what is unfinished and leaves the registry."""
        if self.state is WorkerState.STOPPED:
            return
        self.state = WorkerState.STOPPED
        self._stop.set()  # a start under way gives up at its next stage
        await asyncio.to_thread(self._renewer.stop)
        # Unfinished requests go back to the head of their lines; this doesn't count as an attempt.
        unfinished = self._holdings.request_ids
        for request_id in unfinished:
            self._holdings.release(request_id)
        try:
            if unfinished:
                logger.warning("handing back %d unfinished requests", len(unfinished))
                await self._broker.hand_back(self.worker_id, unfinished)
            await self._broker.unregister(self.worker_id)
        except BrokerError as error:
            logger.warning("left without saying goodbye: %s", error)
        if self._compiler is not None:
            await asyncio.to_thread(self._compiler.stop)
        await asyncio.to_thread(self._engine.stop, ENGINE_STOP_S)
        self._publisher.close()

    def _serve_metrics(self) -> None:
        host, port = self.settings.worker_metrics_host, self.settings.worker_metrics_port
        if not port:
            return
        try:
            self.metrics.serve(host, port)
        except OSError as error:
            message = f"FEWSTEP_WORKER_METRICS_PORT={port}: can't listen on {host}:{port}: {error.strerror}"
            raise SettingsError(message) from error

    async def _drain(self) -> None:
        deadline_s = time.monotonic() + self.settings.drain_s
        while self._publishing or self._holdings.request_ids:
            if time.monotonic() > deadline_s:
                return
            await asyncio.sleep(0.02)

    def _enter(self, expected: WorkerState, state: WorkerState) -> None:
        assert self.state is expected, f"{state} follows {expected}, not {self.state}"
        self.state = state

    # On the engine thread

    def _build_engine(self) -> Engine:
        if self._device.type == "cuda":
            # Steps go before the decodes of workers/engine/decoding.py, which have the default priority 0.
            torch.cuda.set_stream(cast(Any, torch.cuda.Stream)(self._device, priority=-1))
        return Engine({}, self.metrics.observe_step)

    def _prepare(self, engine: Engine) -> Iterator[None]:
        """Compiling would slow down what has yet to become warm."""
        yield from self._warm_set.start(engine)
        if self._compiler is not None:
            self._compiler.start()

    def _dtype_of(self, spec: ModelSpec) -> torch.dtype:
        return default_dtype(self._device, spec) if self.settings.dtype == "auto" else self._dtype

    def _load(self, spec: ModelSpec) -> ModelRunner:
        pipeline = load_pipeline(
            spec,
            self._device,
            self._dtype_of(spec),
            cuda_graphs=self.settings.cuda_graphs,
            networks=self._networks,
            lock_file=self.settings.lock_file,
            max_loras=self.settings.max_loras,
            compiler=self._compiler,
        )
        padded = batch_sizes(spec, self._device) if self._device.type == "cuda" else None
        return ModelRunner(pipeline, padded)

    def _welcome(self, runner: ModelRunner) -> None:
        """Counts what a proven model does from now on; its warm-up doesn't count."""
        runner.observe_prompts = self.metrics.observe_prompts
        runner.observe_check = self.metrics.observe_check
        self.metrics.watch_loras(runner.pipeline.spec.name, runner)
        logger.info("ready: %s on %s in %s", runner.pipeline.spec.name, self._device, _name_of(runner.pipeline.dtype))

    def _report(self, model: str, detail: str) -> None:
        self._detail = f"{model}: {detail}"
        self._report_to(model, detail)

    def _tell_news(self) -> None:
        self._loop.call_soon_threadsafe(self._hear_news)

    def _hand_over(self, outputs: list[EngineOutput]) -> None:
        self._loop.call_soon_threadsafe(self._handle, outputs)

    # From Redis to the engine

    async def _receive(self, model: str) -> None:
        await self._has_room[model].wait()
        if room := self._holdings.room(model):
            await self._take(await self._broker.receive(self.worker_id, model, room))
        else:
            self._has_room[model].clear()

    def _hear_news(self) -> None:
        """Takes requests for what has become warm, and lets the registry know."""
        for warm in self._warm_set.warm_models:
            self._holdings.max_rows[warm.model] = max(costs.max_rows for costs in warm.sizes)
            self._revisions[warm.model] = warm.revision
        self._tell_room()
        self._has_news.set()

    def _tell_room(self) -> None:
        for model, has_room in self._has_room.items():
            if self._holdings.room(model):
                has_room.set()

    async def _reclaim(self) -> None:
        await asyncio.sleep(self.settings.lease_s / 2 * random.uniform(0.8, 1.2))
        for name in self._specs:
            if room := self._holdings.room(name):
                await self._take(await self._broker.reclaim(self.worker_id, name, self.settings.lease_s, room))

    async def _take(self, deliveries: list[Delivery]) -> None:
        """Gives the engine what fits. The queue counts requests and the engine rows: what is too much goes back."""
        surplus: list[str] = []
        for delivery in deliveries:
            if not self._holdings.has_room_for(delivery):
                surplus.append(delivery.job.request_id)
                continue
            self._holdings.take(delivery)
            self.metrics.redeliveries.inc(delivery.attempt > 1)
            self._engine.add(delivery)
        self.metrics.running.set(self._holdings.num_rows)
        if surplus:
            await self._broker.hand_back(self.worker_id, surplus)

    async def _obey_aborts(self) -> None:
        self._heard_until, aborts = await self._broker.read_aborts(self.worker_id, self._heard_until)
        for abort in aborts:
            self._obey(abort)

    def _obey(self, abort: Abort) -> None:
        if abort.reason == "lost":
            self._holdings.release(abort.request_id)
            self._broker.forget(self.worker_id, abort.request_id)
        self._engine.abort(abort)

    # From the engine to Redis

    def _handle(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            if isinstance(output, PreviewReady):
                self._publish(self._publisher.publish_preview(output))
            else:
                self._holdings.free_rows(output.request.request_id)
                self._publish(self._publisher.publish_ending(output))
        self.metrics.running.set(self._holdings.num_rows)
        self._tell_room()

    def _publish(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._publishing.add(task)
        task.add_done_callback(self._published)

    def _published(self, task: asyncio.Task[None]) -> None:
        self._publishing.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("publishing failed", exc_info=error)

    # Background

    async def _beat(self) -> None:
        self._has_news.clear()
        await self._heartbeat()
        if self._device.type == "cuda":
            self.metrics.gpu_memory.set(torch.cuda.memory_allocated(self._device))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S):
                await self._has_news.wait()
        await asyncio.sleep(MIN_HEARTBEAT_S)  # warming has news many times a second

    async def _watch_engine(self) -> None:
        """A worker without a working engine must not go on taking work."""
        if self._engine.ended.done():
            raise EngineLost(f"the engine has died: {self._engine.ended.exception()!r}")
        if self._is_hung():
            raise EngineLost(f"the engine hangs: a step has run for more than {self.max_step_s:g} s")
        await asyncio.sleep(1.0)

    def _is_hung(self) -> bool:
        return self._engine.is_stalled(self.max_step_s)

    @property
    def max_step_s(self) -> float:
        """What takes longer is a hang: never less than several times the slowest step, decode and check that warm-up
        saw."""
        measured = [costs for warm in self._warm_set.warm_models for costs in warm.sizes]
        slowest_ms = [
            max(costs.step_ms.values()) + max(costs.decode_ms.values()) + max(costs.check_ms.values(), default=0.0)
            for costs in measured
        ]
        return max(self.settings.max_stall_s, STALL_FACTOR * max(slowest_ms, default=0.0) / 1000)

    async def _heartbeat(self) -> None:
        states: dict[WorkerState, Literal["ready", "draining"]] = {
            WorkerState.READY: "ready",
            WorkerState.DRAINING: "draining",
        }
        await self._broker.register(
            WorkerInfo(
                worker_id=self.worker_id,
                state=states.get(self.state, "starting"),
                device=str(self._device),
                dtype=_name_of(self._dtype),
                warm_models=self._warm_set.warm_models,
                num_running=self._holdings.num_running,
                detail="" if self.state in states else self._detail,
                models=self._warm_set.statuses,
            )
        )

    def _hear_from_renewer(self, abort: Abort) -> None:
        """A cancel or a lost lease; called on the renewer's thread."""
        self._loop.call_soon_threadsafe(self._obey, abort)

    def _renewable(self) -> list[str]:
        """What this worker still works on; nothing when the engine hangs, so that others may take it over."""
        return [] if self._is_hung() else self._holdings.request_ids


def place(settings: WorkerSettings) -> tuple[torch.device, torch.dtype]:
    """Where and in what the models compute. Raises SettingsError for a device that isn't there."""
    try:
        device = default_device() if settings.device == "auto" else torch.device(settings.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"FEWSTEP_DEVICE={settings.device!r}: {str(error).splitlines()[0]}") from error
    dtype: torch.dtype = default_dtype(device) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return device, dtype


def make_compiler(settings: WorkerSettings) -> Compiler | None:
    return Compiler(PackageCache(settings.compile_cache.expanduser())) if settings.compile else None


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


async def _keep_doing(
    work: Callable[..., Awaitable[None]], *arguments: Any, until: asyncio.Event | None = None
) -> None:
    """Again and again, with a pause while Redis is away; where `until` is given, till it is set."""
    while until is None or not until.is_set():
        try:
            await work(*arguments)
        except BrokerUnavailable as error:
            logger.warning("Redis is away: %s", error)
            await asyncio.sleep(random.uniform(0.3, 1.0))
