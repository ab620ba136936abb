from __future__ import annotations

import pytest

from broker.messages import SizeCosts, WarmModel, cost_at


@pytest.mark.parametrize(("rows", "ms"), [(1, 10.0), (2, 12.0), (3, 14.0), (4, 16.0), (6, 24.0), (8, 32.0), (16, 64.0)])
def test_costs_lie_on_lines_between_what_was_measured(rows: int, ms: float) -> None:
    assert cost_at({1: 10.0, 2: 12.0, 4: 16.0, 8: 32.0}, rows) == ms


def test_below_the_least_measured_batch_rows_cost_what_it_cost() -> None:
    assert cost_at({4: 16.0}, 1) == 16.0


def test_a_size_that_was_not_measured_has_the_costs_of_the_one_nearest_in_area() -> None:
    small, large = (SizeCosts(side, side, 8, {1: 1.0}, {1: 1.0}, {1: 1.0}) for side in (64, 128))
    warm = WarmModel("m", "1", 8, 1.0, (small, large))
    assert warm.find_costs(96, 64) is small
    assert warm.find_costs(128, 96) is large
