"""How much a caller may ask for in a minute, counted on Redis for all gateways together.

Windows slide: what was used comes back exactly 60 s later. So a refusal can say truly when the same request would fit,
if nothing else comes in between. Moments are those of the gateway's clock, which should agree to a second among
gateways.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage

from app.access.callers import Caller
from app.errors import RateExceeded, invalid
from app.settings import GatewaySettings
from broker.connections import connect_for_commands, translated_errors
from broker.keys import Keys
from broker.messages import Job

WINDOW_S = 60
RATE_HEADERS = ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "RateLimit-Policy", "RateLimit")


@dataclass(frozen=True, slots=True)
class Budget:
    """So many `name` ("requests" or "images") a minute for one owner, and what a request takes of it."""

    name: str
    owner: str
    limit: int
    cost: int

    @property
    def key(self) -> str:
        return RateLimitItemPerMinute(self.limit, namespace=self.name).key_for(self.owner)


@dataclass(frozen=True, slots=True)
class Usage:
    """A budget as it stands: what is left, and the seconds until some of what was used comes back."""

    budget: Budget
    remaining: int
    reset_s: float


class Rates:
    """Takes requests and images from the budgets of their caller, from all of them or from none.

    Every method raises BrokerUnavailable when Redis can't be reached.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._client = connect_for_commands(settings.redis_url)
        self._storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=Keys(settings.redis_prefix).rates(),
            connection_pool=self._client.connection_pool,  # type: ignore[arg-type]
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def take(self, job: Job, caller: Caller) -> None:
        """Raises RateExceeded that says when to come back, or InvalidRequest for more images than ever fit.

        Two requests at the same moment may both see room for one: then the second is refused by one budget after it
        has taken from the other.
        """
        budgets = list(find_budgets(job, caller))
        _check_size(budgets)
        usages = await self._read(budgets)
        is_taken = all(usage.remaining >= usage.budget.cost for usage in usages) and await self._take(budgets)
        if not is_taken:
            _note(usages)
            raise await self._refusal(usages)
        _note([_after(usage) for usage in usages])

    async def _read(self, budgets: list[Budget]) -> list[Usage]:
        with translated_errors():
            return list(await asyncio.gather(*map(self._read_one, budgets)))

    async def _read_one(self, budget: Budget) -> Usage:
        oldest, num_used = await self._storage.get_moving_window(budget.key, budget.limit, WINDOW_S)
        return Usage(budget, budget.limit - num_used, max(0.0, oldest + WINDOW_S - time.time()))

    async def _take(self, budgets: list[Budget]) -> bool:
        with translated_errors():
            for budget in budgets:
                if not await self._storage.acquire_entry(budget.key, budget.limit, WINDOW_S, budget.cost):
                    return False
        return True

    async def _refusal(self, usages: list[Usage]) -> RateExceeded:
        budgets = [usage.budget for usage in usages]
        with translated_errors():
            waits_s = await asyncio.gather(*map(self._wait_s, budgets))
        wait_s, tightest = max(zip(waits_s, budgets, strict=True), key=lambda pair: pair[0])
        message = f"this key may use {tightest.limit} {tightest.name} a minute; come back in {wait_s:.1f} s"
        return RateExceeded(message, retry_after_ms=max(1, math.ceil(wait_s * 1000)))

    async def _wait_s(self, budget: Budget) -> float:
        """Until `cost` fits: when the newest use that stands in its way falls out of the window."""
        num_others = budget.limit - budget.cost + 1
        moment, num_used = await self._storage.get_moving_window(budget.key, num_others, WINDOW_S)
        return max(0.0, moment + WINDOW_S - time.time()) if num_used >= num_others else 0.0


def find_budgets(job: Job, caller: Caller) -> Iterator[Budget]:
    """Live requests count their images alone: each key press is one. A token has a budget beside its key's."""
    num_images = job.params.num_images
    if caller.max_requests_per_minute is not None and job.lane == "api":
        yield Budget("requests", caller.owner, caller.max_requests_per_minute, 1)
    if caller.max_images_per_minute is not None:
        yield Budget("images", caller.owner, caller.max_images_per_minute, num_images)
    if caller.share is not None:
        yield Budget("images", f"{caller.owner}/{caller.share.name}", caller.share.max_images_per_minute, num_images)


def _check_size(budgets: list[Budget]) -> None:
    for budget in budgets:
        if budget.cost > budget.limit:
            raise invalid("num_images", budget.cost, f"this key may use {budget.limit} {budget.name} a minute")


def _after(usage: Usage) -> Usage:
    reset_s = usage.reset_s if usage.remaining < usage.budget.limit else WINDOW_S
    return Usage(usage.budget, usage.remaining - usage.budget.cost, reset_s)


# What an answer tells of it

_usages: ContextVar[list[Usage]] = ContextVar("usages")


@contextmanager
def noted_usages() -> Iterator[list[Usage]]:
    """Collects what `take` finds within this HTTP request, so that every way to answer it can tell."""
    usages: list[Usage] = []
    token = _usages.set(usages)
    try:
        yield usages
    finally:
        _usages.reset(token)


def _note(usages: Iterable[Usage]) -> None:
    if (noted := _usages.get(None)) is not None:
        noted[:] = usages


def rate_headers(usages: list[Usage]) -> dict[str, str]:
    """The tightest budget as X-RateLimit-*, all of them in the fields of the IETF's draft (structured fields)."""
    if not usages:
        return {}
    tightest = min(usages, key=lambda usage: usage.remaining / usage.budget.limit)
    values = (
        str(tightest.budget.limit),
        str(tightest.remaining),
        str(math.ceil(tightest.reset_s)),
        ", ".join(f'"{usage.budget.name}";q={usage.budget.limit};w={WINDOW_S}' for usage in usages),
        ", ".join(f'"{usage.budget.name}";r={usage.remaining};t={math.ceil(usage.reset_s)}' for usage in usages),
    )
    return dict(zip(RATE_HEADERS, values, strict=True))
