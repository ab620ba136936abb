from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from workers.memory import _container_bytes, free_bytes, used_bytes

CPU = torch.device("cpu")


def test_what_is_taken_grows_with_what_is_allocated() -> None:
    before = used_bytes(CPU)
    ballast = torch.ones(2**26)
    assert used_bytes(CPU) - before >= ballast.nbytes * 0.9


def test_something_is_free() -> None:
    assert 0 < free_bytes(CPU) < sys.maxsize


@pytest.mark.parametrize(
    ("limit", "expected"), [("1000", 1000 - 600 + 150), ("max", sys.maxsize), ("500", 500 - 600 + 150), ("100", 0)]
)
def test_a_containers_limit_counts(tmp_path: Path, limit: str, expected: int) -> None:
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 150\nactive_file 50\n")
    assert _container_bytes(tmp_path) == expected


def test_no_container_no_limit(tmp_path: Path) -> None:
    assert _container_bytes(tmp_path) == sys.maxsize
