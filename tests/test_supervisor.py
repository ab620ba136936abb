"""The supervisor as a process of its own, with small children."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

PARENT = """
import os, signal, sys, supervisor
def order(event, _):
    if event == "subprocess.Popen" and os.path.exists(os.path.join(sys.argv[2], "order")):
        os.kill(os.getpid(), signal.SIGHUP)
sys.addaudithook(order)
supervisor.Child.command = [sys.executable, sys.argv[1]]
children = [supervisor.Child(name, [name, sys.argv[2]], {}, stop_timeout_s=1.0) for name in sys.argv[3:]]
try:
    supervisor.Supervisor(children).run(lambda: True, lambda: print("up", flush=True))
except supervisor.ChildFailed as error:
    sys.exit(f"{error.name} failed")
"""

CHILD = """
import os, pathlib, signal, sys, time
import supervisor
supervisor.die_with_parent()
name, folder = sys.argv[1:]
with (pathlib.Path(folder) / name).open("a") as file:
    file.write(f"{os.getpid()}\\n")
if name == "misconfigured":
    sys.exit(78)
if name == "reader":
    signal.signal(signal.SIGHUP, lambda *_: (pathlib.Path(folder) / "read").write_text("again"))
    (pathlib.Path(folder) / "listens").touch()
if name == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""


class Family:
    """`pids(name)` are those of each start of that child."""

    def __init__(self, folder: Path, *names: str, **how: Any) -> None:
        self._folder = folder
        (folder / "child.py").write_text(CHILD)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        self.parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(folder / "child.py"), str(folder), *names],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **how,
        )

    def pids(self, name: str) -> list[int]:
        path = self._folder / name
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def make_family(tmp_path: Path) -> Iterator[Callable[..., Family]]:
    families: list[Family] = []

    def make(*names: str, **how: Any) -> Family:
        family = Family(tmp_path, *names, **how)
        families.append(family)
        return family

    yield make
    for family in families:
        family.parent.kill()
        family.parent.communicate()


def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "timed out"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_killed_child_is_started_again(make_family: Callable[..., Family]) -> None:
    family = make_family("one", "two")
    until(lambda: bool(family.pids("one") and family.pids("two")))
    os.kill(family.pids("one")[0], signal.SIGKILL)
    until(lambda: len(family.pids("one")) == 2)
    assert len(family.pids("two")) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(make_family: Callable[..., Family], number: signal.Signals) -> None:
    family = make_family("one", "stubborn")
    until(lambda: bool(family.pids("one") and family.pids("stubborn")))
    family.parent.send_signal(number)
    assert family.parent.wait(15) == 0
    assert is_gone(family.pids("one")[0])
    assert is_gone(family.pids("stubborn")[0])


@pytest.mark.parametrize("has_terminal", [False, True])
def test_a_hangup_is_passed_on_to_the_children(
    make_family: Callable[..., Family], tmp_path: Path, has_terminal: bool
) -> None:
    with terminal() as (_, slave):
        how = on_terminal(slave) if has_terminal else {"start_new_session": True}
        family = make_family("reader", "one", **how)
        until(lambda: bool(family.pids("one")) and (tmp_path / "listens").exists())
        family.parent.send_signal(signal.SIGHUP)
        until(lambda: (tmp_path / "read").exists())
        until(lambda: len(family.pids("one")) == 1)
        assert family.parent.poll() is None
        assert len(family.pids("reader")) == 1
        assert not is_gone(family.pids("one")[0]), "who knows nothing of SIGHUP lives on"


def test_a_hangup_while_a_child_is_started_is_passed_on(make_family: Callable[..., Family], tmp_path: Path) -> None:
    family = make_family("reader", "one", start_new_session=True)
    until(lambda: bool(family.pids("one")) and (tmp_path / "listens").exists())
    (tmp_path / "order").touch()
    os.kill(family.pids("one")[0], signal.SIGKILL)
    until(lambda: len(family.pids("one")) == 2)
    until(lambda: (tmp_path / "read").exists())


def test_the_end_of_its_terminal_ends_everything(make_family: Callable[..., Family], tmp_path: Path) -> None:
    with terminal() as (master, slave):
        family = make_family("reader", **on_terminal(slave))
        until((tmp_path / "listens").exists)
        os.close(master)
        assert family.parent.wait(15) == 0
    assert is_gone(family.pids("reader")[0])
    assert not (tmp_path / "read").exists()


def test_nohup_outlives_its_terminal(make_family: Callable[..., Family], tmp_path: Path) -> None:
    with terminal() as (master, slave):
        family = make_family("reader", **on_terminal(slave, is_ignored=True))
        until((tmp_path / "listens").exists)
        os.close(master)
        until(lambda: not has_terminal(family.parent.pid))
        family.parent.send_signal(signal.SIGHUP)
        until(lambda: (tmp_path / "read").exists())
        assert family.parent.poll() is None


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends; the test may close the master, which hangs it up."""
    master, slave = os.openpty()
    try:
        yield master, slave
    finally:
        os.close(slave)
        with suppress(OSError):
            os.close(master)


def on_terminal(slave: int, *, is_ignored: bool = False) -> dict[str, Any]:
    """How a process starts that has the terminal as its own, SIGHUP ignored as nohup does."""

    def prepare() -> None:
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        if is_ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    return {"start_new_session": True, "preexec_fn": prepare}


def has_terminal(pid: int) -> bool:
    return psutil.Process(pid).terminal() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere children look for their parent twice a second")
def test_children_die_with_a_killed_parent(make_family: Callable[..., Family]) -> None:
    family = make_family("one", "stubborn")
    until(lambda: bool(family.pids("one") and family.pids("stubborn")))
    family.parent.kill()
    until(lambda: is_gone(family.pids("one")[0]) and is_gone(family.pids("stubborn")[0]))


def test_a_child_that_cannot_work_ends_everything(make_family: Callable[..., Family]) -> None:
    family = make_family("one", "misconfigured")
    _, errors = family.parent.communicate(timeout=20)
    assert errors == "misconfigured failed\n"
    assert family.parent.returncode == 1
    assert len(family.pids("misconfigured")) == 1
    assert is_gone(family.pids("one")[0])
