from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.catalog import ModelSpec, StyleLora
from models.loading import load_pipeline
from models.pipeline import FewStepPipeline
from workers.engine import Engine
from workers.engine.calibration import WarmUpError, batch_sizes, num_warm_ups, useful_rows, warm_up
from workers.engine.runner import ModelRunner


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_batch_sizes(spec: ModelSpec, largest: int, sizes: list[int]) -> None:
    assert batch_sizes(spec.model_copy(update={"max_batch_size": largest}), torch.device("cpu")) == sizes


def test_a_gpu_has_more_batch_sizes_since_it_pads_to_them(spec: ModelSpec) -> None:
    assert batch_sizes(spec, torch.device("cuda")) == [1, 2, 3, 4, 6, 8, 12, 16]


def test_the_cost_table_covers_every_batch_size(engine: Engine) -> None:
    reports: list[str] = []
    warm_model = warm_up(engine, "small", reports.append)
    (costs,) = warm_model.sizes
    assert (costs.width, costs.height) == (32, 32)
    for table in (costs.step_ms, costs.decode_ms, costs.preview_ms):
        assert list(table) == [1, 2, 4, 8, 16]
        assert min(table.values()) > 0
    runner = engine.runners["small"]
    assert len(reports) == num_warm_ups(runner.pipeline.spec, torch.device("cpu"))
    assert runner.max_rows((32, 32)) == runner.max_rows((48, 32)) == costs.max_rows
    assert not engine.has_work


def test_each_warm_size_is_proven_and_measured(spec: ModelSpec) -> None:
    both = spec.model_copy(update={"warm_sizes": [(32, 32), (48, 32)], "max_batch_size": 8})
    engine = Engine({"small": ModelRunner(load_pipeline(both, torch.device("cpu"), torch.float32))})
    sizes = warm_up(engine, "small").sizes
    assert [(costs.width, costs.height) for costs in sizes] == [(32, 32), (48, 32)]


def test_it_tells_by_which_entry_it_draws_before_and_after_a_reload(spec: ModelSpec) -> None:
    ink = StyleLora(name="ink", description="ink", source="nobody/ink", models=["small"], license="MIT")
    loaded = spec.model_copy(update={"max_batch_size": 4, "max_num_images": 1, "loras": {}})
    runner = ModelRunner(load_pipeline(loaded, torch.device("cpu"), torch.float32))
    warm = warm_up(Engine({"small": runner}), "small")
    assert (warm.fingerprint, warm.loras) == (loaded.fingerprint, ())
    now = loaded.model_copy(update={"loras": {"ink": ink}})
    runner.update(now)
    assert runner.warm_model == replace(warm, fingerprint=now.fingerprint, loras=("ink",))


@pytest.mark.parametrize(
    ("step_ms", "rows"),
    [
        ({1: 10.0, 2: 12.0, 4: 16.0, 8: 30.0}, 8),
        ({1: 10.0, 2: 12.0, 4: 16.0, 8: 32.0}, 4),  # a row of 8 costs what a row of 4 costs, and each waits for all
        ({1: 10.0, 2: 12.0, 4: 16.0, 8: 31.9}, 4),  # nor does it pay within what measuring can tell
        ({1: 10.0, 2: 20.0, 4: 40.0}, 1),
        ({1: 10.0, 2: 21.0, 4: 30.0}, 4),
        ({6: 10.0}, 6),
    ],
)
def test_a_batch_stops_to_grow_where_a_row_gets_no_cheaper(step_ms: dict[int, float], rows: int) -> None:
    assert useful_rows(step_ms) == rows


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda latents: torch.zeros(len(latents), 32, 32, 3, dtype=torch.uint8), "one constant colour"),
        (lambda _: 1 / 0, "division by zero"),
    ],
)
def test_an_unsound_picture_fails_the_start(
    engine: Engine, pipeline: FewStepPipeline, monkeypatch: pytest.MonkeyPatch, broken: object, message: str
) -> None:
    monkeypatch.setattr(pipeline, "decode", broken)
    with pytest.raises(WarmUpError, match=message):
        warm_up(engine, "small")


def test_latents_that_are_not_finite_fail_the_start(
    engine: Engine, pipeline: FewStepPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "predict", lambda latents, *_: torch.full_like(latents, float("nan")))
    with pytest.raises(WarmUpError, match="not finite"):
        warm_up(engine, "small")


def test_a_batch_that_only_runs_one_by_one_fails_the_start(
    engine: Engine, pipeline: FewStepPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine goes on after a batch that didn't fit; a cost table of such batches would be wrong."""
    predict = pipeline.predict

    def predict_few(latents: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if len(latents) > 4:
            raise torch.OutOfMemoryError("no room")
        return predict(latents, *arguments)

    monkeypatch.setattr(pipeline, "predict", predict_few)
    with pytest.raises(WarmUpError, match=r"32x32, batch 8 ran only one by one: lower max_batch_size \(16\)"):
        warm_up(engine, "small")


def test_warm_up_leaves_no_prompts_behind(engine: Engine) -> None:
    warm_up(engine, "small")
    assert not engine.runners["small"]._prompts
