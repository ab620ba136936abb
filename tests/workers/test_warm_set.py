"""Several models on one device: what each takes, and that one that fails takes no other along."""

from __future__ import annotations

import gc
import logging
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.catalog import LoraSpec, ModelSpec
from models.loading import load_pipeline
from models.memory import GIB
from models.networks import Networks
from tests.small_models import small_sdxl_spec, small_spec
from workers.engine import Engine
from workers.engine.runner import ModelRunner
from workers.metrics import WorkerMetrics
from workers.warm_set import MemoryBudget, ModelState, NothingToServe, WarmSet, without_folders

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    small_sdxl_spec(folder)
    return folder


class Device:
    """A WarmSet on a CPU. `watched` are the weights of the model `watch`."""

    def __init__(
        self, *specs: ModelSpec, memory_gib: float | None = None, is_sharing: bool = False, watch: str = ""
    ) -> None:
        self._watch = watch
        self.metrics = WorkerMetrics()
        self.engine = Engine({})
        self.reports: list[tuple[str, str]] = []
        self.watched: list[weakref.ref[nn.Parameter]] = []
        self._networks = Networks() if is_sharing else None
        self.models = WarmSet(
            {spec.name: spec for spec in specs},
            self.load,
            device=CPU,
            dtype_of=lambda _: "float32",
            make_budget=lambda: MemoryBudget(CPU, memory_gib),
            metrics=self.metrics,
            on_warm=lambda _: None,
            on_change=lambda: None,
            report=lambda model, detail: self.reports.append((model, detail)),
        )

    def load(self, spec: ModelSpec) -> ModelRunner:
        before = {id(one) for one in all_parameters()} if spec.name == self._watch else set()
        runner = ModelRunner(load_pipeline(spec, CPU, torch.float32, networks=self._networks))
        if spec.name == self._watch:
            self.watched += [weakref.ref(one) for one in all_parameters() if id(one) not in before]
        return runner

    def start(self) -> None:
        for _ in self.models.start(self.engine):
            pass

    @property
    def states(self) -> dict[str, str]:
        return {status.model: status.state for status in self.models.statuses}

    def detail(self, model: str) -> str:
        return next(status.detail for status in self.models.statuses if status.model == model)

    def memory(self, model: str, figure: str) -> float | None:
        return self.metrics.registry.get_sample_value("fewstep_model_memory_bytes", {"model": model, "figure": figure})


def all_parameters() -> Iterator[nn.Parameter]:
    gc.collect()
    return (thing for thing in gc.get_objects() if type(thing) is nn.Parameter)


def spec_of(root: Path, name: str = "small", **changes: Any) -> ModelSpec:
    values: dict[str, Any] = {"lora": None, "max_batch_size": 2, "max_num_images": 1}
    return small_spec(root, name=name, **(values | changes))


def copy_of(root: Path, folder: Path) -> Path:
    return Path(shutil.copytree(root / "sd", folder))


# How a model can be damaged: each takes a copy of its folder, and gives what its entry says else and what is told.


def cut_short(folder: Path) -> tuple[dict[str, Any], str]:
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    return {}, f"bad: {weights} is not a sound safetensors file"


def without_its_vae(folder: Path) -> tuple[dict[str, Any], str]:
    shutil.rmtree(folder / "vae")
    return {}, f"bad: there is no folder {folder / 'vae'}"


def as_a_pickle(folder: Path) -> tuple[dict[str, Any], str]:
    weights = next((folder / "unet").glob("*.safetensors"))
    pickle = weights.with_suffix(".bin")
    torch.save(load_file(weights), pickle)
    weights.unlink()
    return {}, f"bad: {pickle} is a pickle, which is never read"


def with_a_lora_for_another(folder: Path) -> tuple[dict[str, Any], str]:
    lora = folder.parent / "xl-lora"
    lora.mkdir()
    tensors = {
        f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.{end}.weight": torch.zeros(shape)
        for end, shape in (("down", (4, 640)), ("up", (640, 4)))
    }
    save_file(tensors, lora / "pytorch_lora_weights.safetensors")
    return {"lora": LoraSpec(source=str(lora))}, "bad: can't fuse the LoRA"


def that_draws_no_numbers(folder: Path) -> tuple[dict[str, Any], str]:
    weights = next((folder / "unet").glob("*.safetensors"))
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    return {}, "bad: the network gave latents that are not finite"


