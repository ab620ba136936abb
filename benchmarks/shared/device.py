"""The device that torch computes on: its clock, its memory, and the kernels that it ran."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

MIN_ROUNDS = 3
MAX_CALL_S = 1.0  # the time that one median may take once it has its fewest rounds


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ms(call: Callable[[], object], device: torch.device) -> float:
    """What the device still computes is waited for, before and after."""
    wait_for(device)
    started_s = time.perf_counter()
    call()
    wait_for(device)
    return (time.perf_counter() - started_s) * 1000


def median_ms(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Of single calls, each waited for, after two that don't count."""
    for _ in range(2):
        call()
    times_ms: list[float] = []
    wait_for(device)
    started_s = time.perf_counter()
    while len(times_ms) < rounds and (len(times_ms) < MIN_ROUNDS or time.perf_counter() - started_s < MAX_CALL_S):
        times_ms.append(time_ms(call, device))
    return statistics.median(times_ms)


def kernel_times(call: Callable[[], object], device: torch.device) -> list[tuple[str, float]]:
    """The kernels that a GPU ran during a call: names and microseconds. Other devices tell none."""
    if device.type != "cuda":
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        wait_for(device)
    events = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    return [(event.name, event.time_range.elapsed_us()) for event in events if not event.name.startswith("Mem")]


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def read_peaks(device: torch.device) -> tuple[float, float]:
    """GiB allocated and reserved; graphs' pools are only reserved between their replays."""
    if device.type != "cuda":
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.max_memory_reserved(device) / 2**30
