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
import pytest
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from app.access.key_file import format_entry, make_key, new_record
from app.live.protocol import AUTH_PREFIX, SUBPROTOCOL
from tests.service import free_port

START_S = 90.0


IN_BACKGROUND = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")  # as a shell without job control starts what ends in &


@contextmanager
def gateway(*before: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FEWSTEP_")}
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "cli", "gateway"],
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


@pytest.mark.parametrize("before", [(), IN_BACKGROUND], ids=["at a terminal", "in the background"])
def test_it_waits_for_redis_and_says_so(before: tuple[str, ...]) -> None:
    with gateway(*before, FEWSTEP_REDIS_URL=f"redis://127.0.0.1:{free_port()}", FEWSTEP_PORT="0") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "waiting for Redis (FEWSTEP_REDIS_URL)" in line
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=START_S)
        assert process.returncode == 130
        assert "Traceback" not in output


def test_a_hangup_while_it_waits_for_redis_reads_the_catalog_and_ends_nothing() -> None:
    with gateway(FEWSTEP_REDIS_URL=f"redis://127.0.0.1:{free_port()}", FEWSTEP_PORT="0") as process:
        assert process.stdout is not None
        assert "waiting for Redis" in process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert any("the catalog was read again" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=START_S)
        assert process.returncode == 130


def test_no_key_is_written_down_even_at_level_debug(redis_url: str) -> None:
    key_id, key = make_key()
    keys = format_entry(key_id, new_record(key))
    port = free_port()
    with gateway(
        FEWSTEP_REDIS_URL=redis_url, FEWSTEP_PORT=str(port), FEWSTEP_API_KEYS=keys, FEWSTEP_LOG_LEVEL="debug"
    ) as process:
        wait_until_alive(port)
        address = f"127.0.0.1:{port}/v1"
        httpx.get(f"http://{address}/models", params={"key": key}, headers={"Authorization": f"Bearer {key}"})
        subprotocols = [Subprotocol(name) for name in (SUBPROTOCOL, AUTH_PREFIX + key)]
        with connect(f"ws://{address}/live?x=1", subprotocols=subprotocols) as live:
            assert "ready" in str(live.recv())
            live.send(f'{{"type": "auth", "token": "{key}"}}')
            assert "authenticated" in str(live.recv())
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=START_S)
    assert "fewstep.auth.…" in output
    assert key.split("_", 2)[2] not in output


def test_many_live_sockets_find_room() -> None:
    """The usual soft limit of open files is far below what the hard one allows."""
    assert run_with_open_files(soft=100, hard=2000, wanted=1500) == "2000 2000\n"


def test_too_few_open_files_are_said_at_the_start() -> None:
    *warning, limits = run_with_open_files(soft=100, hard=200, wanted=1500).splitlines()
    assert limits == "200 200"
    assert warning == ["200 files may be open, FEWSTEP_MAX_CONNECTIONS needs 1500: raise the hard limit (ulimit -Hn)"]


def run_with_open_files(soft: int, hard: int, wanted: int) -> str:
    """What a process with these limits says, and its limits after."""
    program = f"""
import resource
from app.process import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
allow_open_files({wanted})
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def test_only_what_is_new_is_collected() -> None:
    """The walk over everything that is loaded would hold up all sockets."""
    program = "import gc, app.main; app.process.calm_garbage_collector(); print(len(gc.get_objects()))"
    output = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert int(output) < 1000
