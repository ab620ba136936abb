"""A real Worker on a real Redis, with a small model of random weights."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client import generate_latest

from broker.embedded import EmbeddedRedis
from broker.errors import RequestNotFound
from broker.messages import Cancelled, Completed, Expired, Failed, Job, JobEvent, Preview, Started, TerminalEvent
from broker.redis_broker import RedisBroker
from broker.settings import SettingsError
from broker.terms import Limits
from models.catalog import ModelSpec, SchedulerSpec
from tests.jobs import make_job, make_warm
from tests.service import spawn
from tests.small_models import small_spec, write_catalog, write_small_catalog
from workers.settings import WorkerSettings
from workers.warm_set import NothingToServe, WarmSet
from workers.worker import EngineLost, Worker


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_catalog(tmp_path_factory.mktemp("catalog"))


@pytest.fixture
def settings(redis_url: str, prefix: str, catalog: Path) -> WorkerSettings:
    return WorkerSettings(redis_url=redis_url, redis_prefix=prefix, catalog=catalog, models="small", lease_s=1.0)


@asynccontextmanager
async def running(settings: WorkerSettings, broker: RedisBroker) -> AsyncIterator[Worker]:
    worker = Worker(settings)
    task = asyncio.create_task(worker.serve())
    try:
        await until(lambda: is_ready(broker), task)
        yield worker
    finally:
        worker.request_stop()
        await task


async def is_ready(broker: RedisBroker) -> bool:
    return any(info.state == "ready" for info in await broker.workers())


async def until(
    condition: Callable[[], Awaitable[bool]], task: asyncio.Task[None] | None = None, timeout_s: float = 30
) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            if task is not None and task.done():
                task.result()
            await asyncio.sleep(0.02)


async def submit(broker: RedisBroker, *jobs: Job) -> None:
    for job in jobs:
        await broker.submit(job, Limits())


async def events_of(broker: RedisBroker, *jobs: Job, timeout_s: float = 30) -> dict[str, list[JobEvent]]:
    """All events of the jobs, until each has ended: the log first, since replies alone tell nothing of progress."""
    events: dict[str, dict[int, JobEvent]] = {}
    for job in jobs:
        log = await broker.attach(job.request_id, "gateway")
        events[job.request_id] = {logged.seq: logged.event for logged in log}
    after = "0"
    async with asyncio.timeout(timeout_s):
        while not all(isinstance(event_by_seq[max(event_by_seq)], TerminalEvent) for event_by_seq in events.values()):
            after, replies = await broker.read_replies("gateway", after)
            for logged in replies:
                events[logged.event.request_id][logged.seq] = logged.event
    return {request_id: [by_seq[seq] for seq in sorted(by_seq)] for request_id, by_seq in events.items()}


async def test_a_job_becomes_a_picture(settings: WorkerSettings, broker: RedisBroker) -> None:
    job = make_job(previews=True, num_images=2)
    async with running(settings, broker) as worker:
        await submit(broker, job)
        accepted, started, *previews, completed = (await events_of(broker, job))[job.request_id]
    assert accepted.type == "accepted"
    assert isinstance(started, Started)
    assert started.worker_id == worker.worker_id
    assert previews
    assert all(isinstance(preview, Preview) and preview.step < 4 for preview in previews)
    assert isinstance(completed, Completed)
    assert [(picture.index, picture.seed) for picture in completed.pictures] == [(0, 7), (1, 8)]
    with Image.open(io.BytesIO(completed.pictures[0].data)) as image:
        assert (image.format, image.size) == ("PNG", (32, 32))
    timings = completed.timings
    assert len(timings.steps_ms) == 4
    parts = timings.queue_ms + timings.text_ms + timings.denoise_ms + timings.decode_ms + timings.encode_ms
    assert 0 < parts <= timings.total_ms + 1
    assert min(timings.text_ms, timings.denoise_ms, timings.decode_ms, timings.encode_ms) > 0


async def test_warmth_is_shown_in_the_registry_and_ends_with_the_worker(
    settings: WorkerSettings, broker: RedisBroker
) -> None:
    async with running(settings, broker):
        (info,) = await broker.workers()
        assert [warm.model for warm in info.warm_models] == ["small"]
        assert list(info.warm_models[0].sizes[0].step_ms) == [1, 2, 4, 8]
    assert await broker.workers() == []


async def test_many_jobs_of_different_kinds(settings: WorkerSettings, broker: RedisBroker) -> None:
    kinds: list[dict[str, Any]] = [
        {"num_inference_steps": 1},
        {"scheduler": "ddim"},
        {"width": 48},
        {"guidance_scale": 2.0},
        {"seed": 3},
    ]
    jobs = [make_job(**kinds[i % len(kinds)]) for i in range(30)]
    async with running(settings, broker):
        await submit(broker, *jobs)
        events = await events_of(broker, *jobs)
    assert all(isinstance(log[-1], Completed) for log in events.values())
    assert all(sum(isinstance(event, TerminalEvent) for event in log) == 1 for log in events.values())


async def test_a_running_request_is_cancelled(settings: WorkerSettings, broker: RedisBroker) -> None:
    job = make_job(num_inference_steps=50, num_images=4)
    async with running(settings, broker):
        await submit(broker, job)
        await until(lambda: has_started(broker, job))
        await broker.cancel(job.request_id)
        events = await events_of(broker, job)
    assert isinstance(events[job.request_id][-1], Cancelled)


async def test_a_deadline_that_passes_while_it_runs_ends_a_request(
    settings: WorkerSettings, broker: RedisBroker
) -> None:
    late = replace(make_job(num_inference_steps=50, num_images=4), deadline_ms=100)
    in_time = replace(make_job(), deadline_ms=60_000)
    async with running(settings, broker):
        await submit(broker, late, in_time)
        events = await events_of(broker, late, in_time)
    assert isinstance(events[late.request_id][-1], Expired)
    assert isinstance(events[in_time.request_id][-1], Completed)


async def test_two_models_share_a_worker(settings: WorkerSettings, broker: RedisBroker, tmp_path: Path) -> None:
    catalog = write_small_catalog(tmp_path, names=("small", "other"))
    both = settings.model_copy(update={"catalog": catalog, "models": "small,other"})
    jobs = [make_job(model=model, seed=seed) for seed in range(6) for model in ("small", "other")]
    async with running(both, broker) as worker:
        await until(lambda: are_warm(broker, "small", "other"))
        await submit(broker, *jobs)
        events = await events_of(broker, *jobs)
        rows = {model: worker.metrics.rows.labels(model)._value.get() for model in ("small", "other")}
    assert all(isinstance(log[-1], Completed) for log in events.values())
    assert rows == {"small": 24, "other": 24}, "warm-up doesn't count"


async def are_warm(broker: RedisBroker, *models: str) -> bool:
    return [warm.model for info in await broker.workers() for warm in info.warm_models] == list(models)


async def test_a_damaged_second_model_leaves_the_first_to_serve(
    settings: WorkerSettings, broker: RedisBroker, tmp_path: Path
) -> None:
    """Whole: requests of the first are answered, those of the other wait for a worker that has it."""
    catalog = write_damaged_catalog(tmp_path)
    both = settings.model_copy(update={"catalog": catalog, "models": "damaged,small"})
    good, bad = make_job(), make_job(model="damaged")
    async with running(both, broker):
        await submit(broker, good, bad)
        events = await events_of(broker, good)
        (info,) = await broker.workers()
        assert (await broker.status(bad.request_id)).state == "queued"
    assert isinstance(events[good.request_id][-1], Completed)
    assert [(status.model, status.state) for status in info.models] == [("damaged", "failed"), ("small", "warm")]
    assert "is not a sound safetensors file" in info.models[0].detail


def write_damaged_catalog(root: Path) -> Path:
    """Of two models: "small", and "damaged" with a UNet that is cut short."""
    specs = [small_spec(root, name=name, lora=None, max_batch_size=8) for name in ("small", "damaged")]
    folder = Path(shutil.copytree(root / "sd", root / "damaged"))
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    return write_catalog(root / "catalog.toml", [specs[0], specs[1].model_copy(update={"source": str(folder)})])


class TestReload:
    @pytest.fixture
    def specs(self, tmp_path: Path) -> dict[str, ModelSpec]:
        return {"small": small_spec(tmp_path, lora=None, max_batch_size=8)}

    @pytest.fixture
    def own(self, settings: WorkerSettings, specs: dict[str, ModelSpec], tmp_path: Path) -> WorkerSettings:
        path = write_catalog(tmp_path / "own.toml", list(specs.values()))
        return settings.model_copy(update={"catalog": path})

    async def test_limits_and_schedulers_are_taken_over(
        self, own: WorkerSettings, specs: dict[str, ModelSpec], broker: RedisBroker, caplog: pytest.LogCaptureFixture
    ) -> None:
        few = SchedulerSpec(class_name="UniPCMultistepScheduler")
        now = specs["small"].model_copy(
            update={
                "sizes": [*specs["small"].sizes, (32, 48)],
                "schedulers": specs["small"].schedulers | {"uni-pc": few},
                "source": "/elsewhere",
                "max_batch_size": 16,
            }
        )
        job = make_job(scheduler="uni-pc", height=48)
        before = make_job(scheduler="ddim", num_inference_steps=20)
        async with running(own, broker) as worker:
            await submit(broker, before)
            write_catalog(own.catalog, [now])
            with caplog.at_level(logging.INFO):
                worker.reload()
            await submit(broker, job)
            events = await events_of(broker, before, job)
        assert isinstance(events[before.request_id][-1], Completed)
        assert isinstance(events[job.request_id][-1], Completed)
        told = [record.getMessage() for record in caplog.records if record.name == "workers.reading"]
        assert told == [
            "small: max_batch_size, source of the catalog changed: that needs a new start of this worker",
            "small: the catalog was read again, changed: schedulers, sizes",
        ]

    async def test_a_catalog_that_cannot_be_read_changes_nothing(
        self, own: WorkerSettings, broker: RedisBroker, caplog: pytest.LogCaptureFixture
    ) -> None:
        job = make_job()
        async with running(own, broker) as worker:
            own.catalog.write_text("[small\n", encoding="utf-8")
            worker.reload()
            await submit(broker, job)
            events = await events_of(broker, job)
        assert isinstance(events[job.request_id][-1], Completed)
        [record] = [record for record in caplog.records if record.name == "workers.worker"]
        assert record.getMessage().startswith(f"the catalog stays as it was: {own.catalog}: ")

    async def test_a_model_that_left_the_catalog_stays(
        self, own: WorkerSettings, specs: dict[str, ModelSpec], broker: RedisBroker, caplog: pytest.LogCaptureFixture
    ) -> None:
        job = make_job()
        async with running(own, broker) as worker:
            write_catalog(own.catalog, [specs["small"].model_copy(update={"name": "another"})])
            worker.reload()
            await submit(broker, job)
            assert isinstance((await events_of(broker, job))[job.request_id][-1], Completed)
        assert "small is gone from the catalog" in caplog.text


async def has_started(broker: RedisBroker, job: Job) -> bool:
    return (await broker.status(job.request_id)).state == "running"


async def test_a_request_that_the_model_cannot_do_fails_with_words(
    settings: WorkerSettings, broker: RedisBroker
) -> None:
    bad, good = make_job(num_inference_steps=51), make_job()
    async with running(settings, broker):
        await submit(broker, bad, good)
        events = await events_of(broker, bad, good)
    failed = events[bad.request_id][-1]
    assert isinstance(failed, Failed)
    assert failed.error.code == "internal_error"
    assert isinstance(events[good.request_id][-1], Completed)


async def test_a_drain_finishes_what_runs_and_leaves_the_rest(settings: WorkerSettings, broker: RedisBroker) -> None:
    jobs = [make_job(num_inference_steps=20) for _ in range(40)]
    async with running(settings, broker) as worker:
        await submit(broker, *jobs)
        await until(lambda: has_started(broker, jobs[0]))
        worker.request_stop()
    states = [(await broker.status(job.request_id)).state for job in jobs]
    assert states[0] == "completed"
    assert states[-1] == "queued"
    assert set(states) == {"completed", "queued"}


async def test_a_drain_that_takes_too_long_hands_back_without_counting_an_attempt(
    settings: WorkerSettings, broker: RedisBroker
) -> None:
    job = make_job(num_inference_steps=500, num_images=4, scheduler="ddim")
    async with running(settings.model_copy(update={"drain_s": 0.0}), broker) as worker:
        await submit(broker, job)
        await until(lambda: has_started(broker, job))
        worker.request_stop()
    assert (await broker.status(job.request_id)).state == "queued"
    async with running(settings, broker):
        events = await events_of(broker, job)
    assert [event.attempt for event in events[job.request_id] if isinstance(event, Started)] == [1, 1]
    assert isinstance(events[job.request_id][-1], Completed)


async def test_sigkill_of_the_worker_and_the_request_finishes_elsewhere(
    settings: WorkerSettings, broker: RedisBroker, tmp_path: Path
) -> None:
    job = replace(make_job(num_inference_steps=50, num_images=4), keep_s=60)
    process = spawn(
        "worker",
        log=tmp_path / "worker.log",
        FEWSTEP_REDIS_URL=settings.redis_url,
        FEWSTEP_REDIS_PREFIX=settings.redis_prefix,
        FEWSTEP_CATALOG=str(settings.catalog),
        FEWSTEP_MODELS="small",
        FEWSTEP_LEASE_S="1",
    )
    try:
        await until(lambda: is_ready(broker), timeout_s=60)
        await submit(broker, job)
        await until(lambda: has_started(broker, job))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
        assert (await broker.status(job.request_id)).state == "running"
        async with running(settings, broker):
            events = (await events_of(broker, job))[job.request_id]
    finally:
        process.kill()
        process.wait()
    assert [event.attempt for event in events if isinstance(event, Started)] == [1, 2]
    assert isinstance(events[-1], Completed)


async def test_a_damaged_weight_file_is_named(settings: WorkerSettings, tmp_path: Path) -> None:
    catalog = write_small_catalog(tmp_path)
    weights = next((tmp_path / "sd" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(NothingToServe, match=r"small: .*unet.*is not a sound safetensors file"):
        await Worker(settings.model_copy(update={"catalog": catalog})).serve()


async def test_results_are_gone_after_their_time(settings: WorkerSettings, broker: RedisBroker) -> None:
    job = replace(make_job(), keep_s=0.2)
    async with running(settings, broker):
        await submit(broker, job)
        await events_of(broker, job)
        await asyncio.sleep(0.4)
    with pytest.raises(RequestNotFound):
        await broker.status(job.request_id)


async def test_a_stop_while_it_starts(settings: WorkerSettings, broker: RedisBroker) -> None:
    worker = Worker(settings)
    task = asyncio.create_task(worker.serve())
    await until(lambda: is_registered(broker), task)
    worker.request_stop()
    await task
    assert await broker.workers() == []


async def is_registered(broker: RedisBroker) -> bool:
    return bool(await broker.workers())


async def test_a_request_that_cannot_be_encoded_fails(
    settings: WorkerSettings, broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr("workers.publisher.encode_picture", refuse)
    job = make_job()
    async with running(settings, broker):
        await submit(broker, job)
        events = await events_of(broker, job)
    assert isinstance(events[job.request_id][-1], Failed)


async def test_rows_beyond_one_batch_go_back_to_the_queue(settings: WorkerSettings, broker: RedisBroker) -> None:
    jobs = [make_job(num_images=4, scheduler="ddim", num_inference_steps=40) for _ in range(12)]
    async with running(settings, broker) as worker:
        await submit(broker, *jobs)
        await until(lambda: has_started(broker, jobs[0]))
        assert worker._holdings.num_rows <= 8
        events = await events_of(broker, *jobs, timeout_s=60)
    assert all(isinstance(log[-1], Completed) for log in events.values())
    assert {event.attempt for log in events.values() for event in log if isinstance(event, Started)} == {1}


async def test_a_worker_whose_engine_died_ends(
    settings: WorkerSettings, broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise RuntimeError("the device is lost")

    with pytest.raises(EngineLost, match="the device is lost"):
        async with running(settings, broker):
            monkeypatch.setattr("workers.engine.runner.ModelRunner.ensure_device", die)
            monkeypatch.setattr("workers.engine.engine.Engine._run", die)
            await submit(broker, make_job())
            await asyncio.sleep(5)
    assert await broker.workers() == []


async def test_a_worker_whose_engine_hangs_ends_and_its_request_can_run_elsewhere(
    settings: WorkerSettings, broker: RedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over = threading.Event()
    job = make_job()
    monkeypatch.setattr("workers.worker.ENGINE_STOP_S", 0.1)
    with pytest.raises(EngineLost, match="hangs"):
        async with running(settings.model_copy(update={"max_stall_s": 1.0}), broker):
            with monkeypatch.context() as patch:
                patch.setattr("workers.engine.engine.Engine._run", lambda *_: is_over.wait(60) and [])
                await submit(broker, job)
                await asyncio.sleep(5)
    is_over.set()
    assert (await broker.status(job.request_id)).state == "queued"


async def test_redis_is_away_for_a_moment(tmp_path: Path, catalog: Path, prefix: str) -> None:
    with EmbeddedRedis(tmp_path) as server:
        settings = WorkerSettings(
            redis_url=server.url, redis_prefix=prefix, catalog=catalog, models="small", lease_s=1.0
        )
        async with RedisBroker(server.url, prefix=prefix) as broker, running(settings, broker):
            server.kill()
            await asyncio.sleep(0.5)
            server.start()
            job = make_job()
            await submit(broker, job)
            events = await events_of(broker, job)
        assert isinstance(events[job.request_id][-1], Completed)


def test_a_slow_model_is_not_taken_for_a_hang(settings: WorkerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(settings)
    assert worker.max_step_s == settings.max_stall_s
    warm = make_warm(step_ms={1: 1000.0, 8: 30_000.0}, decode_ms={1: 2000.0, 8: 10_000.0})
    monkeypatch.setattr(WarmSet, "warm_models", (warm,))
    assert worker.max_step_s == 200.0


async def test_a_taken_metrics_port_is_named(settings: WorkerSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"FEWSTEP_WORKER_METRICS_PORT={port}.*in use"):
            await Worker(settings.model_copy(update={"worker_metrics_port": port})).serve()


async def test_a_worker_that_cannot_compile_says_so_once_it_serves(
    settings: WorkerSettings,
    broker: RedisBroker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    own = settings.model_copy(update={"compile": True, "compile_cache": tmp_path / "cache"})
    async with running(own, broker) as worker:
        assert "fewstep_networks_to_compile 1.0" in generate_latest(worker.metrics.registry).decode()

        async def has_told() -> bool:
            return any("install g++" in message for message in caplog.messages)

        await until(has_told, timeout_s=120)
        job = make_job()
        await submit(broker, job)
        events = await events_of(broker, job)
        assert isinstance(events[job.request_id][-1], Completed)
        assert "fewstep_networks_to_compile 0.0" in generate_latest(worker.metrics.registry).decode()


def test_compiled_networks_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWSTEP_COMPILE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert WorkerSettings(compile_cache="").compile_cache == Path("/somewhere/fewstep/compiled")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert WorkerSettings().compile_cache == Path("~/.cache/fewstep/compiled")
