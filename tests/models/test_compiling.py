"""The real compiler on a UNet of two blocks: it is compiled once, and all tests take it from there."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from models.compiling.cache import PackageCache
from models.compiling.compiler import Compiler, explain
from models.compiling.recipe import Blueprint, Recipe, sizes_of
from models.compiling.swapping import Swapped
from models.families.latent_diffusion import unet_network
from models.graphs import Graphed
from models.loading import load_pipeline
from models.lora_files import Factors
from models.loras import styled
from models.networks import settle
from models.rows import SharedRows
from models.tracing import Traced
from tests.models.test_graphs import CpuCapture
from tests.small_models import small_spec

CPU = torch.device("cpu")
WAIT_S = 150.0
DEAF_COMPILER = "#!/bin/sh\necho $$ > {pid_file}\nexec sleep 600\n"

pytestmark = pytest.mark.xdist_group("compiling")  # where the fixture below is made once


class Subject:
    """A network as the service runs it on a CPU, and how often its usual form was called."""

    def __init__(self, cache: PackageCache, unet: Any, wrap: Callable[..., Any] | None = None) -> None:
        self.unet = unet
        self.num_usual = 0
        self.compiler = Compiler(cache)
        rows = SharedRows(2)
        rows.expect(2)
        self.blueprint = Blueprint(unet_network, unet, ((),))
        recorded = rows.wrap(Traced(unet_network(unet, ())))

        def usual(*inputs: Tensor) -> Tensor:
            self.num_usual += 1
            output: Tensor = recorded(*inputs)
            return output

        self.network = Swapped(
            usual,
            self.blueprint,
            self.compiler,
            model="small",
            device=CPU,
            num_threads=2,
            wrap=rows.wrap if wrap is None else wrap,
        )

    def check(self, num_rows: int) -> None:
        """Against the network itself, as diffusers runs it."""
        inputs = make_inputs(num_rows)
        torch.testing.assert_close(self.network(*inputs), unet_network(self.unet, ())(*inputs), atol=1e-4, rtol=1e-4)

    def recipe(self) -> Recipe:
        return Recipe.of(self.blueprint, sizes_of(make_inputs(1)), CPU)

    @property
    def is_swapped(self) -> bool:
        before = self.num_usual
        self.check(1)
        return self.num_usual == before


def make_unet(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        norm_num_groups=4,
        cross_attention_dim=32,
        **changes,
    )
    return settle(unet, CPU)


def make_inputs(num_rows: int) -> tuple[Tensor, ...]:
    return torch.randn(num_rows, 4, 8, 8), torch.full((num_rows,), 500.0), torch.randn(num_rows, 16, 32)


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s, "too slow"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the network in it, which was used, and called, all the time meanwhile."""
    folder = tmp_path_factory.mktemp("cache") / "compiled"
    subject = Subject(PackageCache(folder), make_unet())
    subject.compiler.start()
    assert not subject.is_swapped
    wait_for(lambda: subject.is_swapped)
    subject.compiler.stop()
    for num_rows in (1, 2, 5, 64):
        subject.check(num_rows)
    return folder


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> PackageCache:
    return PackageCache(Path(shutil.copytree(filled, tmp_path / "cache")))


@pytest.fixture
def compile_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Subject]]:
    """A network whose C++ compiler is a script."""
    subjects: list[Subject] = []

    def start(script: str) -> Subject:
        compiler = tmp_path / "compiler"
        compiler.write_text(script, encoding="utf-8")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        subjects.append(Subject(PackageCache(tmp_path / "cache"), make_unet()))
        subjects[-1].compiler.start()
        return subjects[-1]

    yield start
    for subject in subjects:
        subject.compiler.stop()


def test_nothing_but_the_package_and_what_runs_it_stays(filled: Path) -> None:
    assert sorted(path.suffix for path in filled.iterdir()) == [".lock", ".pt2", ".so"]
    assert filled.stat().st_mode & 0o077 == 0


def test_what_was_compiled_before_is_used_from_the_second_call_on(
    cache: PackageCache, caplog: pytest.LogCaptureFixture
) -> None:
    """With other weights of the same architecture, too."""
    subject = Subject(cache, make_unet(seed=1))
    with caplog.at_level(logging.INFO):
        for num_rows in (2, 1, 2, 5, 63):
            subject.check(num_rows)
    assert subject.num_usual == 1
    assert "small: compiled network for inputs of 8x8 in float32 in use, from the cache" in caplog.messages


