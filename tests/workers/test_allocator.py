"""The allocator, with a library of another name in tcmalloc's place, so that it needn't be installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers.allocator import PRELOAD

LIBRARY = "libstandin.so.4"
CODE = f"""
import os, sys
from workers import allocator
print(os.getpid(), flush=True)
allocator.TCMALLOC = "{LIBRARY}"
allocator.use_tcmalloc()
print(repr(os.environ.get("{PRELOAD}")), sys.argv[1:])
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is Linux's")


def run(environment: dict[str, str]) -> list[str]:
    """What the process prints: its id each time it starts, then what is preloaded, and its arguments."""
    clean = {name: value for name, value in os.environ.items() if name != PRELOAD}
    command = [sys.executable, "-c", CODE, "worker", "two words"]
    done = subprocess.run(command, env=clean | environment, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """An environment in which the library is found."""
    libraries = (line.split()[-1] for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())
    (tmp_path / LIBRARY).symlink_to(next(path for path in libraries if "/libm.so" in path))
    return {"LD_LIBRARY_PATH": str(tmp_path)}


def test_the_process_starts_anew_once_with_the_same_id_and_arguments(installed: dict[str, str]) -> None:
    first, again, end = run(installed)
    assert first == again
    assert end == f"{LIBRARY!r} ['worker', 'two words']"


@pytest.mark.parametrize("chosen", ["", "libm.so.6"])
def test_a_choice_that_was_made_is_left_alone(installed: dict[str, str], chosen: str) -> None:
    _, end = run(installed | {PRELOAD: chosen})
    assert end == f"{chosen!r} ['worker', 'two words']"


def test_without_the_library_everything_stays_as_it_is() -> None:
    _, end = run({})
    assert end == "None ['worker', 'two words']"
