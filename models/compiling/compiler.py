"""Compiles what is asked for, one network after the other, in a process of its own at low priority."""

from __future__ import annotations

import errno
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from models.compiling.cache import PackageCache
from models.compiling.recipe import Recipe

SOURCES = Path(__file__).parents[2]  # where `models` is imported from
STOP_S = 5.0
NO_COMPILER = "InvalidCxxCompiler"
OTHER_FOLDER = "make room and see that this user may write there, or choose another folder by FEWSTEP_COMPILE_CACHE"


class CompileError(Exception):
    """A network that can't be compiled; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Package:
    """A compiled network on disk; `seconds` is what it took, and None where it was there already."""

    path: Path
    library: Path
    seconds: float | None = None


class Compiler:
    """One for all models of a process. Nothing is compiled before `start`; what is asked for until then waits."""

    def __init__(self, cache: PackageCache) -> None:
        self._cache = cache
        self._wanted: queue.SimpleQueue[tuple[Recipe, Future[Package]] | None] = queue.SimpleQueue()
        self._num_wanted = self._num_settled = 0  # each is counted by one thread alone
        self._thread = threading.Thread(target=self._work, name="compiler", daemon=True)
        self._is_over = threading.Event()

    @property
    def num_open(self) -> int:
        """How many wait to be compiled, the one under way included. May be asked from any thread."""
        return self._num_wanted - self._num_settled

    def ask(self, recipe: Recipe) -> Future[Package]:
        """Done at once where the cache has it. Fails with CompileError."""
        answer: Future[Package] = Future()
        try:
            path = self._cache.find(recipe)
        except OSError as error:
            answer.set_exception(CompileError(_blame_folder(error)))
            return answer
        if path is not None:
            answer.set_result(Package(path, self._cache.library))
        else:
            self._num_wanted += 1
            self._wanted.put((recipe, answer))
        return answer

    def start(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()

    def stop(self) -> None:
        """Ends what is under way."""
        self._is_over.set()
        self._wanted.put(None)
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def _work(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            recipe, answer = wanted
            try:
                package = self._make(recipe)
            except OSError as error:
                answer.set_exception(CompileError(_blame_folder(error)))
            except Exception as error:  # noqa: BLE001 - handed to whoever asked
                answer.set_exception(error)
            else:
                if package is None:
                    return
                answer.set_result(package)
            self._num_settled += 1

    def _make(self, recipe: Recipe) -> Package | None:
        """None: asked to stop."""
        started_s = time.monotonic()
        with self._cache.lock(recipe, self._is_over.is_set) as work:
            # Another worker may have compiled it meanwhile.
            if work is not None and self._cache.find(recipe) is None and not self._is_over.is_set():
                self._run(recipe, work)
        if self._is_over.is_set():
            return None
        if (path := self._cache.find(recipe)) is None:
            raise CompileError(f"{self._cache.path(recipe)} was removed before it could be used")
        return Package(path, self._cache.library, time.monotonic() - started_s)

    def _run(self, recipe: Recipe, work: Path) -> None:
        """The process writes into a file, since a pipe that nobody reads would hold it up."""
        command = [
            sys.executable,
            "-m",
            "models.compiling.build",
            str(self._cache.folder.resolve()),
            str(work.resolve()),
        ]
        log = work / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(work),
                start_new_session=True,
                text=True,
            )
            try:
                self._wait(process, recipe)
            finally:
                _end(process)
        if process.returncode and not self._is_over.is_set():
            raise CompileError(explain(process.returncode, log.read_text(encoding="utf-8", errors="replace")))

    def _wait(self, process: subprocess.Popen[str], recipe: Recipe) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(recipe.to_json() + "\n")
            process.stdin.flush()
        except BrokenPipeError:  # it has ended already, and its log says why
            pass
        while process.poll() is None and not self._is_over.wait(0.1):
            pass


def _environment(work: Path) -> dict[str, str]:
    """All that a compiler leaves behind goes into the folder that is removed afterwards."""
    paths = os.pathsep.join(filter(None, [str(SOURCES), os.environ.get("PYTHONPATH")]))
    threads = max(1, (os.cpu_count() or 1) // 2)
    return {
        **os.environ,
        "PYTHONPATH": paths,
        "TMPDIR": str(work.resolve()),
        "TORCHINDUCTOR_CACHE_DIR": str(work.resolve() / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
    }


def _end(process: subprocess.Popen[str]) -> None:
    """With all that it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        process.stdin.close()
    process.wait()


def _blame_folder(error: OSError) -> str:
    return f"{error}: {OTHER_FOLDER}"


def explain(code: int, log: str) -> str:
    """One line on why the process failed."""
    if NO_COMPILER in log:
        return "there is no C++ compiler: install g++, or name one by CXX"
    if (is_full := os.strerror(errno.ENOSPC)) in log:
        return f"{is_full}: {OTHER_FOLDER}"
    if code < 0:
        return f"the process that compiles was ended by {signal.Signals(-code).name}; was there too little memory?"
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"the process that compiles ended with {code}"
