"""Each shape of attention on its own, with each backend that torch has for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.parts import Costs
from benchmarks.gpu.report import AttentionRow, Report
from benchmarks.gpu.subject import format_size
from benchmarks.shared.counting import Attention
from benchmarks.shared.device import kernel_times, median_ms

BACKENDS = {
    "flash_ms": SDPBackend.FLASH_ATTENTION,
    "efficient_ms": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn_ms": SDPBackend.CUDNN_ATTENTION,
    "math_ms": SDPBackend.MATH,
}


def measure_attention(costs: Costs, device: torch.device, rounds: int, report: Report) -> Iterator[AttentionRow]:
    for part, counter in costs.count(1).items():
        for attention, count in counter.attentions.items():
            report.check_time()
            call = attention_call(attention, device, costs.dtype)
            times_ms = {name: time_backend(backend, call, device, rounds) for name, backend in BACKENDS.items()}
            yield AttentionRow(
                architecture=costs.architecture.name,
                size=format_size(costs.size),
                part=part,
                count=count,
                query=format_shape(attention.query),
                key=format_shape(attention.key),
                causal=attention.is_causal,
                mask=attention.has_mask,
                chosen=longest_kernel(call, device),
                default_ms=median_ms(call, device, rounds),
                **times_ms,
            )


def attention_call(attention: Attention, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Laid out in memory as diffusers and transformers do, heads beside each other within a token."""
    query, key, value = (
        torch.randn(b, tokens, heads, width, device=device, dtype=dtype).transpose(1, 2)
        for b, heads, tokens, width in (attention.query, attention.key, attention.key)
    )
    mask_shape = attention.query[0], 1, attention.query[2], attention.key[2]
    mask = torch.zeros(mask_shape, device=device, dtype=dtype) if attention.has_mask else None
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=attention.is_causal
    )


def time_backend(backend: SDPBackend, call: Callable[[], object], device: torch.device, rounds: int) -> float | None:
    """None where the backend can't do it; torch then warns of each reason."""
    with warnings.catch_warnings(), sdpa_kernel([backend]):
        warnings.simplefilter("ignore")
        try:
            return median_ms(call, device, rounds)
        except RuntimeError:
            return None


def longest_kernel(call: Callable[[], object], device: torch.device) -> str:
    """Its name, which tells the backend."""
    name, _ = max(kernel_times(call, device), key=lambda kernel: kernel[1], default=("-", 0.0))
    return name[:60].replace("|", "/")


def format_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
