"""The safety checker between decoder and door, with a real one of random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from models.catalog import ModelSpec
from models.loading import load_pipeline
from models.pipeline import FewStepPipeline
from tests.jobs import make_delivery
from tests.models.test_safety import checked, cosines
from tests.workers.engine.oracle import draw
from workers.engine import Blocked, Engine, EngineOutput, Finished, GenerationFailed, PreviewReady
from workers.engine.calibration import WarmUpError, warm_up
from workers.engine.checking import withhold_blocked
from workers.engine.engine import run_until_done
from workers.engine.outputs import Pixels
from workers.engine.runner import ModelRunner

NUM_SEEDS = 6


@pytest.fixture(scope="module")
def unchecked(pipeline: FewStepPipeline) -> list[Pixels]:
    """What the model draws from seeds 0 to 5."""
    deliveries = [make_delivery(seed=seed, num_inference_steps=2) for seed in range(NUM_SEEDS)]
    return draw(Engine({"small": ModelRunner(pipeline)}), *(delivery.job.params for delivery in deliveries))


@pytest.fixture(scope="module")
def verdicts(
    spec: ModelSpec, unchecked: list[Pixels], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelSpec, list[bool]]:
    """A checker that blocks half of these pictures, and which."""
    folder: Path = tmp_path_factory.mktemp("safety")
    checked(spec, folder, 2)
    nearest, _ = cosines(folder, np.concatenate(unchecked))
    threshold = float(np.sort(nearest)[NUM_SEEDS // 2 - 1 : NUM_SEEDS // 2 + 1].mean())
    return checked(spec, folder, threshold), [bool(cosine > threshold) for cosine in nearest]


@pytest.fixture
def strict(verdicts: tuple[ModelSpec, list[bool]]) -> Engine:
    return Engine({"small": ModelRunner(load_pipeline(verdicts[0], torch.device("cpu"), torch.float32))})


def by_id(outputs: Sequence[EngineOutput]) -> dict[str, EngineOutput]:
    return {output.request.request_id: output for output in outputs}


def test_who_shares_a_batch_with_a_blocked_picture_gets_his_own(
    strict: Engine, verdicts: tuple[ModelSpec, list[bool]], unchecked: list[Pixels]
) -> None:
    for seed in range(NUM_SEEDS):
        strict.add(make_delivery(str(seed), seed=seed, num_inference_steps=2))
    outputs = by_id(run_until_done(strict))
    assert [isinstance(outputs[str(seed)], Blocked) for seed in range(NUM_SEEDS)] == verdicts[1]
    for seed, picture in enumerate(unchecked):
        output = outputs[str(seed)]
        assert output.request.check_ms > 0
        if isinstance(output, Finished):
            assert np.array_equal(output.pixels, picture)


def test_one_blocked_picture_ends_the_whole_request(strict: Engine, verdicts: tuple[ModelSpec, list[bool]]) -> None:
    strict.add(make_delivery("all", seed=0, num_images=NUM_SEEDS, num_inference_steps=2))
    [output] = run_until_done(strict)
    assert isinstance(output, Blocked)
    assert output.num_blocked == sum(verdicts[1]) == NUM_SEEDS // 2
    assert not hasattr(output, "pixels")


@pytest.mark.parametrize("decoder", ["full", "tiny"])
def test_there_are_no_previews_where_pictures_are_judged(strict: Engine, decoder: str) -> None:
    strict.add(make_delivery(previews=True, num_inference_steps=8, decoder=decoder))
    assert not any(isinstance(output, PreviewReady) for output in run_until_done(strict))


def test_what_cannot_be_checked_fails_alone(strict: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = strict.runners["small"].pipeline

    def lose_wide_pictures(images: Sequence[Pixels]) -> list[bool]:
        if any(image.shape[1] == 48 for image in images):
            raise RuntimeError("no kernel for this")
        return [False] * len(images)

    strict.add(make_delivery("wide", width=48, num_inference_steps=1))
    strict.add(make_delivery("square", num_inference_steps=1))
    monkeypatch.setattr(pipeline, "check", lambda images: [False] * len(images))
    finished = run_until_done(strict)
    monkeypatch.setattr(pipeline, "check", lose_wide_pictures)
    outputs = by_id(withhold_blocked(strict.runners, finished))
    assert isinstance(outputs["wide"], GenerationFailed)
    assert isinstance(outputs["square"], Finished)


def test_no_batch_is_larger_than_those_of_the_warm_up(strict: Engine) -> None:
    runner = strict.runners["small"]
    sizes: list[int] = []
    runner.observe_check = lambda num_pictures, _: sizes.append(num_pictures)
    images = list(np.random.default_rng(0).integers(0, 256, (19, 32, 32, 3), dtype=np.uint8))
    together = runner.check(images)
    assert sizes == [16, 3]
    assert together == [verdict for image in images for verdict in runner.check([image])]


def test_warm_up_measures_the_check_even_if_every_picture_is_blocked(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_blocked = checked(spec, tmp_path, -2).model_copy(update={"max_batch_size": 4})
    pipeline = load_pipeline(all_blocked, torch.device("cpu"), torch.float32)
    engine = Engine({"small": ModelRunner(pipeline)})
    [costs] = warm_up(engine, "small").sizes
    assert list(costs.check_ms) == [1, 2, 4]
    assert min(costs.check_ms.values()) > 0
    monkeypatch.setattr(pipeline, "decode", lambda latents: torch.zeros(len(latents), 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(WarmUpError, match="the picture is one constant colour"):
        warm_up(engine, "small")