DAMAGES = [cut_short, without_its_vae, as_a_pickle, with_a_lora_for_another, that_draws_no_numbers]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_model_takes_no_other_along(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], tuple[dict[str, Any], str]]
) -> None:
    good = spec_of(root)
    folder = copy_of(root, tmp_path / "bad")
    changes, words = damage(folder)
    device = Device(good, spec_of(root, "bad", source=str(folder), **changes), spec_of(root, "last"))
    with caplog.at_level(logging.ERROR):
        device.start()
    assert device.states == {"small": "warm", "bad": "failed", "last": "warm"}
    assert list(device.engine.runners) == ["small", "last"]
    assert device.detail("bad").startswith(without_folders(words))
    [record] = [record for record in caplog.records if record.name == "workers.warm_set"]
    assert without_folders(record.getMessage()) == f"bad does not serve: {device.detail('bad')}"
    assert ("bad", "failed") in device.reports
    device.models.ready.result(0)


def test_a_model_that_failed_gives_its_memory_back(root: Path, tmp_path: Path) -> None:
    """After warm-up has recorded its networks, which is the latest that it can fail."""
    folder = copy_of(root, tmp_path / "bad")
    that_draws_no_numbers(folder)
    device = Device(spec_of(root), spec_of(root, "bad", source=str(folder)), watch="bad")
    device.start()
    assert device.states == {"small": "warm", "bad": "failed"}
    gc.collect()
    assert len(device.watched) > 50
    assert [one for one in device.watched if one() is not None] == []


