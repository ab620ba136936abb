"""Background tasks that start and end with a block."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

CANCEL_AGAIN_S = 0.5

log = logging.getLogger(__name__)


@asynccontextmanager
async def running(*jobs: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs background jobs for as long as the block; one that fails is logged."""
    tasks = [asyncio.create_task(job) for job in jobs]
    for task in tasks:
        task.add_done_callback(_log_failure)
    try:
        yield
    finally:
        await cancel(tasks)


async def cancel(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancels until they have ended; see `raise_if_cancelled` for why once may not be enough."""
    while tasks:
        for task in tasks:
            task.cancel()
        _, still_running = await asyncio.wait(tasks, timeout=CANCEL_AGAIN_S)
        tasks = list(still_running)


def raise_if_cancelled() -> None:
    """To be called after talking to Redis, before waiting for something that may never come.

    Python 3.11's `asyncio.wait_for`, which redis-py uses for every command, forgets a cancellation that arrives just
    when the command has been written.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.critical("a background task of the gateway failed; restart it", exc_info=error)
