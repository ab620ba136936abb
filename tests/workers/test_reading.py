"""What a running worker takes over of a catalog that was read again."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from models.catalog import ModelSpec, StepRange, StyleLora, load_catalog
from workers.reading import FIXED, take_over

INK = StyleLora(name="ink", description="ink", source="nobody/ink", models=["mini-lcm"], license="MIT")
SPEC = load_catalog()["mini-lcm"].model_copy(update={"loras": {}})


def changed(**changes: Any) -> ModelSpec:
    return SPEC.model_copy(update=changes)


def test_what_is_fixed_are_fields_of_an_entry() -> None:
    assert set(ModelSpec.model_fields) > FIXED


def test_limits_change_and_what_was_loaded_stays(caplog: pytest.LogCaptureFixture) -> None:
    steps = StepRange(default=2, min=1, max=2)
    now = changed(num_inference_steps=steps, source="/elsewhere", dtype="float32", description="new")
    with caplog.at_level(logging.INFO):
        taken = take_over({"mini-lcm": SPEC}, {"mini-lcm": now})
    assert taken == {"mini-lcm": changed(num_inference_steps=steps, description="new")}
    assert caplog.messages == [
        "mini-lcm: dtype, source of the catalog changed: that needs a new start of this worker",
        "mini-lcm: the catalog was read again, changed: description, num_inference_steps",
    ]


def test_nothing_changed_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert take_over({"mini-lcm": SPEC}, {"mini-lcm": SPEC}) == {"mini-lcm": SPEC}
    assert caplog.messages == []


def test_style_loras_come(caplog: pytest.LogCaptureFixture) -> None:
    specs = {"mini-lcm": SPEC, "other": changed(name="other")}
    assert take_over(specs, specs | {"mini-lcm": changed(loras={"ink": INK})})["mini-lcm"].loras == {"ink": INK}
    assert caplog.messages == []
