"""Style LoRAs per request. diffusers' own pipeline with adapters of the same names and weights is the oracle."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from broker.messages import Abort, Delivery, LoraWeight, SamplingParams
from models.catalog import ModelSpec, StyleLora
from models.loading import load_pipeline
from models.lora_files import Lora, LoraReader
from models.loras import StyledNetwork
from models.networks import Networks
from tests.jobs import make_delivery, make_params
from tests.small_models import small_sdxl_spec, small_spec
from tests.style_loras import ATTENTION, TEXT, WITH_CONVOLUTIONS, by_name, style, write_lora
from tests.workers.engine.oracle import Oracle, draw, largest_difference
from workers.engine import Aborted, Engine, EngineOutput, Finished, GenerationFailed
from workers.engine.calibration import warm_up
from workers.engine.engine import run_until_done
from workers.engine.outputs import Pixels
from workers.engine.runner import ModelRunner

Loras = dict[str, float]

CPU = torch.device("cpu")


def sd_spec(root: Path) -> ModelSpec:
    """With a fused LCM-LoRA below."""
    spec = small_spec(root)
    base, folder = Path(spec.source), root / "styles"
    return spec.model_copy(
        update={
            "loras": by_name(
                style(write_lora(folder / "ink.safetensors", base, {"unet": ATTENTION}, seed=10)),
                style(write_lora(folder / "clay.safetensors", base, {"unet": WITH_CONVOLUTIONS}, "diffusers", seed=11)),
                style(
                    write_lora(folder / "mood.safetensors", base, {"unet": ATTENTION, "text_encoder": TEXT}, seed=12)
                ),
                style(
                    write_lora(
                        folder / "kohya.safetensors",
                        base,
                        {"unet": WITH_CONVOLUTIONS, "text_encoder": TEXT},
                        "kohya",
                        alpha=2.0,
                        seed=13,
                    )
                ),
            )
        }
    )


def sdxl_spec(root: Path) -> ModelSpec:
    spec = small_sdxl_spec(root)
    base, folder = Path(spec.source), root / "sdxl-styles"
    everything = {"unet": ATTENTION, "text_encoder": TEXT, "text_encoder_2": TEXT}
    return spec.model_copy(
        update={
            "loras": by_name(
                style(write_lora(folder / "ink.safetensors", base, {"unet": WITH_CONVOLUTIONS}, seed=20)),
                style(write_lora(folder / "mood.safetensors", base, everything, seed=21)),
                style(write_lora(folder / "kohya.safetensors", base, everything, "kohya", alpha=1.0, seed=22)),
            )
        }
    )


class Subject:
    def __init__(self, spec: ModelSpec) -> None:
        self.oracle = Oracle(spec)
        self.engine = Engine({"small": ModelRunner(load_pipeline(spec, CPU, torch.float32))})


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    root = tmp_path_factory.mktemp("styles")
    return {"sd": Subject(sd_spec(root)), "sdxl": Subject(sdxl_spec(root))}


def styled_params(loras: Loras, **changes: Any) -> SamplingParams:
    return make_params(loras=tuple(LoraWeight(*item) for item in sorted(loras.items())), **changes)


CASES: list[tuple[str, Loras, dict[str, Any]]] = [
    ("sd", {"ink": 1.0}, {}),
    ("sd", {"ink": 0.5, "clay": -0.7}, {}),
    ("sd", {"mood": 1.0}, {"guidance_scale": 2.0, "negative_prompt": "red"}),
    ("sd", {"kohya": 0.8}, {}),
    ("sd", {"kohya": 0.3, "mood": 0.6, "ink": 0.2}, {"num_images": 2}),
    ("sdxl", {"ink": 1.0}, {}),
    ("sdxl", {"mood": 0.7, "ink": 0.4}, {}),
    ("sdxl", {"kohya": 1.0}, {"guidance_scale": 2.0}),
]


@pytest.mark.parametrize(("family", "loras", "changes"), CASES, ids=[f"{f}-{'-'.join(x)}" for f, x, _ in CASES])
def test_a_picture_is_that_of_diffusers_with_the_same_adapters(
    subjects: dict[str, Subject], family: str, loras: Loras, changes: dict[str, Any]
) -> None:
    params = styled_params(loras, **changes)
    plain, styled = draw(subjects[family].engine, make_params(**changes), params)
    assert largest_difference(styled, subjects[family].oracle.draw(params)) <= 1
    assert largest_difference(styled, plain) > 5, "it must change the picture"
    assert largest_difference(plain, subjects[family].oracle.draw(make_params(**changes))) <= 1


# In company

STREAM: list[tuple[Loras, dict[str, Any]]] = [
    ({}, {"seed": 1}),
    ({"ink": 1.0}, {"seed": 2, "num_inference_steps": 6}),
    ({"ink": 0.5}, {"seed": 3}),
    ({"mood": 1.0}, {"seed": 4, "guidance_scale": 2.0, "negative_prompt": "red"}),
    ({}, {"seed": 5, "guidance_scale": 2.0, "negative_prompt": "red", "num_inference_steps": 8}),
    ({"ink": 1.0, "clay": -0.5}, {"seed": 6, "scheduler": "ddim"}),
    ({"kohya": 0.8}, {"seed": 7, "width": 48}),
    ({"ink": 1.0}, {"seed": 8, "num_images": 2}),
]


MOODY = styled_params({"mood": 1.0})


def all_params() -> list[SamplingParams]:
    """All of the same prompt, which each must encode with its own LoRAs."""
    return [styled_params(loras, **changes) for loras, changes in STREAM]


@pytest.fixture
def engine(subjects: dict[str, Subject]) -> Engine:
    """With an empty prompt cache, and turns that are over after each step: the worst for whoever mixes LoRAs up."""
    runner = subjects["sd"].engine.runners["small"]
    runner.forget_prompts()
    return Engine({"small": runner})


@pytest.fixture(scope="module")
def alone(subjects: dict[str, Subject]) -> list[Pixels]:
    return [draw(subjects["sd"].engine, params)[0] for params in all_params()]


def switching_at_every_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(engine.runners["small"]), "switch_s", property(lambda _: 0.0, lambda *_: None), False)


@pytest.mark.parametrize("has_quantum", [False, True])
def test_no_picture_shows_another_requests_lora(
    engine: Engine, alone: list[Pixels], monkeypatch: pytest.MonkeyPatch, has_quantum: bool
) -> None:
    if not has_quantum:
        switching_at_every_step(engine, monkeypatch)
    for index, pixels in enumerate(draw(engine, *all_params())):
        assert largest_difference(pixels, alone[index]) <= 1, STREAM[index]


def test_an_aborted_request_leaves_nothing_behind(
    engine: Engine, alone: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    switching_at_every_step(engine, monkeypatch)
    for index, params in enumerate(all_params()):
        engine.add(delivery(str(index), params))
    outputs: list[EngineOutput] = []
    for step in range(200):
        if step == 4:  # in the middle of its work, and of the others'
            engine.abort(Abort("1", "cancelled"))
        outputs += engine.step()
    pictures = finished(outputs)
    assert [output.request.request_id for output in outputs if isinstance(output, Aborted)] == ["1"]
    assert sorted(pictures) == ["0", "2", "3", "4", "5", "6", "7"]
    for name, pixels in pictures.items():
        assert largest_difference(pixels, alone[int(name)]) <= 1, STREAM[int(name)]


def test_a_merge_that_fails_fails_only_who_asked_for_it(
    engine: Engine, alone: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory half way through the layers, at each try."""
    change = StyledNetwork._changed

    def run_out(self: StyledNetwork, layer: str, merges: Any) -> torch.Tensor:
        if len(merges) == 2 and layer.startswith("up_blocks"):
            raise torch.OutOfMemoryError("half way")
        return change(self, layer, merges)

    monkeypatch.setattr(StyledNetwork, "_changed", run_out)
    for index, params in enumerate(all_params()):
        engine.add(delivery(str(index), params))
    outputs = run_until_done(engine)
    assert [output.request.request_id for output in outputs if isinstance(output, GenerationFailed)] == ["5"]
    pictures = finished(outputs)
    assert len(pictures) == 7
    for name, pixels in pictures.items():
        assert largest_difference(pixels, alone[int(name)]) <= 1, STREAM[int(name)]


