"""From latents to pixels, beside the steps.

On a CPU a decode is one batch, done when it returns. On a GPU one picture of the full decoder fills the card, so
pictures are decoded row by row on a stream of low priority, and whoever waits for the next step doesn't wait for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from workers.engine.outputs import Pixels

Decode = Callable[[Tensor], Tensor]


class PendingPixels(Protocol):
    """Pixels "n height width 3" that may still be on their way."""

    def is_ready(self) -> bool: ...

    def collect(self) -> tuple[Pixels, float]:
        """The pixels, and the milliseconds that decoding them took. Waits where they aren't ready."""
        ...


class Decoder(Protocol):
    def start(self, decode: Decode, latents: Sequence[Tensor]) -> list[PendingPixels]:
        """Begins to decode several requests' latents, each "n c h w"; one answer per request."""
        ...


def decoder_for(device: torch.device) -> Decoder:
    return StreamDecoder(device) if device.type == "cuda" else BatchDecoder()


class BatchDecoder:
    """All rows at once, at once."""

    def start(self, decode: Decode, latents: Sequence[Tensor]) -> list[PendingPixels]:
        started_s = time.perf_counter()
        pixels = decode(torch.cat(list(latents))).cpu()
        decode_ms = (time.perf_counter() - started_s) * 1000
        return [DonePixels(part.numpy(), decode_ms) for part in torch.split(pixels, [len(rows) for rows in latents])]


@dataclass(frozen=True, slots=True, eq=False)
class DonePixels:
    pixels: Pixels
    decode_ms: float

    def is_ready(self) -> bool:
        return True

    def collect(self) -> tuple[Pixels, float]:
        return self.pixels, self.decode_ms


class StreamDecoder:
    """Row by row on a stream of the lowest priority, into pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = cast(Any, torch.cuda.Stream)(device, priority=0)  # the lowest priority there is

    def start(self, decode: Decode, latents: Sequence[Tensor]) -> list[PendingPixels]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            return [self._decode_rows(decode, rows) for rows in latents]

    def _decode_rows(self, decode: Decode, latents: Tensor) -> PendingPixels:
        latents.record_stream(self._stream)
        started, done = (cast(Any, torch.cuda.Event)(enable_timing=True) for _ in range(2))
        started.record(self._stream)
        rows = [_copy_to_host(decode(row)) for row in torch.split(latents, 1)]
        done.record(self._stream)
        return StreamedPixels(rows, started, done)


def _copy_to_host(pixels: Tensor) -> Tensor:
    host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    return host.copy_(pixels, non_blocking=True)


@dataclass(frozen=True, slots=True, eq=False)
class StreamedPixels:
    rows: list[Tensor]
    started: Any  # torch.cuda.Event
    done: Any

    def is_ready(self) -> bool:
        return bool(self.done.query())

    def collect(self) -> tuple[Pixels, float]:
        self.done.synchronize()
        pixels: Pixels = torch.cat(self.rows).numpy()
        return pixels, self.started.elapsed_time(self.done)
