"""How much memory a device has, and how much of it is taken."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

RESERVE = 0.1  # of what is free: the allocator's own, and what other programs may want
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """What may still be taken: on a GPU of the card's memory, on a CPU of what the system has available, within the
    limits of its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available_bytes(), _container_bytes())


def used_bytes(device: torch.device) -> int:
    """What tensors take on a GPU; all that this process takes on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident_bytes()


def _available_bytes() -> int:
    if sys.platform == "linux":
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kib = {key: value.split()[0] for key, value in (line.split(":") for line in lines)}
        return int(kib["MemAvailable"]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_bytes(root: Path = CGROUP) -> int:
    """What a control group (version 2) leaves; its cached files can go."""
    try:
        limit = int((root / "memory.max").read_text(encoding="utf-8"))
        used = int((root / "memory.current").read_text(encoding="utf-8"))
        figures = (root / "memory.stat").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # none, or "max": no limit
        return sys.maxsize
    cached = next((int(line.split()[1]) for line in figures if line.startswith("inactive_file ")), 0)
    return max(0, limit - used + cached)


def _resident_bytes() -> int:
    if sys.platform == "linux":
        pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most so far, in bytes on macOS
