from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from app.access.callers import ANONYMOUS, Caller, Share
from app.access.rates import Budget, Rates, Usage, noted_usages, rate_headers
from app.errors import InvalidRequest, RateExceeded
from app.settings import GatewaySettings
from broker.embedded import EmbeddedRedis
from broker.errors import BrokerUnavailable
from broker.messages import Job, Lane
from tests.app.access.test_auth import BODY, openai_client
from tests.app.conftest import StartApi
from tests.app.keys import Keys, bearer
from tests.jobs import make_job

START = 1_800_000_000.0


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = START

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("app.access.rates.time", clock)
    monkeypatch.setattr("limits.aio.storage.redis.redispy.time", clock)
    return clock


@asynccontextmanager
async def open_rates(redis_url: str, prefix: str) -> AsyncIterator[Rates]:
    async with Rates(GatewaySettings.load(redis_url=redis_url, redis_prefix=prefix)) as rates:
        yield rates


@pytest.fixture
async def rates(redis_url: str, prefix: str) -> AsyncIterator[Rates]:
    async with open_rates(redis_url, prefix) as rates:
        yield rates


def caller(requests: int | None = None, images: int | None = None, **fields: Any) -> Caller:
    return replace(Caller("aaaaaaaaaaaa", max_requests_per_minute=requests, max_images_per_minute=images), **fields)


def job_of(num_images: int = 1, lane: Lane = "api") -> Job:
    return replace(make_job(num_images=num_images), lane=lane)


async def count_allowed(rates: Rates, caller: Caller, job: Job, tries: int = 20) -> int:
    for number in range(tries):
        try:
            await rates.take(job, caller)
        except RateExceeded:
            return number
    return tries


async def test_without_a_rate_nothing_is_counted(rates: Rates) -> None:
    assert await count_allowed(rates, ANONYMOUS, job_of()) == 20
    with noted_usages() as usages:
        await rates.take(job_of(), ANONYMOUS)
    assert rate_headers(usages) == {}


async def test_requests_and_images_are_counted(rates: Rates) -> None:
    assert await count_allowed(rates, caller(requests=3), job_of()) == 3
    assert await count_allowed(rates, caller(images=8), job_of(num_images=2)) == 4


async def test_live_requests_count_their_images_only(rates: Rates) -> None:
    live = job_of(lane="live")
    assert await count_allowed(rates, caller(requests=2), live) == 20
    assert await count_allowed(rates, caller(requests=2, images=5), live) == 5


async def test_what_one_budget_refuses_is_not_taken_from_the_other(rates: Rates) -> None:
    both = caller(requests=5, images=4)
    await rates.take(job_of(num_images=4), both)
    for _ in range(10):
        with pytest.raises(RateExceeded, match="4 images a minute"):
            await rates.take(job_of(), both)
    assert await count_allowed(rates, caller(requests=5), job_of()) == 4


async def test_keys_have_budgets_of_their_own(rates: Rates) -> None:
    assert await count_allowed(rates, caller(requests=2), job_of()) == 2
    assert await count_allowed(rates, caller(requests=2, owner="bbbbbbbbbbbb"), job_of()) == 2


async def test_gateways_count_together(redis_url: str, prefix: str) -> None:
    async with open_rates(redis_url, prefix) as one, open_rates(redis_url, prefix) as other:
        assert await count_allowed(one, caller(requests=3), job_of(), tries=2) == 2
        assert await count_allowed(other, caller(requests=3), job_of()) == 1


async def test_many_at_once_get_no_more_than_the_rate(rates: Rates) -> None:
    takes = [rates.take(job_of(), caller(requests=5)) for _ in range(30)]
    outcomes = await asyncio.gather(*takes, return_exceptions=True)
    assert outcomes.count(None) == 5
    assert sum(isinstance(outcome, RateExceeded) for outcome in outcomes) == 25


@pytest.mark.parametrize("num_images", [1, 3])
async def test_coming_back_when_told_succeeds_and_a_moment_earlier_not(
    rates: Rates, clock: Clock, num_images: int
) -> None:
    limited = caller(images=4)
    for _ in range(4):
        await rates.take(job_of(), limited)
        clock.now += 7
    with pytest.raises(RateExceeded) as caught:
        await rates.take(job_of(num_images), limited)
    wait_ms = caught.value.retry_after_ms
    assert wait_ms == (60 - 28 + (num_images - 1) * 7) * 1000
    clock.now += wait_ms / 1000 - 0.01
    with pytest.raises(RateExceeded):
        await rates.take(job_of(num_images), limited)
    clock.now += 0.02
    await rates.take(job_of(num_images), limited)


