from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from broker.messages import Abort
from models.pipeline import Conditioning, FewStepPipeline
from tests.jobs import make_delivery
from workers.engine import Aborted, Engine, EngineOutput, Finished, GenerationFailed, PreviewReady
from workers.engine.engine import run_until_done
from workers.engine.runner import MAX_CACHED_PROMPTS, ModelRunner


def ids(outputs: Sequence[EngineOutput], kind: type[EngineOutput]) -> list[str]:
    return [output.request.request_id for output in outputs if isinstance(output, kind)]


def test_step_counts_leave_the_batch_when_they_are_done(engine: Engine) -> None:
    engine.add(make_delivery("long", num_inference_steps=4))
    assert engine.step() == []
    engine.add(make_delivery("short", num_inference_steps=1))
    assert ids(engine.step(), Finished) == ["short"]
    engine.step()
    assert ids(engine.step(), Finished) == ["long"]
    assert not engine.has_work


def test_previews_come_after_each_step_but_the_last_and_only_when_asked(engine: Engine) -> None:
    engine.add(make_delivery("a", previews=True, num_images=2))
    engine.add(make_delivery("b"))
    previews = [output for output in run_until_done(engine) if isinstance(output, PreviewReady)]
    assert [(output.request.request_id, output.step) for output in previews] == [("a", 1), ("a", 2), ("a", 3)]
    assert previews[0].pixels.shape == (2, 32, 32, 3)


def test_the_last_predicted_x0_is_the_final_picture(engine: Engine, pipeline: FewStepPipeline) -> None:
    """LCM's last step returns its prediction itself, so the preview path can be held against it."""
    engine.add(make_delivery("a", decoder="tiny", num_inference_steps=1))
    (final,) = (output for output in run_until_done(engine) if isinstance(output, Finished))
    assert final.request.denoising is not None
    decoded = pipeline.preview(final.request.denoising.latents).numpy()
    assert np.array_equal(decoded, final.pixels)


def test_cancel_takes_effect_at_the_next_step(engine: Engine) -> None:
    engine.add(make_delivery("a"))
    engine.add(make_delivery("b"))
    engine.step()
    engine.abort(Abort("a", "cancelled"))
    outputs = engine.step()
    assert ids(outputs, Aborted) == ["a"]
    assert ids(run_until_done(engine), Finished) == ["b"]


def test_cancel_of_a_waiting_or_unknown_request(engine: Engine) -> None:
    engine.add(make_delivery("a"))
    engine.abort(Abort("a", "cancelled"))
    engine.abort(Abort("nobody", "cancelled"))
    outputs = engine.step()
    assert ids(outputs, Aborted) == ["a"]
    assert not engine.has_work


@pytest.mark.parametrize(
    ("steps_done", "ms_since_final", "is_stopped"),
    [(1, 100.0, True), (1, 400.0, False), (1, None, False), (2, 100.0, False), (0, 0.0, True)],
)
def test_a_newer_prompt_stops_only_early_work_of_who_was_just_served(
    engine: Engine, steps_done: int, ms_since_final: float | None, is_stopped: bool
) -> None:
    engine.add(make_delivery("old", num_inference_steps=4))
    for _ in range(steps_done):
        engine.step()
    engine.abort(Abort("old", "newer", ms_since_final))
    outputs = run_until_done(engine)
    assert (ids(outputs, Aborted) == ["old"]) == is_stopped
    assert (ids(outputs, Finished) == ["old"]) != is_stopped


class Poisoned:
    """A model that fails whenever a row of prompt "poison" is among the others."""

    def __init__(self, pipeline: FewStepPipeline) -> None:
        self._pipeline = pipeline
        self._poison = pipeline.encode_prompts(["poison"])[0].prompt_embeds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, conditionings: Sequence[Any]) -> torch.Tensor:
        if any(torch.allclose(conditioning.prompt_embeds, self._poison) for conditioning in conditionings):
            raise RuntimeError("poison")
        return self._pipeline.predict(latents, timesteps, conditionings)