def test_larger_batches_stay_with_the_usual_network(cache: PackageCache) -> None:
    subject = Subject(cache, make_unet())
    for num_rows in (2, 64, 64, 2):
        subject.check(num_rows)
    assert subject.num_usual == 3


def test_a_lora_that_is_merged_later_is_seen(cache: PackageCache) -> None:
    subject = Subject(cache, make_unet())
    assert not subject.is_swapped
    assert subject.is_swapped
    inputs = make_inputs(2)
    before = subject.network(*inputs)
    layer = "down_blocks.0.resnets.0.conv1"
    factors = Factors(up=torch.randn(16, 4), down=torch.randn(4, 16 * 9), scale=0.3)
    styled(subject.unet).merge([({layer: factors}, 1.0)])
    assert (subject.network(*inputs) - before).abs().max() > 0.01
    subject.check(2)
    styled(subject.unet).merge([])
    torch.testing.assert_close(subject.network(*inputs), before)
    assert subject.is_swapped


def test_graphs_are_captured_anew_of_the_compiled_network(cache: PackageCache) -> None:
    captures: list[CpuCapture] = []

    def wrap(run: Callable[..., Tensor]) -> Graphed[Tensor]:
        captures.append(CpuCapture())
        return Graphed(run, capture=captures[0])

    subject = Subject(cache, make_unet(), wrap)
    for num_rows in (1, 1, 2, 1):
        subject.check(num_rows)
    assert [shapes[0][0] for shapes in captures[0].shapes] == [1, 2]


