from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from broker.messages import Abort, Lane
from models.pipeline import Conditioning, FewStepPipeline
from tests.jobs import make_delivery, make_warm
from workers.engine import Aborted, Engine, EngineOutput, Finished, GenerationFailed, PreviewReady
from workers.engine.decoding import PendingPixels
from workers.engine.engine import run_until_done
from workers.engine.outputs import Pixels
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
        self._poison = pipeline.encode_prompts(["poison"])[0].encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditionings: Sequence[Any],
        guidance_scales: torch.Tensor,
    ) -> torch.Tensor:
        if any(torch.allclose(conditioning.encoded, self._poison) for conditioning in conditionings):
            raise RuntimeError("poison")
        return self._pipeline.predict(latents, timesteps, conditionings, guidance_scales)


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
    runner._prompts.update(((f"old {i}", ()), pipeline.encode_prompts(["x"])[0]) for i in range(MAX_CACHED_PROMPTS))
    engine = Engine({"small": runner})
    engine.add(make_delivery(prompt="new"))
    run_until_done(engine)
    assert len(runner._prompts) == MAX_CACHED_PROMPTS
    assert ("new", ()) in runner._prompts
    assert ("old 0", ()) not in runner._prompts


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
    steps: list[tuple[str, int, float]] = []
    engine = Engine({"small": ModelRunner(pipeline)}, lambda *step: steps.append(step))
    engine.add(make_delivery(num_inference_steps=2))
    engine.add(make_delivery(num_inference_steps=1, guidance_scale=2.0))
    run_until_done(engine)
    assert [step[:2] for step in steps] == [("small", 3), ("small", 1)]
    assert min(seconds for *_, seconds in steps) > 0


def test_what_expires_while_it_runs_stops_at_the_next_step(engine: Engine) -> None:
    engine.add(make_delivery("late", deadline_ms=20))
    engine.add(make_delivery("in time", deadline_ms=60_000))
    assert engine.step() == []
    time.sleep(0.03)
    (expired,) = engine.step()
    assert isinstance(expired, Aborted)
    assert (expired.request.request_id, expired.reason, len(expired.request.steps_ms)) == ("late", "expired", 1)
    assert ids(run_until_done(engine), Finished) == ["in time"]


def test_the_time_in_the_queue_counts_for_the_deadline(engine: Engine) -> None:
    engine.add(replace(make_delivery("late", deadline_ms=1000), waited_ms=1000.0))
    (expired,) = engine.step()
    assert isinstance(expired, Aborted)
    assert expired.reason == "expired"
    assert not expired.is_late, "no step was computed for it"


def test_a_step_under_way_when_somebody_asked_to_stop_is_counted(engine: Engine) -> None:
    engine.add(make_delivery("a"))
    engine.add(make_delivery("b"))
    asked_s = time.perf_counter()
    engine.step()
    engine.abort(Abort("a", "cancelled"), asked_s)
    engine.abort(Abort("b", "cancelled"))
    late, in_time = engine.step()
    assert isinstance(late, Aborted)
    assert isinstance(in_time, Aborted)
    assert (late.is_late, in_time.is_late) == (True, False)


def test_freed_rows_go_to_waiting_requests_at_the_same_step(engine: Engine) -> None:
    engine.runners["small"].warm_model = make_warm(max_rows=1)
    engine.add(make_delivery("a"))
    engine.add(make_delivery("b", num_inference_steps=1))
    engine.step()
    engine.abort(Abort("a", "cancelled"))
    outputs = engine.step()
    assert ids(outputs, Aborted) == ["a"]
    assert ids(outputs, Finished) == ["b"]


def test_a_batch_grows_no_further_than_warm_up_found_useful(engine: Engine) -> None:
    rows: list[int] = []
    engine = Engine(engine.runners, lambda _model, num_rows, _seconds: rows.append(num_rows))
    engine.runners["small"].warm_model = make_warm(max_rows=2)
    for number in range(5):
        engine.add(make_delivery(str(number), num_inference_steps=1))
    run_until_done(engine)
    assert rows == [2, 2, 1]


def previews_per_step(engine: Engine, num_steps: int) -> list[int]:
    counts = []
    for _ in range(num_steps):
        counts.append(sum(isinstance(output, PreviewReady) for output in engine.step()))
    return counts


