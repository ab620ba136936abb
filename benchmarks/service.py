"""The service against diffusers alone and against two other servers, in one run on one machine.

    python -m benchmarks.service

Five programs draw the same kind of picture from the same weights: diffusers' pipeline in a loop, one picture at a time
and in batches; over HTTP `fewstep serve`, FastAPI with one pipeline and a lock, and LitServe with its request batching.
They take turns, so that whatever else the machine does hits all of them; the table shows the medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from benchmarks.machine import REPOSITORY, describe_machine

READY_WITHIN_S = 180


@dataclass(frozen=True)
class Round:
    """One turn of one program."""

    program: str
    clients: int
    pictures: int
    images_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Server:
    name: str
    port: int


class BenchmarkError(Exception):
    """A run whose figures would mean nothing."""


def main() -> None:
    options = parse_options()
    try:
        compare_programs(options)
    except BenchmarkError as error:
        sys.exit(f"benchmark failed: {error}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-lcm")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8, help="of each program in each round")
    parser.add_argument("--dtype", default="float32", help="of diffusers at batch 1 and the plain server")
    parser.add_argument(
        "--batch-dtype", default="auto", help="of diffusers in batches and LitServe; auto: the service's"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="of diffusers in batches")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="torch threads of diffusers and the plain server; 0: the faster of 1 and all",
    )
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "benchmark-service.json")
    return parser.parse_args()


def compare_programs(options: argparse.Namespace) -> None:
    body = {"num_inference_steps": options.steps, "output_format": "png", "previews": False}
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(DiffusersLoop(options, options.dtype))
        batches = stack.enter_context(DiffusersLoop(options, options.batch_dtype, options.batch_size))
        service = stack.enter_context(fewstep_server(options))
        plain = stack.enter_context(plain_server(options, loop.threads))
        litserve = stack.enter_context(litserve_server(options))
        rounds: list[Round] = []
        for number in range(options.rounds):
            rounds += [loop.run(options.seconds), batches.run(options.seconds)]
            for clients in options.clients:
                for server in (service, plain, litserve):
                    fields = body | ({"model": options.model} if server is service else {})
                    rounds.append(run_load(server, clients, options.seconds, fields, seed=number + 1))
            print(f"round {number + 1} of {options.rounds} done", file=sys.stderr)
    table = medians(rounds)
    print_table(table)
    verdicts = compare(table)
    for line in verdicts.values():
        print(line)
    report = {
        "machine": describe_machine(),
        "settings": {key: str(value) for key, value in vars(options).items()} | {"baseline_threads": loop.threads},
        "medians": [asdict(row) for row in table],
        "ratios": verdicts,
        "rounds": [asdict(row) for row in rounds],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\nEvery round: {options.json}")


# The three programs


class DiffusersLoop:
    """The program of diffusers_loop.py, idle between its turns."""

    def __init__(self, options: argparse.Namespace, dtype: str, batch_size: int = 1) -> None:
        self.batch_size = batch_size
        self.name = "diffusers" if batch_size == 1 else f"diffusers, batches of {batch_size}"
        arguments = ["--model", options.model, "--steps", str(options.steps), "--dtype", dtype]
        arguments += ["--batch-size", str(batch_size)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.diffusers_loop", *arguments, "--threads", str(options.threads)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.threads: int = json.loads(self._read())["threads"]

    def __enter__(self) -> DiffusersLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def run(self, seconds: float) -> Round:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        latencies_ms = [ms for ms in json.loads(self._read()) for _ in range(self.batch_size)]
        return summarise(self.name, self.batch_size, latencies_ms, sum(latencies_ms) / self.batch_size / 1000)

    def _read(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        raise BenchmarkError("diffusers' loop ended, see above")


@contextlib.contextmanager
def fewstep_server(options: argparse.Namespace) -> Iterator[Server]:
    server = Server("fewstep serve", free_port())
    command = [sys.executable, "-c", "from cli import main; main()", "serve"]
    with running([*command, "--port", str(server.port), "--model", options.model], server):
        yield server


@contextlib.contextmanager
def plain_server(options: argparse.Namespace, threads: int) -> Iterator[Server]:
    server = Server("FastAPI + lock", free_port())
    command = [sys.executable, "-m", "benchmarks.plain_server", "--model", options.model, "--dtype", options.dtype]
    with running([*command, "--port", str(server.port), "--threads", str(threads)], server):
        yield server


@contextlib.contextmanager
def litserve_server(options: argparse.Namespace) -> Iterator[Server]:
    server = Server("LitServe", free_port())
    command = [sys.executable, "-m", "benchmarks.litserve_server", "--model", options.model]
    command += ["--dtype", options.batch_dtype, "--steps", str(options.steps), "--port", str(server.port)]
    with running(command, server):
        yield server


@contextlib.contextmanager
def running(command: Sequence[str], server: Server) -> Iterator[None]:
    """Starts a server, waits until it is ready, and ends it with all its children."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=log, stderr=log)
        try:
            wait_until_ready(server, process, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(server: Server, process: subprocess.Popen[bytes], log: IO[str]) -> None:
    end_s = time.monotonic() + READY_WITHIN_S
    while process.poll() is None and time.monotonic() < end_s:
        if answers_ready(server):
            return
        time.sleep(0.2)
    log.seek(0)
    tail = "".join(log.readlines()[-10:])
    ended = f"ended with status {process.returncode}" if process.poll() is not None else "is not ready"
    raise BenchmarkError(f"{server.name} {ended}:\n{tail}")


def answers_ready(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/readyz", timeout=5):
            return True
    except OSError:  # urllib's errors are kinds of it
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# Figures


def run_load(server: Server, clients: int, seconds: float, body: dict[str, object], seed: int) -> Round:
    arguments = ["--port", str(server.port), "--clients", str(clients), "--seconds", str(seconds), "--seed", str(seed)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load", *arguments, "--body", json.dumps(body)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
    )
    if done.returncode:
        raise BenchmarkError(f"the load on {server.name} with {clients} clients broke off, see above")
    result = json.loads(done.stdout)
    if result["errors"]:
        raise BenchmarkError(f"{server.name} with {clients} clients answered {result['errors']}")
    return summarise(server.name, clients, result["latencies_ms"], result["seconds"])


def summarise(program: str, clients: int, latencies_ms: list[float], seconds: float) -> Round:
    if len(latencies_ms) < 2:
        raise BenchmarkError(
            f"{program} gave {len(latencies_ms)} pictures in {seconds:.0f} s: more --seconds are needed"
        )
    cuts = statistics.quantiles(latencies_ms, n=100, method="inclusive")
    return Round(program, clients, len(latencies_ms), len(latencies_ms) / seconds, cuts[49], cuts[94], cuts[98])


def medians(rounds: list[Round]) -> list[Round]:
    """One row per program and number of clients: the median of each figure over the rounds."""
    return [
        Round(
            program,
            clients,
            sum(row.pictures for row in same),
            statistics.median(row.images_per_s for row in same),
            statistics.median(row.p50_ms for row in same),
            statistics.median(row.p95_ms for row in same),
            statistics.median(row.p99_ms for row in same),
        )
        for program, clients in dict.fromkeys((row.program, row.clients) for row in rounds)
        if (same := [row for row in rounds if (row.program, row.clients) == (program, clients)])
    ]


def compare(table: list[Round]) -> dict[str, str]:
    """What the comparison is for, in a sentence each; the aims stand beside the figures."""
    rows = {(row.program, row.clients): row for row in table}
    many = max(row.clients for row in table if row.program == "fewstep serve")
    alone, crowded = rows.get(("fewstep serve", 1)), rows["fewstep serve", many]
    ceiling = next(row for row in table if row.program.startswith("diffusers, batches"))
    verdicts = {}
    if alone is not None:
        ratio = alone.p50_ms / rows["diffusers", 1].p50_ms
        verdicts["latency"] = f"1 client: {ratio:.2f} times diffusers' P50 (aim: at most 1.10)"
    for name, other, aim in (
        ("ceiling", ceiling, 0.85),
        ("LitServe", rows["LitServe", many], 1.3),
        ("plain server", rows["FastAPI + lock", many], 4.0),
    ):
        ratio = crowded.images_per_s / other.images_per_s
        what = f"{many} clients: {ratio:.2f} times the images/s of {other.program} (aim: at least {aim})"
        verdicts[name] = what if other is ceiling else f"{what}, P95 {crowded.p95_ms:.0f} against {other.p95_ms:.0f} ms"
    return verdicts


def print_table(rows: list[Round]) -> None:
    print("| program | clients | images/s | P50 ms | P95 ms | P99 ms | pictures |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        figures = f"{row.images_per_s:.1f} | {row.p50_ms:.1f} | {row.p95_ms:.1f} | {row.p99_ms:.1f} | {row.pictures}"
        print(f"| {row.program} | {row.clients} | {figures} |")
    print()


if __name__ == "__main__":
    main()
