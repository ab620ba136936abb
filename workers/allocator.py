"""The memory allocator of processes that compute on a CPU.

torch takes an aligned block of memory for each tensor and gives it back a moment later: slow with glibc's allocator,
fast with tcmalloc (gperftools); docs/performance.md has the figures. No process can change its allocator, so this one
starts anew in its own place.
"""

from __future__ import annotations

import ctypes
import os
import sys

PRELOAD = "LD_PRELOAD"
TCMALLOC = "libtcmalloc_minimal.so.4"


def use_tcmalloc() -> None:
    """Start this process anew, with the same id and arguments, on tcmalloc where the system has it. Whoever sets
    LD_PRELOAD, even to nothing, has chosen already. To be called before anything is done."""
    if PRELOAD in os.environ or not _is_installed(TCMALLOC):
        return
    os.environ[PRELOAD] = TCMALLOC
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_installed(library: str) -> bool:
    if sys.platform != "linux":
        return False
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
