"""Closed-loop clients over HTTP, in a process of their own: each sends its next request when the last is answered.

Prints one line of JSON: the milliseconds of every answer within the time, and how many answers were no picture.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from benchmarks.prompts import endless_prompts

HEADERS = {"Content-Type": "application/json", "Accept": "image/png"}


@dataclass
class Result:
    """What one load saw. `seconds` is the time that counted, the warm-up before it excluded."""

    seconds: float
    latencies_ms: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """Answers count when they arrive between `start_s` and `end_s`."""

    start_s: float
    end_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warmup", type=float, default=1.0)
    parser.add_argument("--body", required=True, help="JSON of the fields that are the same in every request")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start_s = time.perf_counter() + options.warmup
    window = Window(start_s, start_s + options.seconds)
    result = run_clients(options.port, options.clients, json.loads(options.body), window, options.seed)
    print(json.dumps(asdict(result)))


def run_clients(port: int, num_clients: int, body: dict[str, object], window: Window, seed: int) -> Result:
    """Runs the clients side by side until the window closes."""
    result = Result(window.end_s - window.start_s)
    prompts, seeds = endless_prompts(seed), itertools.count(seed * 1_000_000)
    threads = [
        threading.Thread(target=run_client, args=(port, body, prompts, seeds, window, result))
        for _ in range(num_clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return result


_next = threading.Lock()


def run_client(
    port: int, body: dict[str, object], prompts: Iterator[str], seeds: Iterator[int], window: Window, result: Result
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while time.perf_counter() < window.end_s:
        with _next:
            request = body | {"prompt": next(prompts), "seed": next(seeds)}
        started_s = time.perf_counter()
        connection.request("POST", "/v1/generations", json.dumps(request).encode(), HEADERS)
        response = connection.getresponse()
        data = response.read()
        answered_s = time.perf_counter()
        if not data.startswith(b"\x89PNG"):
            what = f"{response.status} {data[:200]!r}"
            result.errors[what] = result.errors.get(what, 0) + 1
        elif window.start_s <= answered_s <= window.end_s:
            result.latencies_ms.append((answered_s - started_s) * 1000)
    connection.close()


if __name__ == "__main__":
    main()
