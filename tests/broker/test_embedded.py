"""The server that we start ourselves."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from redis import Redis

from broker import embedded
from broker.embedded import EmbeddedRedis, find_server, resolve
from broker.errors import BrokerUnavailable, RedisNotFound, RedisTooOld


def is_up(url: str) -> bool:
    with Redis.from_url(url) as client:
        return bool(client.ping())


def test_it_runs_in_a_folder_of_its_own_and_leaves_nothing() -> None:
    server = EmbeddedRedis()
    with server:
        assert is_up(server.url)
        folder, pid = server.data_dir, server.pid
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert (folder / "redis.log").exists()
        with Redis.from_url(server.url) as client:
            config = client.config_get("*")
            wanted = {"port": "0", "appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
            assert {name: config[name] for name in wanted} == wanted
    server.stop()
    assert not folder.exists()
    assert not psutil.pid_exists(pid)


def test_data_outlives_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "my data, 100%"
    with EmbeddedRedis(folder) as server, Redis.from_url(server.url) as client:
        client.set("name", "value")
    with EmbeddedRedis(folder) as server, Redis.from_url(server.url) as client:
        assert client.get("name") == b"value"
    assert (folder / "redis.log").exists()


def test_two_servers_dont_share_a_folder(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path), pytest.raises(BrokerUnavailable, match="another server uses"):
        EmbeddedRedis(tmp_path).start(timeout_s=0.1)


def test_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60) / ("y y" * 20)
    server = EmbeddedRedis(deep)
    with server:
        assert is_up(server.url)
        assert str(deep) not in server.url
        assert (deep / "redis.log").exists()
        folder = Path(server.url.removeprefix("unix://")).parent
    assert not folder.exists()
    assert deep.exists()


def test_it_says_why_it_doesnt_come_up(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"this is no append-only file")
    with pytest.raises(BrokerUnavailable, match=r"(?s)ended with status 1; the end of its log:.*append only file"):
        EmbeddedRedis(tmp_path).start()


def test_it_starts_and_stops_fast() -> None:
    start = time.monotonic()
    with EmbeddedRedis():
        pass
    assert time.monotonic() - start < 3


PARENT = """
import sys, time
from broker.embedded import EmbeddedRedis
server = EmbeddedRedis()
server.start()
print(server.pid, server.data_dir, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child to its parent")
def test_it_ends_with_a_killed_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        server = psutil.Process(int(pid))
        assert server.is_running()
        os.kill(parent.pid, signal.SIGKILL)
    psutil.wait_procs([server], timeout=5)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
    subprocess.run(["rm", "-r", folder], check=True)


def test_a_given_url_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_REDIS_URL", "redis://of.the.environment")
    with resolve() as given:
        assert given.url == "redis://of.the.environment"
    with resolve("rediss://given") as given:
        assert given.url == "rediss://given"
        assert not given.revive()


def test_without_a_url_a_server_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEWSTEP_REDIS_URL", raising=False)
    with resolve(data_dir=tmp_path) as server:
        assert is_up(server.url)
        assert server.url == f"unix://{tmp_path}/redis.sock"


def test_a_server_that_died_comes_back_with_its_data_at_the_same_url() -> None:
    with EmbeddedRedis() as server, Redis.from_url(server.url) as client:
        url = server.url
        assert not server.revive()
        client.set("key", "value")
        time.sleep(1.2)  # the append-only file is written every second
        os.kill(server.pid, signal.SIGKILL)
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        assert server.revive()
        assert server.url == url
        assert client.get("key") == b"value"


def fake_server(folder: Path, name: str, version: str) -> Path:
    server = folder / name
    server.write_text(f"#!/bin/sh\necho '{version}'\n")
    server.chmod(0o755)
    return server


def test_a_server_on_path_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    redis_server = fake_server(tmp_path, "redis-server", "Redis server v=7.0.15 sha=00000000:0 malloc=libc bits=64")
    assert find_server() == redis_server
    valkey_server = fake_server(tmp_path, "valkey-server", "Valkey server v=8.1.0 sha=00000000:0 malloc=libc bits=64")
    assert find_server() == valkey_server


def test_an_old_server_on_path_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    fake_server(tmp_path, "redis-server", "Redis server v=6.0.16 sha=00000000:0")
    with pytest.raises(RedisTooOld, match=r"6\.0\.16"):
        find_server()
    fake_server(tmp_path, "redis-server", "no idea")
    with pytest.raises(RedisNotFound, match="doesn't say its version"):
        find_server()


def test_without_any_server_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded, "_find_bundled", lambda: None)
    with pytest.raises(RedisNotFound, match=r"FEWSTEP_REDIS_URL isn't set.*Install one: .*redis"):
        find_server()
    for platform, command in (("darwin", "brew install valkey"), ("win32", "docker compose up")):
        monkeypatch.setattr("sys.platform", platform)
        with pytest.raises(RedisNotFound, match=command):
            find_server()