def test_a_poisonous_request_fails_alone(pipeline: FewStepPipeline) -> None:
    poisoned: Any = Poisoned(pipeline)
    engine = Engine({"small": ModelRunner(poisoned)})
    for prompt in ("one", "poison", "two"):
        engine.add(make_delivery(prompt, prompt=prompt))
    outputs = run_until_done(engine)
    assert ids(outputs, GenerationFailed) == ["poison"]
    assert sorted(ids(outputs, Finished)) == ["one", "two"]


def test_a_last_attempt_shares_its_batch_with_nobody(engine: Engine) -> None:
    engine.add(make_delivery("a", num_inference_steps=1))
    engine.add(make_delivery("b", num_inference_steps=1, is_last_attempt=True))
    engine.add(make_delivery("c", num_inference_steps=1))
    assert ids(engine.step(), Finished) == ["a", "c"]
    assert ids(engine.step(), Finished) == ["b"]


def test_sizes_are_separate_groups_that_take_turns(engine: Engine) -> None:
    engine.add(make_delivery("square", num_inference_steps=1))
    engine.add(make_delivery("wide", num_inference_steps=1, width=48))
    outputs = run_until_done(engine)
    shapes = {output.request.request_id: output.pixels.shape for output in outputs if isinstance(output, Finished)}
    assert shapes == {"square": (1, 32, 32, 3), "wide": (1, 32, 48, 3)}


def test_a_prompt_is_encoded_once(pipeline: FewStepPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str | None] = []
    encode_prompts = pipeline.encode_prompts

    def record(texts: Sequence[str | None]) -> list[Conditioning]:
        encoded.extend(texts)
        return encode_prompts(texts)

    monkeypatch.setattr(pipeline, "encode_prompts", record)
    engine = Engine({"small": ModelRunner(pipeline)})
    for _ in range(2):
        engine.add(make_delivery(guidance_scale=2.0))
        run_until_done(engine)
    assert sorted(encoded, key=str) == [None, "a red apple"]


def test_the_prompt_cache_is_bounded(pipeline: FewStepPipeline) -> None:
    runner = ModelRunner(pipeline)
    runner._prompts.update((f"old {i}", pipeline.encode_prompts(["x"])[0]) for i in range(MAX_CACHED_PROMPTS))
    engine = Engine({"small": runner})
    engine.add(make_delivery(prompt="new"))
    run_until_done(engine)
    assert len(runner._prompts) == MAX_CACHED_PROMPTS
    assert "new" in runner._prompts
    assert "old 0" not in runner._prompts


def test_a_truncated_prompt_is_known(engine: Engine) -> None:
    engine.add(make_delivery(prompt="one two three four " * 5))
    (output,) = run_until_done(engine)
    assert output.request.denoising is not None
    assert "four" in output.request.denoising.conditioning.truncated


def test_an_impossible_step_count_fails_only_that_request(engine: Engine) -> None:
    engine.add(make_delivery("too many", num_inference_steps=51))
    engine.add(make_delivery("fine"))
    outputs = run_until_done(engine)
    assert ids(outputs, GenerationFailed) == ["too many"]
    assert ids(outputs, Finished) == ["fine"]


def test_every_step_of_a_batch_is_observed(pipeline: FewStepPipeline) -> None:
    steps: list[tuple[int, float]] = []
    engine = Engine({"small": ModelRunner(pipeline)}, lambda num_rows, seconds: steps.append((num_rows, seconds)))
    engine.add(make_delivery(num_inference_steps=2))
    engine.add(make_delivery(num_inference_steps=1, guidance_scale=2.0))
    run_until_done(engine)
    assert [num_rows for num_rows, _ in steps] == [3, 1]
    assert min(seconds for _, seconds in steps) > 0