async def test_a_request_that_never_fits_is_told_so(rates: Rates) -> None:
    with pytest.raises(InvalidRequest, match="num_images: 5 is not allowed; this key may use 4 images a minute"):
        await rates.take(job_of(num_images=5), caller(images=4))
    assert await count_allowed(rates, caller(images=4), job_of()) == 4


async def test_tokens_of_one_share_use_it_together_within_their_key(rates: Rates) -> None:
    ann, ben = caller(images=5, share=Share("ann", 2)), caller(images=5, share=Share("ben", 4))
    assert await count_allowed(rates, ann, job_of(lane="live")) == 2
    assert await count_allowed(rates, ann, job_of(lane="live")) == 0
    assert await count_allowed(rates, ben, job_of(lane="live")) == 3


async def test_headers_tell_what_is_left_after_the_request(rates: Rates, clock: Clock) -> None:
    both = caller(requests=10, images=8)
    await rates.take(job_of(num_images=2), both)
    clock.now += 19.5
    with noted_usages() as usages:
        await rates.take(job_of(num_images=4), both)
    assert rate_headers(usages) == {
        "X-RateLimit-Limit": "8",
        "X-RateLimit-Remaining": "2",
        "X-RateLimit-Reset": "41",
        "RateLimit-Policy": '"requests";q=10;w=60, "images";q=8;w=60',
        "RateLimit": '"requests";r=8;t=41, "images";r=2;t=41',
    }


def test_a_fresh_budget_resets_in_a_minute() -> None:
    usage = Usage(Budget("requests", "x", 10, 1), 9, 60.0)
    assert rate_headers([usage])["X-RateLimit-Reset"] == "60"


async def test_without_redis_nobody_is_let_through(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as redis:
        async with open_rates(redis.url, "test") as rates:
            await rates.take(job_of(), caller(requests=5))
            redis.stop()
            with pytest.raises(BrokerUnavailable):
                await rates.take(job_of(), caller(requests=5))


# Over HTTP


def check_retry(headers: Mapping[str, str]) -> None:
    wait_ms = int(headers["retry-after-ms"])
    assert 50_000 < wait_ms <= 60_000
    assert headers["retry-after"] == str(math.ceil(wait_ms / 1000))
    assert headers["x-ratelimit-remaining"] == "0"


async def test_over_the_rate_is_429_with_the_time_to_come_back(start_api: StartApi, keys: Keys) -> None:
    key = keys.make(max_requests_per_minute=2)
    async with start_api(api_keys_file=keys.path) as api:
        answers = [await api.http.post("/v1/generations", json=BODY, headers=bearer(key)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["1", "0", "0"]
    assert answers[0].headers["ratelimit"] == '"requests";r=1;t=60'
    assert {answer.headers["x-ratelimit-limit"] for answer in answers} == {"2"}
    error = answers[2].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    check_retry(answers[2].headers)


async def test_openais_client_over_the_rate(start_api: StartApi, keys: Keys) -> None:
    key = keys.make(max_images_per_minute=3)
    async with start_api(api_keys_file=keys.path) as api, openai_client(api, key) as client:
        raw = await client.images.with_raw_response.generate(prompt="a red apple", model="mini-lcm", n=2)
        assert raw.headers["x-ratelimit-remaining"] == "1"
        with pytest.raises(openai.RateLimitError) as caught:
            await client.images.generate(prompt="a red apple", model="mini-lcm", n=2)
        assert caught.value.code == "rate_limit_exceeded"
        stream = await client.images.with_raw_response.generate(prompt="a red apple", model="mini-lcm", stream=True)
        assert stream.headers["x-ratelimit-remaining"] == "0"
        with pytest.raises(openai.RateLimitError) as caught:
            await client.images.generate(prompt="a red apple", model="mini-lcm", stream=True)
        check_retry(caught.value.response.headers)


async def test_a_refused_body_uses_nothing(start_api: StartApi, keys: Keys) -> None:
    key = keys.make(max_requests_per_minute=1)
    async with start_api(api_keys_file=keys.path) as api:
        for body in ({}, {"prompt": ""}, {"prompt": "x", "num_images": 99}):
            assert (await api.http.post("/v1/generations", json=body, headers=bearer(key))).status_code == 400
        assert (await api.http.post("/v1/generations", json=BODY, headers=bearer(key))).status_code == 200


async def test_other_routes_and_callers_without_a_rate_carry_no_rate(start_api: StartApi, keys: Keys) -> None:
    limited, unlimited = keys.make(max_requests_per_minute=5), keys.make()
    async with start_api(api_keys_file=keys.path) as api:
        listed = await api.http.get("/v1/models", headers=bearer(limited))
        drawn = await api.http.post("/v1/generations", json=BODY, headers=bearer(unlimited))
    for answer in (listed, drawn):
        assert answer.status_code == 200
        assert not [name for name in answer.headers if "ratelimit" in name]
