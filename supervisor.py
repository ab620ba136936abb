"""The parent of `fewstep serve`: starts gateway and worker as processes of their own and keeps them running.

Children die with their parent, whatever ends it. A child that crashes is started again after a pause; one that can't
work (exit status EX_CONFIG: a bad setting, a damaged model) ends everything, since a restart wouldn't help. SIGHUP is
passed on to the children, which read the catalog again, unless it came with the end of the terminal.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

logger = logging.getLogger(__name__)

EX_CONFIG = 78  # sysexits.h
PARENT_VARIABLE = "FEWSTEP_PARENT_PID"
MIN_PAUSE_S, MAX_PAUSE_S = 0.2, 10.0
STABLE_S = 30.0
PR_SET_PDEATHSIG = 1


class ChildFailed(Exception):
    """A child that can't work; it has printed the reason itself."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} can't start")
        self.name = name


class Terminal:
    """The terminal that this process was started from, if it was from one."""

    def __init__(self) -> None:
        is_heeded = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # as nohup sets it
        self._was_there = is_heeded and self._is_there()

    def has_hung_up(self) -> bool:
        """Whether a SIGHUP comes from its end: then everything ends with it. Any other one is an order to reload."""
        return self._was_there and not self._is_there()

    def _is_there(self) -> bool:
        try:
            os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
        except OSError:
            return False
        return True


@dataclass
class Child:
    """One process under supervision: `arguments` of the fewstep command, `environment` beside our own."""

    command: ClassVar[Sequence[str]] = (sys.executable, "-m", "cli")

    name: str
    arguments: Sequence[str]
    environment: dict[str, str]
    stop_timeout_s: float = 10.0
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    pause_s: float = MIN_PAUSE_S
    restart_at_s: float = field(default=0.0)

    def start(self) -> None:
        environment = os.environ | self.environment | {PARENT_VARIABLE: str(os.getpid())}
        # Before it has read its catalog a SIGHUP has nothing to tell it, and would end it: the child inherits the block
        # and lifts it in `die_with_parent`. One that comes to us meanwhile waits.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        # A session of its own: Ctrl-C reaches the parent alone, which stops its children in order.
        self.process = subprocess.Popen([*self.command, *self.arguments], env=environment, start_new_session=True)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.started_s = time.monotonic()

    def hang_up(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(self.stop_timeout_s)
        except subprocess.TimeoutExpired:
            logger.warning("%s doesn't end by itself: killing it", self.name)
            self.process.kill()
            self.process.wait()


class Supervisor:
    """Runs `children` until SIGINT, SIGTERM or the end of its terminal; stops them in their order. `tend` is called ten
    times a second."""

    def __init__(self, children: Sequence[Child], tend: Callable[[], None] = lambda: None) -> None:
        self._children = children
        self._tend = tend
        self._stopping = threading.Event()
        self._must_hang_up = False

    def run(self, is_up: Callable[[], bool], on_up: Callable[[], None]) -> None:
        """Blocks. Calls `on_up` once, as soon as `is_up` says so. Raises ChildFailed."""
        self._catch_signals()
        try:
            for child in self._children:
                child.start()
            self._main_loop(is_up, on_up)
        finally:
            for child in self._children:
                child.stop()

    def _main_loop(self, is_up: Callable[[], bool], on_up: Callable[[], None]) -> None:
        was_up = False
        while not self._stopping.wait(0.1):
            self._tend()
            for child in self._children:
                self._look_after(child)
            self._pass_on_hangup()
            if not was_up and is_up():
                was_up = True
                on_up()

    def _look_after(self, child: Child) -> None:
        if child.process is None:
            if time.monotonic() >= child.restart_at_s:
                child.start()
            return
        status = child.process.poll()
        if status is None:
            return
        if status == EX_CONFIG:
            raise ChildFailed(child.name)
        is_stable = time.monotonic() - child.started_s > STABLE_S
        child.pause_s = MIN_PAUSE_S if is_stable else min(child.pause_s * 2, MAX_PAUSE_S)
        child.restart_at_s = time.monotonic() + child.pause_s
        child.process = None
        logger.error("%s ended (%s); starting it again in %.1f s", child.name, _describe(status), child.pause_s)

    def _pass_on_hangup(self) -> None:
        if self._must_hang_up:
            self._must_hang_up = False
            for child in self._children:
                child.hang_up()

    def _catch_signals(self) -> None:
        terminal = Terminal()

        def hear_hangup(*_: object) -> None:
            if terminal.has_hung_up():
                self._stopping.set()
            else:
                self._must_hang_up = True

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._stopping.set())
        signal.signal(signal.SIGHUP, hear_hangup)


def die_with_parent() -> None:
    """Called first in a child: the kernel kills it when the supervisor is gone, however that went.

    SIGHUP, which `Child.start` had blocked, is ignored until the child has a handler of its own.
    """
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None:
        return
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(int(parent),), daemon=True).start()
    if os.getppid() != int(parent):
        sys.exit("the supervisor has ended")


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _describe(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
