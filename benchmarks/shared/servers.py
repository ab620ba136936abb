"""The programs of a comparison as processes: how they start, rest and end, and the CPU time that they take."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import psutil

from benchmarks.shared.figures import LITSERVE, PLAIN, SERVICE, BenchmarkError, Load, Turn, measure
from benchmarks.shared.machine import REPOSITORY

READY_WITHIN_S = 180


@dataclass(frozen=True)
class Server:
    name: str
    port: int


@dataclass(frozen=True)
class Contender:
    """A server that is ready. `fields` are those of its requests beside prompt and seed.

    One that `rests` is stopped by a signal between its turns, since even idle it would take time from the others.
    """

    server: Server
    process: psutil.Process
    fields: Mapping[str, object]
    rests: bool = True

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """For the time of its turn."""
        self.wake()
        try:
            yield
        finally:
            self.rest()

    @property
    def max_rows(self) -> int:
        """Of `fewstep serve`: how far warm-up lets a batch of the default size grow."""
        url = f"http://127.0.0.1:{self.server.port}/v1/models/{self.fields['model']}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(json.load(answer)["workers"][0]["sizes"][0]["max_rows"])

    def wake(self) -> None:
        if self.rests:
            signal_group(self.process.pid, signal.SIGCONT)

    def rest(self) -> None:
        if self.rests:
            signal_group(self.process.pid, signal.SIGSTOP)


@dataclass(frozen=True)
class Drawing:
    """What all pictures of a comparison have in common."""

    model: str
    steps: int


# Starting them


@contextlib.contextmanager
def fewstep_server(drawing: Drawing) -> Iterator[Contender]:
    server = Server(SERVICE, free_port())
    command = [sys.executable, "-c", "from cli import main; main()", "serve", "--model", drawing.model]
    fields = {
        "model": drawing.model,
        "num_inference_steps": drawing.steps,
        "output_format": "png",
        "previews": False,
    }
    with running([*command, "--port", str(server.port)], server) as process:
        yield Contender(server, process, fields, rests=False)  # stopped, its worker would count as lost


@contextlib.contextmanager
def plain_server(drawing: Drawing, dtype: str, threads: int) -> Iterator[Contender]:
    server = Server(PLAIN, free_port())
    command = [sys.executable, "-m", "benchmarks.service.plain_server", "--model", drawing.model, "--dtype", dtype]
    command += ["--port", str(server.port), "--threads", str(threads)]
    with running(command, server) as process:
        yield resting(Contender(server, process, {"num_inference_steps": drawing.steps}))


@contextlib.contextmanager
def litserve_server(drawing: Drawing, dtype: str, window_ms: float) -> Iterator[Contender]:
    server = Server(f"{LITSERVE}, {window_ms:g} ms", free_port())
    command = [sys.executable, "-m", "benchmarks.service.litserve_server", "--model", drawing.model, "--dtype", dtype]
    command += ["--steps", str(drawing.steps), "--port", str(server.port), "--window-ms", str(window_ms)]
    with running(command, server) as process:
        yield resting(Contender(server, process, {}))


def resting(contender: Contender) -> Contender:
    contender.rest()
    return contender


@contextlib.contextmanager
def running(command: Sequence[str], server: Server) -> Iterator[psutil.Process]:
    """Starts a server, waits until it is ready, and ends it with all its children."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=log, stderr=log)
        try:
            wait_until_ready(server, process, log)
            yield psutil.Process(process.pid)
        finally:
            end_group(process)


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


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Politely, then whatever is left of its process group: LitServe leaves its children behind."""
    signal_group(process.pid, signal.SIGCONT)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    signal_group(process.pid, signal.SIGKILL)
    process.wait()


def signal_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)


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


# diffusers without a server


class DiffusersLoop:
    """The program of diffusers_loop.py, idle between its turns. `trials` is what it tried before it chose."""

    def __init__(self, name: str, drawing: Drawing, dtype: str, batch_sizes: Sequence[int], threads: int) -> None:
        arguments = ["--model", drawing.model, "--steps", str(drawing.steps), "--dtype", dtype]
        arguments += ["--batch-sizes", *map(str, batch_sizes), "--threads", str(threads)]
        self._name = name
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.shared.diffusers_loop", *arguments],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._process = psutil.Process(self._popen.pid)
        ready = self._read()
        self.threads: int = ready["threads"]
        self.batch_size: int = ready["batch_size"]
        self.trials: list[dict[str, float]] = ready["trials"]

    def __enter__(self) -> DiffusersLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.kill()
        self._popen.wait()

    def run(self, seconds: float, deadline_s: float) -> Turn:
        assert self._popen.stdin is not None
        meter = CpuMeter(self._process)
        self._popen.stdin.write(f"{seconds}\n")
        self._popen.stdin.flush()
        calls_ms: list[float] = self._read()
        latencies_ms = [ms for ms in calls_ms for _ in range(self.batch_size)]
        num_pictures, took_s = len(latencies_ms), sum(calls_ms) / 1000
        figures = measure(latencies_ms, num_pictures / took_s, took_s, deadline_s)
        load = Load("calls", self.batch_size)
        return Turn(self._name, load, None, num_pictures, 0, figures, meter.read_ms(num_pictures), 0.0)

    def _read(self) -> Any:
        assert self._popen.stdout is not None
        if line := self._popen.stdout.readline():
            return json.loads(line)
        raise BenchmarkError("diffusers' loop ended, see above")


# CPU time


class CpuMeter:
    """The CPU time of a process and all its descendants since the meter was made."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._before = cpu_seconds(process)

    def read_ms(self, num_pictures: int) -> dict[str, float]:
        """Milliseconds per picture, by role."""
        after = cpu_seconds(self._process)
        return {role: (after[role] - self._before.get(role, 0.0)) * 1000 / num_pictures for role in after}


def cpu_seconds(process: psutil.Process) -> dict[str, float]:
    """User and system time so far, by role."""
    seconds: dict[str, float] = defaultdict(float)
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            seconds[find_role(each)] += times.user + times.system
    return dict(seconds)


def find_role(process: psutil.Process) -> str:
    """The part of `fewstep serve` that it is; anything else is just a program."""
    if process.name().startswith(("redis", "valkey")):
        return "redis"
    arguments = process.cmdline()
    roles = {"gateway": "gateway", "worker": "worker", "serve": "supervisor"}
    return next((role for word, role in roles.items() if word in arguments), "program")
