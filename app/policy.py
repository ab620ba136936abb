"""The operator's say over prompts: one function of theirs that sees every request before it is queued.

`FEWSTEP_PROMPT_CHECK` names it. It fails closed: without its answer nothing gets in.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from app.errors import PromptBlocked, PromptCheckFailed
from app.metrics import Metrics
from broker.messages import Job, Lane
from broker.settings import SettingsError
from models.catalog import ModelSpec

MAX_THREADS = 16
RETRY_MS = 1000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """What a prompt check is asked about.

    `owner` is whose line the request waits in; `user` is what an application calls its own end user (OpenAI's
    `safety_identifier`, else `user`), None where it doesn't say.
    """

    prompt: str
    negative_prompt: str | None
    model: str
    owner: str
    user: str | None
    lane: Lane


Answer: TypeAlias = str | None  # why the prompt is blocked, in words for its author; None lets it pass
PromptCheck: TypeAlias = Callable[[PromptRequest], Answer] | Callable[[PromptRequest], Awaitable[Answer]]


def load_prompt_check(path: str | None) -> PromptCheck | None:
    """The function that "package.module:function" names. Raises SettingsError."""
    if path is None:
        return None
    module_name, _, name = path.partition(":")
    if not module_name or not name.isidentifier():
        raise _unusable(path, "it must be package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of the operator raises
        raise _unusable(path, f"can't import {module_name}: {type(error).__name__}: {error}") from error
    if not callable(check := getattr(module, name, None)):
        raise _unusable(path, f"{module_name} has no function {name}")
    if not _takes_one_argument(check):
        raise _unusable(path, f"{name}{inspect.signature(check)} must take one argument, the PromptRequest")
    return cast(PromptCheck, check)


def _unusable(path: str, reason: str) -> SettingsError:
    return SettingsError(" ".join(f"FEWSTEP_PROMPT_CHECK={path!r}: {reason}".split()))


def _takes_one_argument(check: Callable[..., object]) -> bool:
    try:
        inspect.signature(check).bind(None)
    except TypeError:
        return False
    except ValueError:  # a function without a signature, as some of C have none
        return True
    return True


class PromptPolicy:
    """Asks `check` about each job of a model whose catalog entry wants it.

    A synchronous check runs on a thread, an asynchronous one on the event loop, which it must not block. Who waits for
    a thread waits within `timeout_s`.
    """

    def __init__(self, check: PromptCheck | None, timeout_s: float, metrics: Metrics) -> None:
        self._check: Any = check
        self._timeout_s, self._metrics = timeout_s, metrics
        self._is_async = _is_async(check)
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="prompt-check")

    async def review(self, job: Job, spec: ModelSpec) -> None:
        """Raises PromptBlocked, or PromptCheckFailed where the check gave no answer."""
        if self._check is None or not spec.check_prompts:
            return
        started_s = time.monotonic()
        try:
            reason = await self._ask(job)
        except PromptCheckFailed:
            self._observe("failed", started_s)
            raise
        self._observe("allowed" if reason is None else "blocked", started_s)
        if reason is not None:
            log.info("request %s: its prompt is blocked: %s", job.request_id, reason)
            raise PromptBlocked(f"the prompt is blocked: {reason}")

    def _observe(self, result: str, started_s: float) -> None:
        self._metrics.prompt_check.labels(result).observe(time.monotonic() - started_s)

    async def _ask(self, job: Job) -> Answer:
        params = job.params
        request = PromptRequest(params.prompt, params.negative_prompt, job.model, job.owner, job.user, job.lane)
        try:
            async with asyncio.timeout(self._timeout_s):
                return _as_answer(await self._call(request))
        except Exception as error:
            log.exception("request %s: the prompt check gave no answer, so it is refused", job.request_id)
            late = isinstance(error, TimeoutError)
            what = f"didn't answer within {self._timeout_s:g} s" if late else "failed"
            message = f"the prompt check {what}; nothing is drawn without it"
            raise PromptCheckFailed(message, retry_after_ms=RETRY_MS) from error

    async def _call(self, request: PromptRequest) -> object:
        if self._is_async:
            return await self._check(request)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._check, request)


def _is_async(check: object) -> bool:
    return inspect.iscoroutinefunction(check) or inspect.iscoroutinefunction(getattr(check, "__call__", None))  # noqa: B004


def _as_answer(answer: object) -> Answer:
    """Anything else is a mistake of the check, and no permission."""
    if answer is None or (isinstance(answer, str) and answer.strip()):
        return answer
    raise TypeError(f"a prompt check returns None or a reason, this one returned {answer!r}")
