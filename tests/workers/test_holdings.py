from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.messages import Delivery
from models.catalog import CATALOG_PATH, load_catalog
from tests.jobs import make_job
from workers.holdings import Holdings


@pytest.fixture
def holdings() -> Holdings:
    catalog = load_catalog(Path(CATALOG_PATH))
    holdings = Holdings({name: catalog[name] for name in ("mini-lcm", "sd15-lcm")})
    holdings.max_rows = {"mini-lcm": 8, "sd15-lcm": 2}
    return holdings


def deliver(request_id: str, *, model: str = "mini-lcm", lane: Any = "api", **params: Any) -> Delivery:
    return Delivery(replace(make_job(request_id, model=model, **params), lane=lane), attempt=1, waited_ms=0)


def test_guidance_takes_a_second_row(holdings: Holdings) -> None:
    holdings.take(deliver("plain", num_images=2))
    holdings.take(deliver("guided", num_images=2, guidance_scale=2.0))
    assert holdings.num_rows == 6
    assert holdings.room("mini-lcm") == 2


def test_each_model_has_room_of_its_own(holdings: Holdings) -> None:
    holdings.take(deliver("wide", num_images=9))
    assert (holdings.room("mini-lcm"), holdings.room("sd15-lcm")) == (0, 2)


def test_any_room_takes_a_request_that_is_wider(holdings: Holdings) -> None:
    """Handed back, it would come again and again, and narrow ones would always be before it."""
    holdings.take(deliver("narrow", num_images=7))
    assert holdings.has_room_for(deliver("wide", num_images=9))
    holdings.take(deliver("wide", num_images=9))
    assert not holdings.has_room_for(deliver("next"))
    assert holdings.has_room_for(deliver("live", lane="live"))


def test_rows_are_free_before_the_end_is_published(holdings: Holdings) -> None:
    holdings.take(deliver("a", num_images=8))
    holdings.free_rows("a")
    assert (holdings.room("mini-lcm"), holdings.request_ids) == (8, ["a"])
    holdings.release("a")
    assert holdings.request_ids == []
