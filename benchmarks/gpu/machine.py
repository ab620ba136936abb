"""Where it was measured, and what the device can do at best: the floor's own figures are options."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time

import torch

from benchmarks.shared.device import median_ms
from benchmarks.shared.machine import cpu_name

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "pillow", "numpy")


def describe(device: torch.device) -> dict[str, object]:
    machine: dict[str, object] = {
        "device": str(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return machine | describe_gpu(device) if device.type == "cuda" else machine


def describe_gpu(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "measured_tflops": round(measure_tflops(device), 1),
        "measured_tb_per_s": round(measure_tb_per_s(device), 2),
    }


def measure_tflops(device: torch.device, side: int = 8192) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=torch.float16) for _ in range(2))
    return 2 * side**3 / median_ms(lambda: left @ right, device, rounds=20) / 1e9


def measure_tb_per_s(device: torch.device, num_bytes: int = 2**31) -> float:
    """Read and written together, by a copy."""
    source = torch.zeros(num_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_ms(lambda: target.copy_(source), device, rounds=20) / 1e9