@pytest.mark.parametrize("when", ["loading", "warming"])
def test_memory_that_runs_out_is_one_models_end(root: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation")

    device = Device(spec_of(root), spec_of(root, "large"))
    turns = device.models.start(device.engine)
    while device.states["small"] != "warm" if when == "warming" else device.states["small"] != "loading":
        next(turns)
    if when == "loading":
        monkeypatch.setattr("models.loading._Loader._load_pipe", run_out)
    else:
        large = device.models._members["large"].runner
        assert large is not None
        monkeypatch.setattr(large.pipeline, "predict", run_out)
    for _ in turns:
        pass
    assert device.states == {"small": "warm", "large": "failed"}
    words = {
        "loading": "large: cpu has too little memory for it",
        "warming": "large failed at 32x32, batch 1: CUDA out",
    }
    assert device.detail("large").startswith(words[when])
    assert "\n" not in device.detail("large")


def test_when_none_can_be_loaded_all_reasons_are_told(root: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    device = Device(spec_of(root, "one", source=missing), spec_of(root, "two", source=missing))
    device.start()
    with pytest.raises(NothingToServe) as failure:
        device.models.ready.result(0)
    assert [line.split(":")[0] for line in str(failure.value).splitlines()] == ["one", "two"]
    assert missing in str(failure.value)


def test_the_first_one_serves_before_the_second_is_warm(root: Path) -> None:
    device = Device(spec_of(root), spec_of(root, "other"))
    seen: list[dict[str, str]] = []
    for _ in device.models.start(device.engine):
        if device.models.ready.done() and not seen:
            seen.append(device.states)
            assert [warm.model for warm in device.models.warm_models] == ["small"]
    assert seen == [{"small": "warm", "other": "warming"}]
    assert device.states == {"small": "warm", "other": "warm"}
    assert device.reports[-1] == ("other", "warm")


def test_a_set_that_is_given_up_goes_no_further(root: Path) -> None:
    device = Device(spec_of(root), spec_of(root, "other"))
    turns = device.models.start(device.engine)
    while not device.models.ready.done():
        next(turns)
    device.models.give_up()
    assert list(turns) == []
    assert device.states["small"] == "warm"
    assert device.states["other"] != "warm"


def test_states_follow_each_other_in_order(root: Path) -> None:
    device = Device(spec_of(root))
    with pytest.raises(AssertionError, match="WARM does not follow"):
        device.models._enter(device.models._members["small"], ModelState.WARM, "")


def test_metrics_show_each_models_state_and_memory(root: Path, tmp_path: Path) -> None:
    device = Device(spec_of(root), spec_of(root, "bad", source=str(tmp_path / "nowhere")))

    def state(model: str) -> dict[str, float | None]:
        value = device.metrics.registry.get_sample_value
        labels = [state.value for state in ModelState]
        return {label: value("fewstep_model_state", {"model": model, "state": label}) for label in labels}

    assert state("small")["waiting"] == 1
    device.start()
    assert {label for label, value in state("small").items() if value} == {"warm"}
    assert {label for label, value in state("bad").items() if value} == {"failed"}
    warm = device.metrics.registry.get_sample_value
    assert [warm("fewstep_warm_model", {"model": name}) for name in ("small", "bad")] == [1, 0]
    estimated = device.memory("small", "estimated")
    assert estimated == sum(path.stat().st_size for path in weights_of(root)) - num_header_bytes(root)
    assert device.memory("small", "measured") is not None
    assert device.memory("bad", "measured") is None


def weights_of(root: Path) -> list[Path]:
    return [*(root / "sd").rglob("*.safetensors"), *(root / "tiny").rglob("*.safetensors")]


def num_header_bytes(root: Path) -> int:
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in weights_of(root))


class TestBudget:
    def test_what_does_not_fit_is_not_loaded_and_the_others_serve(self, root: Path) -> None:
        """In the order that was given: a smaller one that comes later still fits."""
        large = spec_of(root, "large", memory_gib=3.0)
        device = Device(spec_of(root), large, spec_of(root, "last"), memory_gib=1.0)
        device.start()
        assert device.states == {"small": "warm", "large": "failed", "last": "warm"}
        assert device.detail("large") == (
            "it needs about 6.00 GiB and 1.00 GiB are left of FEWSTEP_MEMORY_GIB=1: "
            "take models out of FEWSTEP_MODELS or raise FEWSTEP_MEMORY_GIB"
        )
        assert ("large", "loading") in device.reports
        assert device.models._members["large"].runner is None

    def test_the_first_is_the_most_important(self, root: Path) -> None:
        first, second = (spec_of(root, name, memory_gib=0.4) for name in ("first", "second"))
        device = Device(first, second, memory_gib=1.0)
        device.start()
        assert device.states == {"first": "warm", "second": "failed"}

    def test_a_model_that_failed_leaves_its_part_to_the_next(self, root: Path, tmp_path: Path) -> None:
        bad = spec_of(root, "bad", source=str(tmp_path / "nowhere"), memory_gib=0.4)
        device = Device(bad, spec_of(root, "next", memory_gib=0.4), memory_gib=1.0)
        device.start()
        assert device.states == {"bad": "failed", "next": "warm"}

    def test_what_is_shared_counts_once(self, root: Path) -> None:
        one, two = spec_of(root, "one"), spec_of(root, "two")
        weights = sum(path.stat().st_size for path in weights_of(root))
        needed_gib = 1.5 * weights / GIB
        device = Device(one, two, memory_gib=1.4 * needed_gib, is_sharing=True)
        device.start()
        assert device.states == {"one": "warm", "two": "warm"}, "the second needs its working set alone"
        assert device.memory("two", "estimated") == 0

    def test_nothing_fits(self, root: Path) -> None:
        device = Device(spec_of(root), memory_gib=0.00001)
        device.start()
        with pytest.raises(NothingToServe, match=r"small: it needs about 0\.00 GiB"):
            device.models.ready.result(0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("can't load /srv/my/unet/a.safetensors: it is cut off", "can't load a.safetensors: it is cut off"),
        ("no such folder: '/nope'", "no such folder: 'nope'"),
        ("~/models/sd15/ and/or /a/b, /c/d", "sd15/ and/or b, d"),
        ("org/name at https://hub.example/org/name, 1/2", "org/name at https://hub.example/org/name, 1/2"),
        ("bundled:mini-sd is ./here/it", "bundled:mini-sd is ./here/it"),
    ],
)
def test_callers_read_no_folders_of_the_machine(text: str, told: str) -> None:
    assert without_folders(text) == told


def test_the_log_keeps_the_folders_that_the_registry_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device(small_spec(tmp_path).model_copy(update={"name": "lost", "source": str(tmp_path / "gone")}))
    device.start()
    assert "gone" in device.detail("lost")
    assert str(tmp_path) not in device.detail("lost")
    assert str(tmp_path / "gone") in caplog.text


def test_a_model_of_unknown_size_takes_what_it_was_seen_to_take() -> None:
    budget = MemoryBudget(CPU, 1.0)
    budget.record("small", GIB // 4)
    assert budget.left == 0.75 * GIB
    budget.release("small")
    assert budget.left == GIB