def test_a_file_that_cant_be_read_fails_only_who_asked_for_it(tmp_path: Path) -> None:
    spec = small_spec(tmp_path)
    path = write_lora(tmp_path / "ink.safetensors", Path(spec.source), {"unet": ATTENTION})
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    spec = spec.model_copy(update={"loras": by_name(style(path), style(broken))})
    engine = Engine({"small": ModelRunner(load_pipeline(spec, CPU, torch.float32))})
    asked: dict[str, Loras] = {
        "plain": {},
        "ink": {"ink": 1.0},
        "bad": {"broken": 1.0},
        "both": {"broken": 1.0, "ink": 1.0},
    }
    for name, loras in asked.items():
        engine.add(delivery(name, styled_params(loras)))
    outputs = run_until_done(engine)
    failed = {output.request.request_id: output.error for output in outputs if isinstance(output, GenerationFailed)}
    assert sorted(failed) == ["bad", "both"]
    assert all("is not a sound safetensors file" in str(error) for error in failed.values())
    assert sorted(finished(outputs)) == ["ink", "plain"]


def test_in_bfloat16_a_picture_is_the_same_after_others_had_their_turn(tmp_path: Path) -> None:
    spec = sd_spec(tmp_path)
    engine = Engine({"small": ModelRunner(load_pipeline(spec, CPU, torch.bfloat16))})
    wishes: list[Loras] = [{}, {"ink": 1.0}, {"kohya": 1.0}]
    first = [draw(engine, styled_params(loras))[0] for loras in wishes]
    again = [draw(engine, styled_params(loras))[0] for loras in wishes]
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one, other)


