"""A real gateway process under thousands of bad requests: each refused, none an internal error, the memory flat."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable

import httpx
import psutil

from tests.app.test_process import gateway, wait_until_alive
from tests.service import free_port

WARM_UP, REQUESTS, MAX_GROWTH_BYTES = 400, 2000, 24 * 2**20
JSON = {"Content-Type": "application/json"}
BAD_BODIES: list[Callable[[int], bytes]] = [
    lambda n: b'{"a":' * (5_000 + n % 100),
    lambda n: b'{"prompt": "' + b"x" * 60_000 + b'%d"}' % n,
    lambda n: json.dumps({f"key {n} {i}": i for i in range(2_000)}).encode(),
    lambda n: json.dumps({f"field_{n}": 1, "prompt": "x"}).encode(),
    lambda n: json.dumps({"prompt": "x", "model": f"model {n}"}).encode(),
    lambda n: b'{"prompt": "x", "seed": %d' % n + b"9" * 900 + b"}",
    lambda n: b'{"prompt": "\\ud800", "model": "%d"}' % n,
    lambda n: b"\xff%d" % n,
]


async def send_bad_requests(url: str, first: int, number: int) -> set[int]:
    """The statuses of bodies and paths that all differ, over eight connections."""
    numbers = iter(range(first, first + number))
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def send() -> set[int]:
            statuses = set()
            for n in numbers:
                body = BAD_BODIES[n % len(BAD_BODIES)](n)
                statuses.add((await client.post("/v1/generations", content=body, headers=JSON)).status_code)
                path = next(paths)
                statuses.add((await client.get(f"{path}{n}")).status_code)
            return statuses

        paths = itertools.cycle(["/v1/generations/", "/v1/models/", "/nothing/", "/static/"])
        return set().union(*await asyncio.gather(*(send() for _ in range(8))))


async def test_thousands_of_bad_requests_leave_no_trace(redis_url: str) -> None:
    port = free_port()
    settings = {"FEWSTEP_REDIS_URL": redis_url, "FEWSTEP_REDIS_PREFIX": f"endurance-{port}"}
    with gateway(FEWSTEP_PORT=str(port), **settings) as process:
        await asyncio.to_thread(wait_until_alive, port)
        url, memory = f"http://127.0.0.1:{port}", psutil.Process(process.pid).memory_info
        await send_bad_requests(url, 0, WARM_UP)
        before = memory().rss
        statuses = await send_bad_requests(url, WARM_UP, REQUESTS)
        assert statuses == {400, 404}
        assert memory().rss - before < MAX_GROWTH_BYTES