def test_previews_take_no_more_than_their_share_of_a_step(engine: Engine) -> None:
    """A step of 8 rows takes 40 ms, so 4.6 ms of previews fit: four of them at 1.1 ms each."""
    engine.runners["small"].warm_model = make_warm(preview_ms={1: 1.1, 8: 8.8})
    for number in range(8):
        engine.add(make_delivery(str(number), previews=True, num_inference_steps=5))
    assert previews_per_step(engine, 4) == [4, 4, 4, 4]
    seen = [request.num_previews for request in engine._scheduler.requests]
    assert seen == [2] * 8, "they take turns"


def test_a_preview_that_costs_more_than_a_steps_share_comes_less_often(engine: Engine) -> None:
    engine.runners["small"].warm_model = make_warm(step_ms={1: 10.0}, preview_ms={1: 3.4})
    engine.add(make_delivery(previews=True, num_inference_steps=8))
    assert previews_per_step(engine, 7) == [0, 0, 1, 0, 0, 1, 0]


def test_each_preview_is_of_its_own_request_whoever_has_the_turn(engine: Engine) -> None:
    """Requests take turns in another order than that of the batch; the picture must still be their own."""
    alone = {}
    for number in range(4):
        engine.add(make_delivery(str(number), seed=number, previews=True, num_inference_steps=6))
        for output in run_until_done(engine):
            if isinstance(output, PreviewReady):
                alone[output.request.request_id, output.step] = output.pixels
    engine.runners["small"].warm_model = make_warm(step_ms={1: 10.0}, preview_ms={1: 0.6, 4: 2.4})
    for number in range(4):
        engine.add(make_delivery(str(number), seed=number, previews=True, num_inference_steps=6))
        engine.step()
    seen = [output for output in run_until_done(engine) if isinstance(output, PreviewReady)]
    assert len(seen) >= 6
    for output in seen:
        own = alone[output.request.request_id, output.step]
        assert np.abs(output.pixels.astype(int) - own.astype(int)).max() <= 1


def test_what_is_saved_for_a_grid_is_not_spent_at_once_by_others(engine: Engine) -> None:
    """A step earns 1.6 ms; the grid needs 4 ms. What it had saved when it left is not there for the others."""
    engine.runners["small"].warm_model = make_warm(step_ms={1: 14.0, 8: 14.0}, preview_ms={1: 1.0, 4: 4.0})
    engine.add(make_delivery("grid", previews=True, num_images=4, num_inference_steps=10))
    assert previews_per_step(engine, 1) == [0]
    engine.abort(Abort("grid", "cancelled"))
    for number in range(6):
        engine.add(make_delivery(str(number), previews=True, num_inference_steps=10))
    engine.step()
    assert previews_per_step(engine, 3) == [1, 1, 1]


class SlowPixels:
    """Pixels that a device is still working on."""

    def __init__(self, pixels: PendingPixels) -> None:
        self._pixels, self.is_done = pixels, False

    def is_ready(self) -> bool:
        return self.is_done

    def collect(self) -> tuple[Pixels, float]:
        return self._pixels.collect()


def test_a_decode_under_way_holds_nobody_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where pictures are decoded beside the steps."""
    runner = engine.runners["small"]
    slow: list[SlowPixels] = []
    decoder = runner._decoder

    def start(*arguments: Any) -> list[SlowPixels]:
        slow.extend(SlowPixels(pixels) for pixels in decoder.start(*arguments))
        return slow[-1:]

    monkeypatch.setattr(runner, "_decoder", SimpleNamespace(start=start))
    engine.add(make_delivery("short", num_inference_steps=1))
    engine.add(make_delivery("long", num_inference_steps=3))
    assert engine.step() == []
    assert engine.step() == []
    slow[0].is_done = True
    assert ids(engine.step(), Finished) == ["short"]
    assert engine.has_work
    assert engine.step() == [], "nothing else to do, but a new request may come: it doesn't wait for long"
    slow[1].is_done = True
    assert ids(engine.step(), Finished) == ["long"]
    assert not engine.has_work


def test_of_two_models_the_one_with_the_most_urgent_request_runs(pipeline: FewStepPipeline) -> None:
    steps: list[str] = []
    engine = Engine({name: ModelRunner(pipeline) for name in ("small", "other")}, lambda model, *_: steps.append(model))
    arrivals: list[tuple[str, Lane]] = [("small", "api"), ("other", "live"), ("small", "api")]
    for model, lane in arrivals:
        delivery = make_delivery(model=model, num_inference_steps=2)
        engine.add(replace(delivery, job=replace(delivery.job, lane=lane)))
    run_until_done(engine)
    assert steps == ["other", "other", "small", "small"]
