from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from models.rows import SharedRows


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def double(*tensors: Tensor) -> Tensor:
    return torch.stack(tensors).sum(0) * 2


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7])
@pytest.mark.parametrize("expected_rows", [1, 2, 8])
def test_rows_come_back_in_order(num_rows: int, expected_rows: int) -> None:
    rows = SharedRows(num_threads=3)
    rows.expect(expected_rows)
    one, other = torch.randn(num_rows, 4), torch.randn(num_rows, 4)
    assert torch.equal(rows.wrap(double)(one, other), double(one, other))


def test_a_network_may_give_several_tensors() -> None:
    rows = SharedRows(num_threads=2)
    rows.expect(4)
    batch = torch.arange(5.0)[:, None]
    plus, minus = rows.wrap(lambda tensor: (tensor + 1, -tensor))(batch)
    assert torch.equal(plus, batch + 1)
    assert torch.equal(minus, -batch)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
def test_the_counts_give_parts_of_every_size(num_threads: int) -> None:
    def sizes(counts: Iterable[int]) -> set[tuple[int, int]]:
        """(rows of a part, threads that it has)."""
        return {
            (len(part), max(1, num_threads // count))
            for count in counts
            for part in torch.zeros(count).tensor_split(min(num_threads // max(1, num_threads // count), count))
        }

    rows = SharedRows(num_threads)
    assert sizes(rows.counts(12)) == sizes(range(1, 13))
    assert len(rows.counts(12)) <= 12 // num_threads + num_threads


def seen_by(rows: SharedRows, num_rows: int) -> set[tuple[str, int, int]]:
    """(thread, its rows, its torch threads) of one call."""
    seen: set[tuple[str, int, int]] = set()
    together = threading.Barrier(min(rows.num_threads // rows._threads_per_row, num_rows), timeout=10)

    def network(tensor: Tensor) -> Tensor:
        together.wait()
        seen.add((threading.current_thread().name, len(tensor), torch.get_num_threads()))
        return tensor

    rows.wrap(network)(torch.zeros(num_rows, 1))
    return seen


def test_a_single_row_has_all_cores() -> None:
    rows = SharedRows(num_threads=4)
    rows.expect(1)
    assert seen_by(rows, 1) == {("MainThread", 1, 4)}


def test_many_rows_are_shared_one_thread_each() -> None:
    rows = SharedRows(num_threads=2)
    rows.expect(5)
    assert seen_by(rows, 5) == {("MainThread", 3, 1), ("rows_0", 2, 1)}


def test_two_rows_on_four_cores_take_two_threads_each() -> None:
    rows = SharedRows(num_threads=4)
    rows.expect(2)
    assert {seen[1:] for seen in seen_by(rows, 2)} == {(1, 2)}


def test_one_row_of_a_larger_batch_wakes_no_further_threads() -> None:
    rows = SharedRows(num_threads=4)
    rows.expect(8)
    assert seen_by(rows, 1) == {("MainThread", 1, 1)}


def test_what_a_part_raises_is_raised() -> None:
    rows = SharedRows(num_threads=2)
    rows.expect(2)

    def network(tensor: Tensor) -> Tensor:
        if float(tensor[0]) == 1:
            raise ValueError("no")
        return tensor

    with pytest.raises(ValueError, match="no"):
        rows.wrap(network)(torch.tensor([[0.0], [1.0]]))
