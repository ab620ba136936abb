from __future__ import annotations

import pytest
import torch

from models.pipeline import FewStepPipeline
from workers.engine import Engine
from workers.engine.calibration import WarmUpError, batch_sizes, num_warm_ups, warm_up


def test_batch_sizes() -> None:
    assert [batch_sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_the_cost_table_covers_every_batch_size(engine: Engine) -> None:
    reports: list[str] = []
    warm_model = warm_up(engine, "small", reports.append)
    assert list(warm_model.step_ms) == list(warm_model.decode_ms) == [1, 2, 4, 8, 16]
    assert min(warm_model.step_ms.values()) > 0
    assert warm_model.sizes == ((32, 32),)
    assert len(reports) == num_warm_ups(engine.runners["small"].pipeline.spec)
    assert not engine.has_work


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
