"""From the engine's outputs to Redis: encodes pictures off the engine thread, publishes previews and endings."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from broker.errors import BrokerUnavailable
from broker.messages import (
    CONTENT_BLOCKED,
    Cancelled,
    Completed,
    Expired,
    Failed,
    Job,
    JobError,
    Picture,
    Preview,
    Superseded,
    TerminalEvent,
    Timings,
)
from broker.redis_broker import RedisBroker
from models.networks import LoadError
from workers.engine import Aborted, Blocked, Finished, GenerationFailed, PreviewReady
from workers.engine.outputs import Pixels
from workers.engine.request import RequestState
from workers.holdings import Holdings
from workers.images import encode_picture
from workers.metrics import WorkerMetrics

logger = logging.getLogger(__name__)

PREVIEW_QUALITY = 85
Ending = Finished | Blocked | Aborted | GenerationFailed
STOPPED: dict[str, type[Cancelled | Superseded | Expired]] = {
    "cancelled": Cancelled,
    "newer": Superseded,
    "expired": Expired,
}


class Publisher:
    """`revisions` is what each model's responses call `model_revision`."""

    def __init__(
        self,
        broker: RedisBroker,
        worker_id: str,
        holdings: Holdings,
        metrics: WorkerMetrics,
        revisions: Mapping[str, str],
        num_threads: int,
    ) -> None:
        self._broker = broker
        self._worker_id = worker_id
        self._holdings = holdings
        self._metrics = metrics
        self._revisions = revisions
        self._encoders = ThreadPoolExecutor(num_threads, thread_name_prefix="encode")
        self._previewing: set[str] = set()

    def close(self) -> None:
        self._encoders.shutdown(wait=False, cancel_futures=True)

    async def publish_preview(self, output: PreviewReady) -> None:
        """A preview whose predecessor is still on its way is dropped: the next one is better anyway."""
        request_id, params = output.request.request_id, output.request.params
        if request_id in self._previewing:
            return
        self._previewing.add(request_id)
        try:
            for picture in await self._encode(_as_preview(output.request.delivery.job), output.pixels):
                event = Preview(request_id, output.step, params.num_inference_steps, picture)
                await self._broker.publish(self._worker_id, event)
        except BrokerUnavailable as error:
            logger.warning("request %s: a preview is lost: %s", request_id, error)
        finally:
            self._previewing.discard(request_id)

    async def publish_ending(self, output: Ending) -> None:
        """Success and failure leave by the same door; what another worker has taken over leaves in silence."""
        try:
            event = await self._ending_event(output)
        except Exception as error:  # noqa: BLE001 - whatever encoding raises, the request must end
            logger.error("request %s: can't encode its picture: %r", output.request.request_id, error)
            event = Failed(output.request.request_id, _job_error(error))
        if event is not None and await self._finish(event):
            self._metrics.outcomes.labels(output.request.model, event.type).inc()

    async def _ending_event(self, output: Ending) -> TerminalEvent | None:
        request_id = output.request.request_id
        match output:
            case Finished(request=request, pixels=pixels):
                return await self._complete(request, pixels)
            case Blocked():
                self._metrics.blocked.labels(output.request.model).inc()
                return Failed(request_id, JobError(CONTENT_BLOCKED, explain_block(output)))
            case GenerationFailed(error=error):
                return Failed(request_id, _job_error(error))
            case Aborted(reason=reason):
                self._metrics.observe_stop(output)
                return None if reason == "lost" else STOPPED[reason](request_id)

    async def _complete(self, request: RequestState, pixels: Pixels) -> Completed:
        started_s = time.perf_counter()
        pictures = await self._encode(request.delivery.job, pixels)
        timings = _timings(request, encode_ms=(time.perf_counter() - started_s) * 1000)
        return Completed(
            request.request_id, tuple(pictures), timings, self._revisions[request.model], collect_warnings(request)
        )

    async def _encode(self, job: Job, pixels: Pixels) -> list[Picture]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(
            *(loop.run_in_executor(self._encoders, encode_picture, job, i, image) for i, image in enumerate(pixels))
        )

    async def _finish(self, event: TerminalEvent) -> bool:
        """Tries until Redis answers: if another worker has taken the request over by then, this ending is refused."""
        while self._holdings.owns(event.request_id):
            try:
                is_ours = await self._broker.finish(self._worker_id, event)
            except BrokerUnavailable as error:
                logger.warning("request %s: can't publish its end yet: %s", event.request_id, error)
                await asyncio.sleep(random.uniform(0.2, 0.6))
                continue
            except BaseException:
                self._holdings.release(event.request_id)  # its lease lapses, so that another worker may try
                raise
            self._holdings.release(event.request_id)
            if not is_ours:
                logger.warning("request %s was no longer ours: its result is dropped", event.request_id)
            return is_ours
        return False


def _as_preview(job: Job) -> Job:
    params = replace(job.params, output_format="jpeg", output_quality=PREVIEW_QUALITY, metadata=False)
    return replace(job, params=params)


def _job_error(error: Exception) -> JobError:
    """Words for the caller; the log has the rest."""
    if isinstance(error, torch.OutOfMemoryError):
        return JobError("out_of_memory", "the device ran out of memory; try fewer images or a smaller size", True)
    if isinstance(error, LoadError):  # whose words name files of this machine
        return JobError("internal_error", "a LoRA of this request can't be loaded; the worker's log says why")
    return JobError("internal_error", f"the picture could not be computed ({type(error).__name__})")


def explain_block(output: Blocked) -> str:
    num_images = output.request.params.num_images
    what = "the picture" if num_images == 1 else f"{output.num_blocked} of {num_images} pictures, so none is shown"
    return f"the model's safety checker blocked {what}; another seed or other words may pass"


def _timings(request: RequestState, encode_ms: float) -> Timings:
    waited_ms = request.delivery.waited_ms
    queue_ms = waited_ms + (request.joined_s - request.arrived_s) * 1000
    return Timings(
        queue_ms=round(queue_ms, 3),
        text_ms=round(request.text_ms, 3),
        denoise_ms=round((request.denoised_s - request.joined_s) * 1000 - request.text_ms, 3),
        decode_ms=round(request.decode_ms, 3),
        check_ms=round(request.check_ms, 3),
        encode_ms=round(encode_ms, 3),
        total_ms=round(waited_ms + (time.perf_counter() - request.arrived_s) * 1000, 3),
        steps_ms=tuple(round(ms, 3) for ms in request.steps_ms),
    )


def collect_warnings(request: RequestState) -> tuple[str, ...]:
    """The gateway's, and which texts the tokenizer cut."""
    denoising = request.denoising
    assert denoising is not None
    truncated = {"prompt": denoising.conditioning.truncated}
    if denoising.negative is not None:
        truncated["negative_prompt"] = denoising.negative.truncated
    return request.delivery.job.warnings + tuple(
        f"{field} is longer than the model reads; ignored: {text!r}" for field, text in truncated.items() if text
    )
