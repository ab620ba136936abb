"""Fingerprints: another one as soon as a value or a file is another, on whatever machine and in whatever folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

NUM_CHUNKS = 16
CHUNK_BYTES = 4096
NUM_DIGITS = 16


def fingerprint(*values: object) -> str:
    """Of plain values, in this order."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:NUM_DIGITS]


def file_fingerprints(files: Iterable[Path]) -> list[tuple[str, int, str]]:
    """Name, size and sampled content of each: 16 pieces, so that files of gigabytes take no time. Two checkpoints of
    one architecture differ in each of them."""
    return [(path.name, path.stat().st_size, _sampled_hash(path)) for path in sorted(files)]


def tensor_fingerprint(tensor: Tensor) -> str:
    """Of shape and a sample of the rows."""
    sample = tensor[:: max(1, len(tensor) // NUM_CHUNKS)].contiguous().cpu().numpy()
    return fingerprint(tuple(tensor.shape), hashlib.sha256(sample.tobytes()).hexdigest())


def _sampled_hash(path: Path) -> str:
    size = path.stat().st_size
    stride = max(CHUNK_BYTES, (size - CHUNK_BYTES) // max(1, NUM_CHUNKS - 1))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(NUM_CHUNKS):
            file.seek(number * stride)
            digest.update(file.read(CHUNK_BYTES))
    return digest.hexdigest()
