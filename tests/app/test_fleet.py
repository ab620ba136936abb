"""What the workers' measured costs say of a request."""

from __future__ import annotations

from typing import Any

import pytest

from app.fleet import find_warm, make_forecast
from broker.messages import SizeCosts, WarmModel, WorkerInfo
from broker.terms import Forecast
from models.catalog import ModelSpec, load_catalog
from tests.jobs import make_params, make_warm


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return load_catalog()["mini-lcm"]


def worker(warm: WarmModel | None = None, state: Any = "ready") -> WorkerInfo:
    return WorkerInfo("w", state, "cpu", "float32", (warm or make_warm("mini-lcm"),), 0)


def forecast(spec: ModelSpec, *workers: WorkerInfo, **params: Any) -> Forecast:
    defaults = {"width": 64, "height": 64, "num_inference_steps": 4, "guidance_scale": 0.0, "num_images": 1}
    return make_forecast(workers, make_params(**(defaults | params)), spec)


def test_only_ready_workers_with_the_model_count() -> None:
    workers = [worker(state="draining"), worker(make_warm("other")), worker()]
    assert [found.state for found, _ in find_warm(workers, "mini-lcm")] == ["ready"]
    assert find_warm(workers, "sd15-lcm") == []


def test_one_request_pays_for_its_row_and_waits_for_the_batch(spec: ModelSpec) -> None:
    """Measured: 1 ms text; steps of 10 ms for 1 row and 40 ms for 8; decodes of 4 and 16 ms."""
    cost = forecast(spec, worker())
    assert (cost.alone_ms, cost.num_slots) == (1 + 4 * 10 + 4, 8)
    assert cost.work_ms == 1 + (4 * 40 + 16) / 8
    assert cost.full_ms == 8 * cost.work_ms


def test_steps_pictures_and_guidance_cost(spec: ModelSpec) -> None:
    assert forecast(spec, worker(), num_inference_steps=8).work_ms == 1 + (8 * 40 + 16) / 8
    four = forecast(spec, worker(), num_images=4)
    assert (four.work_ms, four.num_slots) == (1 + 4 * (4 * 40 + 16) / 8, 2)
    guided = forecast(spec, worker(), guidance_scale=2.0)
    assert guided.num_slots == 4
    assert guided.alone_ms == pytest.approx(1 + 4 * (10 + 30 / 7) + 4)


def test_more_rows_than_a_batch_should_have(spec: ModelSpec) -> None:
    cost = forecast(spec, worker(make_warm("mini-lcm", max_rows=2)), num_images=8)
    assert (cost.alone_ms, cost.full_ms, cost.num_slots) == (1 + 4 * 40 + 16, 1 + 4 * 40 + 16, 1)


def test_workers_share_the_work_by_their_speed(spec: ModelSpec) -> None:
    one, two = forecast(spec, worker()), forecast(spec, worker(), worker())
    assert (two.work_ms, two.num_slots, two.full_ms) == (one.work_ms / 2, 16, one.full_ms)
    slow = make_warm("mini-lcm", step_ms={1: 100.0, 8: 400.0}, decode_ms={1: 40.0, 8: 160.0})
    mixed = forecast(spec, worker(), worker(slow))
    assert one.work_ms / 2 < mixed.work_ms < one.work_ms
    assert one.full_ms < mixed.full_ms < 2 * one.full_ms + 200, "most requests run on the fast one"


def test_each_size_has_its_own_costs(spec: ModelSpec) -> None:
    large = SizeCosts(128, 128, 2, {1: 40.0, 2: 80.0}, {1: 16.0, 2: 32.0}, {1: 4.0})
    warm = WarmModel("mini-lcm", "1", 8, 1.0, (*make_warm().sizes, large))
    assert forecast(spec, worker(warm), width=128, height=128).alone_ms == 1 + 4 * 40 + 16


def test_a_safety_check_is_part_of_the_work(spec: ModelSpec) -> None:
    checked = forecast(spec, worker(make_warm("mini-lcm", check_ms={1: 20.0, 8: 80.0})))
    assert (checked.alone_ms, checked.full_ms) == (1 + 4 * 10 + 4 + 20, 8 * (1 + (4 * 40 + 16 + 80) / 8))
