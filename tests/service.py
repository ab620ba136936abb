"""A real `fewstep serve` process for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Service:
    """`log` collects what the service and its children write."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def child(self, name: str) -> psutil.Process:
        """The gateway or the worker."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if process.cmdline()[-2:] == ["cli", name]:
                return process
        raise AssertionError(f"no {name} among the children:\n{self.log.read_text()}")

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise AssertionError(f"the service has ended:\n{self.log.read_text()}")
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log.read_text()}")

    def stop(self, number: int = signal.SIGINT) -> int:
        """The exit status."""
        self.process.send_signal(number)
        return self.process.wait(40)


def start_service(log: Path, *arguments: str, **environment: str) -> Service:
    """Starts it on a free port and returns when it is ready."""
    port = free_port()
    service = Service(
        spawn("serve", "--port", str(port), *arguments, log=log, **environment), f"http://127.0.0.1:{port}", log
    )
    try:
        service.wait_until_ready()
    except BaseException:
        service.process.kill()
        raise
    return service


def spawn(*arguments: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """The fewstep command as a process; without FEWSTEP_* variables but those given."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FEWSTEP_")}
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "cli", *arguments], stdout=stream, stderr=stream, env=clean | environment
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
