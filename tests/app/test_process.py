"""The gateway as a process: what its user sees when it starts, can't start, and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.service import free_port

START_S = 90.0


@contextmanager
def gateway(**variables: str) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FEWSTEP_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "gateway"],
        env=environment | {"FEWSTEP_ALLOW_ANONYMOUS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_alive(port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
            return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("the gateway didn't start")


def test_start_and_ctrl_c(redis_url: str) -> None:
    port = free_port()
    with gateway(FEWSTEP_REDIS_URL=redis_url, FEWSTEP_PORT=str(port)) as process:
        wait_until_alive(port)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=START_S)
        assert f"the gateway serves http://127.0.0.1:{port}" in output
        assert "Traceback" not in output


def test_a_port_in_use(redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with gateway(FEWSTEP_REDIS_URL=redis_url, FEWSTEP_PORT=str(port)) as process:
            output, _ = process.communicate(timeout=START_S)
            assert process.returncode == 78
            assert output.strip().startswith(f"fewstep: can't listen on 127.0.0.1:{port}: Address already in use")
            assert output.count("\n") == 1


def test_nobody_has_said_who_may_come_in() -> None:
    with gateway(FEWSTEP_ALLOW_ANONYMOUS="0") as process:
        output, _ = process.communicate(timeout=START_S)
        assert process.returncode == 78
        assert "FEWSTEP_ALLOW_ANONYMOUS=1" in output
        assert output.count("\n") == 1


def test_it_waits_for_redis_and_says_so() -> None:
    with gateway(FEWSTEP_REDIS_URL=f"redis://127.0.0.1:{free_port()}", FEWSTEP_PORT="0") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "waiting for Redis (FEWSTEP_REDIS_URL)" in line
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=START_S)
        assert process.returncode == 130
        assert "Traceback" not in output
