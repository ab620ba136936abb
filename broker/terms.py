"""What a submit is decided by, beside the job itself, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Origin = Literal["new", "repeated", "joined", "cached"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What admission allows: unfinished requests per model, and bytes of kept results over all."""

    max_depth: int = 1000
    max_result_bytes: int = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the workers' measured costs say of one request.

    `work_ms` is what it takes from all workers together; it also counts as its owner's share. `alone_ms` and `full_ms`
    are how long it runs in a batch of its own and in a full one, `num_slots` how many like it the workers run at once.
    """

    work_ms: float = 1.0
    alone_ms: float = 0.0
    full_ms: float = 0.0
    num_slots: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """How one caller asks.

    The result is promised for `promise_s` of the job's `keep_s`: for the rest it stays only while there is room.
    `weight` is its owner's share of the lane. Requests of one owner with the same `idempotency_key` are one request if
    their `fingerprint` is the same, too. `cache_key` says what is asked for and by whom: an unfinished request with the
    same one is joined, a finished one is the answer, for `cache_s` after its last use and while there is room.
    """

    promise_s: float = math.inf
    weight: int = 1
    forecast: Forecast = Forecast()
    idempotency_key: str | None = None
    fingerprint: str = ""
    cache_key: str | None = None
    cache_s: float = 0


@dataclass(frozen=True, slots=True)
class Submitted:
    """Outcome of a submit; the same submit sent twice gets the first one's.

    `request_id` is the request that answers it: an older one if `origin` isn't "new". `position` counts the requests
    that go before this one by the rules of the lines (shares of the owners, live lane first), not all that came
    earlier; `depth` counts the model's unfinished requests, this one included; it starts in about `start_ms`.
    """

    request_id: str
    position: int
    depth: int
    start_ms: int
    origin: Origin
