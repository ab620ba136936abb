"""What admission promises, against what happens: waits, deadlines, Retry-After, and one caller beside another's flood.

    python -m benchmarks.admission            # about four minutes

Runs `fewstep serve` with two API keys. Capacity is measured first. Then bursts of asynchronous requests compare the
predicted start of each with its real one; open loops below and above capacity run with and without a deadline; and a
caller sends single requests, alone and while another has hundreds queued.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.shared.load import Result
from benchmarks.shared.machine import REPOSITORY
from benchmarks.shared.prompts import endless_prompts
from benchmarks.shared.report import print_table, write_report
from benchmarks.shared.servers import Server, free_port, running

GENERATIONS = "/v1/generations"
POLL_S = 0.1


@dataclass(frozen=True)
class Wait:
    """Predicted against real start of the requests of one burst that had to wait; milliseconds."""

    burst: int
    waited: int
    real_p50_ms: float
    real_max_ms: float
    off_p50_ms: float
    off_p95_ms: float
    off_by_share: float


@dataclass(frozen=True)
class Promise:
    """One open loop. `kept` are the pictures within the deadline, of all requests; `late` those dropped at it."""

    load_percent: int
    deadline: str
    requests: int
    kept_per_s: float
    kept: float
    refused: float
    late: float
    p95_ms: float


@dataclass(frozen=True)
class Return:
    """What became of refused requests that came back exactly when they were told."""

    refused: int
    got_in: float
    kept: float
    told_p50_ms: float


@dataclass(frozen=True)
class Neighbour:
    """Single requests of one caller, one after the other."""

    beside: str
    requests: int
    p50_ms: float
    max_ms: float


@dataclass(frozen=True)
class Service:
    """`fewstep serve`, ready, with a key for each of two callers."""

    port: int
    keys: Mapping[str, str]

    def client(self, caller: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {self.keys[caller]}"},
            timeout=120,
            limits=httpx.Limits(max_connections=200),
        )


def main() -> None:
    options = parse_options()
    with start_service(options.model) as service:
        capacity = measure_capacity(service, options)
        waits = [asyncio.run(measure_waits(service, size)) for size in options.bursts]
        promises = [
            measure_promise(service, percent, capacity, deadline_ms, options)
            for percent in options.percents
            for deadline_ms in (None, options.deadline_ms)
        ]
        returns = asyncio.run(measure_returns(service, options))
        neighbours = asyncio.run(measure_neighbours(service, options))
    print(f"Capacity with {options.clients} clients: {capacity:.1f} images/s.\n")
    for rows in (waits, promises, [returns], neighbours):
        print_table(rows)
    figures = {
        "capacity": capacity,
        "waits": waits,
        "promises": promises,
        "returns": [returns],
        "neighbours": neighbours,
    }
    write_report(options.json, vars(options), figures)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="mini-lcm")
    add("--clients", type=int, default=32, help="of the closed loop that measures capacity")
    add("--seconds", type=float, default=15, help="of each load")
    add("--bursts", type=int, nargs="+", default=[64, 256, 800], help="requests of one caller, sent at once")
    add("--percents", type=int, nargs="+", default=[80, 110, 150], help="of capacity, in the open loops")
    add("--deadline-ms", type=int, default=1000)
    add("--flood", type=int, default=950, help="requests that the other caller has queued")
    add("--singles", type=int, default=6, help="single requests beside it")
    add("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-admission.json")
    return parser.parse_args()


@contextlib.contextmanager
def start_service(model: str) -> Iterator[Service]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.toml"
        keys = {caller: create_key(file, caller) for caller in ("one", "other")}
        server = Server("fewstep serve", free_port())
        command = ["env", f"FEWSTEP_API_KEYS_FILE={file}", sys.executable, "-c", "from cli import main; main()"]
        with running([*command, "serve", "--model", model, "--port", str(server.port)], server):
            yield Service(server.port, keys)


def create_key(file: Path, name: str) -> str:
    """The last word that `fewstep keys create` prints on its output is the key."""
    command = [sys.executable, "-c", "from cli import main; main()", "keys", "create", name]
    environment = os.environ | {"FEWSTEP_API_KEYS_FILE": str(file)}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()[-1]


# Capacity and open loops


def measure_capacity(service: Service, options: argparse.Namespace) -> float:
    result = run_load(service, ["--clients", str(options.clients)], {}, options.seconds)
    return result.num_delivered / result.seconds


def measure_promise(
    service: Service, percent: int, capacity: float, deadline_ms: int | None, options: argparse.Namespace
) -> Promise:
    body: dict[str, object] = {} if deadline_ms is None else {"deadline_ms": deadline_ms}
    result = run_load(service, ["--rate", str(capacity * percent / 100)], body, options.seconds)
    num_kept = sum(ms <= options.deadline_ms for ms in result.latencies_ms)
    num_requests = len(result.latencies_ms) + result.num_refused + result.num_late
    return Promise(
        load_percent=percent,
        deadline="none" if deadline_ms is None else f"{deadline_ms} ms",
        requests=num_requests,
        kept_per_s=num_kept / result.seconds,
        kept=num_kept / num_requests,
        refused=result.num_refused / num_requests,
        late=result.num_late / num_requests,
        p95_ms=statistics.quantiles(result.latencies_ms, n=20)[-1],
    )


def run_load(service: Service, loop: list[str], body: dict[str, object], seconds: float) -> Result:
    command = [
        sys.executable,
        "-m",
        "benchmarks.shared.load",
        "--port",
        str(service.port),
        "--key",
        service.keys["one"],
        *loop,
    ]
    command += ["--seconds", str(seconds), "--body", json.dumps(body), "--seed", str(time.time_ns() % 10**6)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True)
    result = Result(**json.loads(done.stdout))
    if result.errors:
        sys.exit(f"benchmark failed: {result.errors}")
    return result


# Waits


async def measure_waits(service: Service, size: int) -> Wait:
    async with service.client("one") as client:
        created = await asyncio.gather(*(ask(client, prompt, prefer="respond-async") for prompt in prompts(size)))
        pairs = [await asyncio.gather(predicted(answer), real_ms(client, answer)) for answer in created]
    waited = [(told, real) for told, real in pairs if told > 0]
    off = [abs(told - real) for told, real in waited]
    return Wait(
        burst=size,
        waited=len(waited),
        real_p50_ms=statistics.median(real for _, real in waited),
        real_max_ms=max(real for _, real in waited),
        off_p50_ms=statistics.median(off),
        off_p95_ms=statistics.quantiles(off, n=20)[-1],
        off_by_share=statistics.median(abs(told - real) / max(real, 1.0) for told, real in waited),
    )


async def predicted(answer: httpx.Response) -> float:
    return float(answer.json()["queue"]["predicted_start_ms"])


async def real_ms(client: httpx.AsyncClient, answer: httpx.Response) -> float:
    """How long it waited, once it has ended."""
    while (generation := (await client.get(answer.headers["Location"])).json())["timings"] is None:  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)
    return float(generation["timings"]["queue_ms"])


def prompts(count: int) -> list[str]:
    endless = endless_prompts(time.time_ns() % 10**6)
    return [f"{next(endless)}, no. {time.time_ns()}-{i}" for i in range(count)]


async def ask(
    client: httpx.AsyncClient, prompt: str, *, prefer: str = "", deadline_ms: int | None = None
) -> httpx.Response:
    body: dict[str, Any] = {"prompt": prompt, "deadline_ms": deadline_ms}
    return await client.post(GENERATIONS, json=body, headers={"Prefer": prefer} if prefer else {})


# Coming back


async def measure_returns(service: Service, options: argparse.Namespace) -> Return:
    """A burst with a deadline: those refused come back when told, with the same deadline."""
    async with service.client("one") as client:
        first = await asyncio.gather(
            *(come_back(client, prompt, options.deadline_ms) for prompt in prompts(max(options.bursts)))
        )
    refused = [outcome for outcome in first if outcome is not None]
    return Return(
        refused=len(refused),
        got_in=sum(status != 429 for _, status in refused) / len(refused),
        kept=sum(status == 200 for _, status in refused) / len(refused),
        told_p50_ms=statistics.median(told for told, _ in refused),
    )


async def come_back(client: httpx.AsyncClient, prompt: str, deadline_ms: int) -> tuple[float, int] | None:
    """What the refused request was told, and the status of its second try; None if it got in at once."""
    answer = await ask(client, prompt, deadline_ms=deadline_ms)
    if answer.status_code != 429:
        return None
    told_ms = float(answer.headers["retry-after-ms"])
    await asyncio.sleep(told_ms / 1000)
    return told_ms, (await ask(client, prompt, deadline_ms=deadline_ms)).status_code


# Neighbours


async def measure_neighbours(service: Service, options: argparse.Namespace) -> list[Neighbour]:
    async with service.client("one") as one, service.client("other") as other:
        alone = await time_singles(other, options.singles)
        flood = await asyncio.gather(*(ask(one, prompt, prefer="respond-async") for prompt in prompts(options.flood)))
        beside = await time_singles(other, options.singles)
        last = (await one.get(flood[-1].headers["Location"])).json()["state"]
        await asyncio.gather(*(one.delete(answer.headers["Location"]) for answer in flood))
    if last != "queued":
        sys.exit("benchmark failed: the flood was over before the single requests were; raise --flood")
    return [summarise_singles("nobody", alone), summarise_singles(f"{options.flood} queued requests", beside)]


async def time_singles(client: httpx.AsyncClient, count: int) -> list[float]:
    took: list[float] = []
    for prompt in prompts(count):
        started_s = time.perf_counter()
        (await ask(client, prompt)).raise_for_status()
        took.append((time.perf_counter() - started_s) * 1000)
    return took


def summarise_singles(beside: str, took_ms: list[float]) -> Neighbour:
    return Neighbour(beside, len(took_ms), statistics.median(took_ms), max(took_ms))


if __name__ == "__main__":
    main()
