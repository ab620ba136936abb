"""Clients over HTTP, in a process of their own. Every request has a prompt and a seed of its own.

In a closed loop (`--clients`) each client sends its next request when its last one is answered. In an open loop
(`--rate`) requests fall due at random times that `--seed` decides, however far behind the server is, and latencies
count from these times.

Prints one line of JSON, a `Result`. The clients share the cores with the server, so they are tasks on raw streams in
one event loop: that takes a fraction of the CPU time of threads with http.client.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import uvloop

from benchmarks.shared.prompts import endless_prompts

REFUSED, LATE = "refused", "late"
PATIENCE_S = 180  # beside the time asked for: no server here takes so long for what it has accepted
MAX_IDLE_S = 2.0  # servers close connections that are idle for 5 s
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer; times are `time.perf_counter`'s. `error` is None for a picture, REFUSED for a 429, LATE for a 504."""

    due_s: float
    answered_s: float
    error: str | None


@dataclass(frozen=True)
class Window:
    """The time that counts."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    def __contains__(self, moment_s: float) -> bool:
        return self.start_s <= moment_s < self.end_s


@dataclass(frozen=True)
class Result:
    """What one load saw.

    `latencies_ms`, `num_refused` and `num_late` (past their deadline) are of the requests that count: in a closed loop
    those answered within the window, in an open loop those that fell due in it. `num_delivered` is how many pictures
    arrived within it. `num_drawn`, `cpu_s` (of the clients) and `errors` are of the whole load, with what came before
    the window and after.
    """

    seconds: float
    latencies_ms: list[float]
    num_refused: int
    num_late: int
    num_delivered: int
    num_drawn: int
    cpu_s: float
    errors: dict[str, int]


def main() -> None:
    options = parse_options()
    requests = endless_requests(options.port, json.loads(options.body), options.seed, options.key)
    next(requests)  # shuffles all prompts, which is not the clients' work
    clients = Clients(options.port, requests)
    started_s = time.process_time()
    window = uvloop.run(run_load(clients, options))
    cpu_s = time.process_time() - started_s
    print(json.dumps(asdict(summarise(clients.outcomes, window, cpu_s, is_open=options.clients is None))))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    loop = parser.add_mutually_exclusive_group(required=True)
    loop.add_argument("--clients", type=int, help="of a closed loop")
    loop.add_argument("--rate", type=float, help="requests per second of an open loop")
    parser.add_argument("--seconds", type=float, required=True, help="that count")
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds before them")
    parser.add_argument("--body", required=True, help="JSON of the fields that are the same in every request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--key", help="an API key")
    return parser.parse_args()


async def run_load(clients: Clients, options: argparse.Namespace) -> Window:
    async with asyncio.timeout(options.warmup + options.seconds + PATIENCE_S):
        if options.clients is not None:
            return await clients.run_closed(options.clients, options.warmup, options.seconds)
        return await clients.run_open(draw_arrivals(options.rate, options.seed), options.warmup, options.seconds)


class Clients:
    """They send `requests` to one server; `outcomes` grows with each answer."""

    def __init__(self, port: int, requests: Iterator[bytes]) -> None:
        self.outcomes: list[Outcome] = []
        self._port, self._requests = port, requests
        self._idle: list[Connection] = []
        self._answers = asyncio.Semaphore(0)
        self._end_s = math.inf

    async def run_closed(self, num_clients: int, warmup_s: float, seconds: float) -> Window:
        """The window opens after the warm-up, and not before as many answers as there are clients."""
        connections = [await Connection.open(self._port) for _ in range(num_clients)]
        async with asyncio.TaskGroup() as group:
            for connection in connections:
                group.create_task(self._keep_asking(connection))
            await asyncio.sleep(warmup_s)
            for _ in range(num_clients):
                await self._answers.acquire()
            start_s = time.perf_counter()
            self._end_s = start_s + seconds
        return Window(start_s, self._end_s)

    async def run_open(self, arrivals: Iterator[float], warmup_s: float, seconds: float) -> Window:
        """Waits for the answers to all requests that fell due before the end."""
        started_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for arrival_s in itertools.takewhile(lambda arrival_s: arrival_s < warmup_s + seconds, arrivals):
                due_s = started_s + arrival_s
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                group.create_task(self._ask_once(due_s))
        return Window(started_s + warmup_s, started_s + warmup_s + seconds)

    async def _keep_asking(self, connection: Connection) -> None:
        while (now_s := time.perf_counter()) < self._end_s:
            await self._ask(connection, now_s)

    async def _ask_once(self, due_s: float) -> None:
        connection = self._take_idle() or await Connection.open(self._port)
        await self._ask(connection, due_s)
        self._idle.append(connection)

    def _take_idle(self) -> Connection | None:
        """The one used last, or none if the server may be about to close it."""
        if self._idle and time.perf_counter() - self._idle[-1].used_s < MAX_IDLE_S:
            return self._idle.pop()
        while self._idle:
            self._idle.pop().close()
        return None

    async def _ask(self, connection: Connection, due_s: float) -> None:
        status, data = await connection.post(next(self._requests))
        self.outcomes.append(Outcome(due_s, connection.used_s, judge(status, data)))
        self._answers.release()


class Connection:
    """One kept-alive connection with at most one request under way. `used_s` is when its last answer was complete."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.used_s = 0.0

    @classmethod
    async def open(cls, port: int) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        head, data = await self.exchange(request)
        return int(head.split(b" ", 2)[1]), data

    async def exchange(self, request: bytes) -> tuple[bytes, bytes]:
        """Head and body of the answer."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = CONTENT_LENGTH.search(head)
        if length is None:
            raise ValueError(f"an answer without Content-Length: {head!r}")
        data = await self._reader.readexactly(int(length[1]))
        self.used_s = time.perf_counter()
        return head, data

    def close(self) -> None:
        self._writer.close()


def endless_requests(port: int, body: dict[str, object], seed: int, key: str | None = None) -> Iterator[bytes]:
    """POST requests whose prompts differ from those of every other seed too, since they carry a number."""
    head = f"POST /v1/generations HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    for number, prompt in enumerate(endless_prompts(seed), seed * 1_000_000):
        content = json.dumps(body | {"prompt": f"{prompt}, no. {number}", "seed": number}).encode()
        yield f"{head}Accept: image/png\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def draw_arrivals(rate_per_s: float, seed: int) -> Iterator[float]:
    """Seconds from the start, with exponential gaps: a Poisson process."""
    gaps = random.Random(seed)
    return itertools.accumulate(gaps.expovariate(rate_per_s) for _ in itertools.count())


def judge(status: int, data: bytes) -> str | None:
    """None for a picture, else what is wrong."""
    if data.startswith(b"\x89PNG"):
        return None
    return {429: REFUSED, 504: LATE}.get(status) or f"{status} {data[:200]!r}"


def summarise(outcomes: Sequence[Outcome], window: Window, cpu_s: float, *, is_open: bool) -> Result:
    counted = [outcome for outcome in outcomes if (outcome.due_s if is_open else outcome.answered_s) in window]
    drawn = [outcome for outcome in outcomes if outcome.error is None]
    problems = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    for expected in (REFUSED, LATE):
        problems.pop(expected, None)
    return Result(
        seconds=window.seconds,
        latencies_ms=[(o.answered_s - o.due_s) * 1000 for o in counted if o.error is None],
        num_refused=sum(outcome.error == REFUSED for outcome in counted),
        num_late=sum(outcome.error == LATE for outcome in counted),
        num_delivered=sum(outcome.answered_s in window for outcome in drawn),
        num_drawn=len(drawn),
        cpu_s=cpu_s,
        errors=dict(problems),
    )


if __name__ == "__main__":
    main()
