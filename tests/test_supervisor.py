"""The supervisor as a process of its own, with small children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

PARENT = """
import sys, supervisor
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
if name == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""


class Family:
    """`pids(name)` are those of each start of that child."""

    def __init__(self, folder: Path, *names: str) -> None:
        self._folder = folder
        (folder / "child.py").write_text(CHILD)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        self.parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(folder / "child.py"), str(folder), *names],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def pids(self, name: str) -> list[int]:
        path = self._folder / name
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def make_family(tmp_path: Path) -> Iterator[Callable[..., Family]]:
    families: list[Family] = []

    def make(*names: str) -> Family:
        family = Family(tmp_path, *names)
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