def test_a_pipeline_finds_it_by_what_it_is_not_by_where_it_came_from(
    cache: PackageCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = small_spec(tmp_path / "small", lora=None)
    make_unet(seed=2).save_pretrained(Path(spec.source) / "unet")
    plain = load_pipeline(spec, CPU, torch.float32)
    compiled = load_pipeline(spec, CPU, torch.float32, compiler=Compiler(cache))
    latents, conditionings = torch.randn(2, 4, 8, 8), plain.encode_prompts(["a", "b"])
    arguments = latents, torch.full((2,), 500.0), conditionings, torch.ones(2)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            torch.testing.assert_close(compiled.predict(*arguments), plain.predict(*arguments), atol=1e-4, rtol=1e-4)
    assert any("from the cache" in message for message in caplog.messages)


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_package_is_removed_and_never_run(
    cache: PackageCache, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    subject = Subject(cache, make_unet())
    path = cache.path(subject.recipe())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    assert not subject.is_swapped
    assert not subject.is_swapped
    assert not path.exists()
    assert f"{path} is damaged and will be compiled anew" in caplog.messages


def test_a_package_that_computes_something_else_is_never_used(
    cache: PackageCache, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights of both networks have the same names and shapes."""
    subject, other = Subject(cache, make_unet()), Subject(cache, make_unet(act_fn="gelu"))
    path = cache.path(subject.recipe()).rename(cache.path(other.recipe()))
    for _ in range(3):
        other.check(2)
    assert other.num_usual == 3
    (message,) = caplog.messages
    assert "its output differs from the usual one by" in message
    assert f"remove {path} to have it compiled anew" in message


@pytest.mark.parametrize(
    "change",
    [{"torch_version": "2.0.0"}, {"diffusers_version": "0.1"}, {"machine": "another GPU"}, {"own_format": 0}],
    ids=lambda change: next(iter(change)),
)
def test_a_package_of_other_versions_or_another_machine_is_not_found(
    cache: PackageCache, change: dict[str, Any]
) -> None:
    recipe = Subject(cache, make_unet()).recipe()
    assert cache.find(recipe) is not None
    assert cache.find(replace(recipe, **change)) is None


def test_other_architectures_sizes_and_formats_have_other_names() -> None:
    unet = make_unet()
    sizes = sizes_of(make_inputs(1))
    names = {
        Recipe.of(Blueprint(unet_network, network, ((),)), inputs, CPU).name
        for network, inputs in (
            (unet, sizes),
            (unet, (((4, 16, 16), "float32"), *sizes[1:])),
            (make_unet(act_fn="gelu"), sizes),
            (settle(make_unet().to(torch.float16), CPU), sizes),
        )
    }
    assert len(names) == 4
    recipe = Recipe.of(Blueprint(unet_network, make_unet(seed=3), ((),)), sizes, CPU)
    assert recipe.name in names
    assert replace(recipe, device="cuda:0").name == replace(recipe, device="cuda:1").name not in names


def test_the_compiling_process_is_told_everything() -> None:
    recipe = Subject(PackageCache(Path()), make_unet()).recipe()
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_without_a_compiler_the_network_goes_on(
    compile_with: Callable[[str], Subject], caplog: pytest.LogCaptureFixture
) -> None:
    subject = compile_with("#!/bin/sh\nexit 1\n")
    assert not subject.is_swapped
    wait_for(lambda: bool(caplog.messages))
    assert not subject.is_swapped
    assert caplog.messages == [
        "small goes on without a compiled network for inputs of 8x8 in float32: "
        "there is no C++ compiler: install g++, or name one by CXX"
    ]


def test_a_compiling_process_that_is_killed_takes_nothing_along(
    compile_with: Callable[[str], Subject], caplog: pytest.LogCaptureFixture
) -> None:
    subject = compile_with("#!/bin/sh\nkill -9 $PPID\n")
    assert not subject.is_swapped
    wait_for(lambda: bool(caplog.messages))
    assert "was ended by SIGKILL; was there too little memory?" in caplog.messages[0]
    assert not subject.is_swapped
    assert subject.compiler.num_open == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    subject = Subject(PackageCache(tmp_path / "file" / "cache"), make_unet())
    subject.compiler.start()
    assert not subject.is_swapped
    wait_for(lambda: bool(caplog.messages))
    subject.compiler.stop()
    assert str(tmp_path / "file") in caplog.messages[0]
    assert "choose another folder by FEWSTEP_COMPILE_CACHE" in caplog.messages[0]


def test_what_a_failed_process_says_last_is_the_reason() -> None:
    assert explain(1, "Traceback:\n  …\nOSError: [Errno 28] No space left on device\n").startswith(
        "No space left on device: make room"
    )
    assert explain(1, "Traceback:\n  …\nValueError: no such operation\n\n") == "ValueError: no such operation"
    assert explain(3, "") == "the process that compiles ended with 3"


def test_stopping_ends_what_is_under_way(compile_with: Callable[[str], Subject], tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    subject = compile_with(DEAF_COMPILER.format(pid_file=pid_file))
    assert not subject.is_swapped
    wait_for(lambda: pid_file.exists() and bool(pid_file.read_text()))
    subject.compiler.stop()
    wait_for(lambda: not is_running(int(pid_file.read_text())))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_worker_that_is_killed_takes_the_compiling_process_along(tmp_path: Path) -> None:
    pid_file, compiler = tmp_path / "pid", tmp_path / "compiler"
    compiler.write_text(DEAF_COMPILER.format(pid_file=pid_file), encoding="utf-8")
    compiler.chmod(0o755)
    code = (
        "import pathlib, time; from tests.models.test_compiling import *; "
        f"subject = Subject(PackageCache(pathlib.Path({str(tmp_path / 'cache')!r})), make_unet()); "
        "subject.compiler.start(); subject.check(1); time.sleep(600)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "CXX": str(compiler)})
    wait_for(lambda: pid_file.exists() and bool(pid_file.read_text()))
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    wait_for(lambda: not is_running(int(pid_file.read_text())))


def is_running(pid: int) -> bool:
    """One that has ended counts no longer, even if nobody has asked for its exit status."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_two_workers_never_compile_the_same_at_once(tmp_path: Path) -> None:
    recipe = Subject(PackageCache(tmp_path), make_unet()).recipe()
    one, other = PackageCache(tmp_path), PackageCache(tmp_path)
    with one.lock(recipe, lambda: False) as work:
        assert work is not None
        (work / "begun").touch()
        with other.lock(recipe, lambda: True) as none:
            assert none is None
        assert (work / "begun").exists()
    with other.lock(recipe, lambda: False) as work:
        assert work is not None
        assert list(work.iterdir()) == []
