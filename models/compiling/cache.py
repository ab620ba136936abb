"""Compiled networks on disk, kept between starts."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from models.compiling.recipe import NUM_DIGITS, Recipe

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("network.cpp")
POLL_S = 0.5


class PackageCache:
    """A folder that several workers may share. It holds machine code: nobody else may write to it.

    Files appear under their names only when they are whole. Folders that end in "building" belong to whoever holds the
    lock of that name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def library(self) -> Path:
        """What runs packages, compiled from network.cpp for this torch."""
        made_of = f"{torch.__version__} {os.uname().machine}".encode() + SOURCE.read_bytes()
        return self.folder / f"network-{hashlib.sha256(made_of).hexdigest()[:NUM_DIGITS]}.so"

    def path(self, recipe: Recipe) -> Path:
        return self.folder / f"{recipe.name}.pt2"

    def find(self, recipe: Recipe) -> Path | None:
        """The package, if it is here and whole. A damaged one is removed: running it could end the process."""
        path = self.path(recipe)
        if not (path.exists() and self.library.exists()):
            return None
        if not _is_whole(path):
            logger.warning("%s is damaged and will be compiled anew", path)
            path.unlink(missing_ok=True)
            return None
        return path

    @contextmanager
    def lock(self, recipe: Recipe, is_over: Callable[[], bool]) -> Iterator[Path | None]:
        """A folder to work in, empty, once no other process compiles the same; None if `is_over` before that. The
        system gives back the lock of a process that has ended, however it did."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        work = self.folder / f"{recipe.name}.building"
        with (self.folder / f"{recipe.name}.lock").open("w") as lock:
            while not _try_to_lock(lock.fileno()):
                if is_over():
                    yield None
                    return
                time.sleep(POLL_S)
            try:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)


def _is_whole(package: Path) -> bool:
    """By the checksums that a package, which is a zip file, has of its parts."""
    try:
        with zipfile.ZipFile(package) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError):
        return False


def _try_to_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