def test_while_a_file_is_read_others_are_drawn(subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = subjects["sd"].engine.runners["small"].pipeline.spec
    runner = ModelRunner(load_pipeline(spec, CPU, torch.float32))
    may_read, read = threading.Event(), LoraReader.read

    def read_slowly(self: LoraReader, entry: StyleLora) -> Lora:
        assert may_read.wait(60)
        return read(self, entry)

    monkeypatch.setattr(LoraReader, "read", read_slowly)
    engine = Engine({"small": runner})
    engine.add(delivery("styled", styled_params({"ink": 1.0}, num_inference_steps=1)))
    engine.add(delivery("plain", make_params(num_inference_steps=2)))
    outputs = [output for _ in range(3) for output in engine.step()]
    assert list(finished(outputs)) == ["plain"]
    assert engine.has_work
    may_read.set()
    assert list(finished(run_until_done(engine))) == ["styled"]


def test_prompts_are_encoded_once_per_set_of_loras_that_touch_the_text_encoder(engine: Engine) -> None:
    runner, misses = engine.runners["small"], list[int]()
    runner.observe_prompts = lambda _hits, num_misses: misses.append(num_misses)
    for loras in ({}, {"ink": 1.0}, {"ink": 0.5, "clay": 1.0}):
        draw(engine, styled_params(loras))
    assert misses == [1, 0, 0], "these change the UNet alone"
    for loras in ({"mood": 1.0}, {"mood": 0.5}, {"mood": 0.5, "ink": 1.0}, {"kohya": 1.0}, {"mood": 1.0}):
        draw(engine, styled_params(loras))
    runner.observe_prompts = lambda *_: None
    assert misses[3:] == [1, 1, 0, 1, 0]


def test_warm_up_reads_the_loras_and_measures_a_switch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = sd_spec(tmp_path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    spec = spec.model_copy(update={"loras": spec.loras | by_name(style(broken)), "max_batch_size": 4})
    runner = ModelRunner(load_pipeline(spec, CPU, torch.float32, max_loras=5))
    engine = Engine({"small": runner})
    switches: list[float] = []
    runner.observe_switch = switches.append
    warm_up(engine, "small")
    assert runner.pipeline.loras.num_resident == 4
    assert runner.switch_s == switches[-1] > 0
    assert "requests for this LoRA will fail: small: loras.broken:" in caplog.text
    assert not runner.pipeline.loras.use(()), "it leaves none behind"


def test_what_is_asked_for_again_costs_no_switch(engine: Engine) -> None:
    runner, switches = engine.runners["small"], list[float]()
    draw(engine, make_params())
    runner.observe_switch = switches.append
    for _ in range(3):
        draw(engine, styled_params({"ink": 1.0}))
    draw(engine, make_params())
    runner.observe_switch = lambda _: None
    assert len(switches) == 2


def test_a_lora_whose_entry_changes_is_another_one_and_requests_under_way_keep_theirs(tmp_path: Path) -> None:
    spec = small_spec(tmp_path)
    targets = {"unet": ATTENTION, "text_encoder": TEXT}
    old, new = (
        style(write_lora(tmp_path / f"{seed}.safetensors", Path(spec.source), targets, seed=seed), "mood")
        for seed in range(2)
    )
    params = styled_params({"mood": 1.0})
    specs = [spec.model_copy(update={"loras": by_name(entry)}) for entry in (old, new)]
    pipelines = [load_pipeline(spec, CPU, torch.float32) for spec in specs]
    alone = [draw(Engine({"small": ModelRunner(pipeline)}), params)[0] for pipeline in pipelines]
    assert largest_difference(*alone) > 5
    runner = ModelRunner(pipelines[0])
    engine = Engine({"small": runner})
    engine.add(delivery("before", params))
    runner.update(specs[1])
    engine.add(delivery("after", params))
    pictures = finished(run_until_done(engine))
    assert largest_difference(pictures["before"], alone[0]) <= 1
    assert largest_difference(pictures["after"], alone[1]) <= 1


def test_two_models_that_share_a_text_encoder_dont_see_each_others_loras(tmp_path: Path) -> None:
    networks, spec = Networks(), sd_spec(tmp_path)
    pipelines = {name: load_pipeline(spec, CPU, torch.float32, networks=networks) for name in ("small", "other")}
    assert len({id(pipeline.loras._networks["text_encoder"]) for pipeline in pipelines.values()}) == 1
    runners = {name: ModelRunner(pipeline) for name, pipeline in pipelines.items()}
    plain, styled = (draw(Engine({"small": runners["small"]}), params)[0] for params in (make_params(), MOODY))
    for runner in runners.values():
        runner.forget_prompts()
    engine = Engine(runners)
    for name, params in {"small": MOODY, "other": make_params()}.items():
        one = delivery(name, params)
        engine.add(replace(one, job=replace(one.job, model=name)))
    pictures = finished(run_until_done(engine))
    assert largest_difference(pictures["small"], styled) <= 1
    assert largest_difference(pictures["other"], plain) <= 1


def delivery(request_id: str, params: SamplingParams) -> Delivery:
    plain = make_delivery(request_id)
    return replace(plain, job=replace(plain.job, params=params))


def finished(outputs: list[EngineOutput]) -> dict[str, Pixels]:
    return {output.request.request_id: output.pixels for output in outputs if isinstance(output, Finished)}
