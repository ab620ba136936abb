"""fewstep distill as somebody runs it: what it makes is served, and what goes wrong is one line.

What all distillations share is tried with one of them where the other can't differ.
"""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import diffusers
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file

from commands.distilling import Options, told
from commands.lcm import LcmOptions, distill_lcm
from commands.turbo import TurboOptions, distill_turbo, extract_lora
from models.catalog import load_catalog
from models.training.add import AddSettings
from models.training.features import LatentClassifier
from tests.small_models import make_sd_folder, make_sdxl_folder
from tests.test_cli import fewstep
from tests.training_data import change_config, full_disk, write_pictures
from workers.checkup import run_trial, trials_of
from workers.settings import WorkerSettings
from workers.standalone import load_engine

LORA_FILE = "pytorch_lora_weights.safetensors"

Program = Literal["lcm", "turbo"]
PROGRAMS: tuple[Program, ...] = ("lcm", "turbo")

COMMON: dict[str, Any] = {
    "steps": 4,
    "size": None,
    "batch_size": 2,
    "accumulate": 1,
    "rate": None,
    "ema_decay": 0.95,
    "caption_dropout": 0.1,
    "seed": 0,
    "save_every": 500,
    "device": "cpu",
    "dtype": "float32",
    "gradient_checkpointing": False,
    "prompts": None,
    "num_painted": None,
    "cache": None,
    "name": None,
}
OWN: dict[Program, dict[str, Any]] = {
    "lcm": {"full": False, "rank": 4, "solver_timesteps": 50, "guidance": (3.0, 15.0), "huber": 1e-3},
    "turbo": {"features": "teacher", "lora": None, "lora_only": None, "start": None, "half": True},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distill")
    make_sd_folder(root / "sd")
    make_sdxl_folder(root / "sdxl")
    write_pictures(root / "pictures")
    LatentClassifier(num_labels=3, num_colors=2, channels=(16, 32)).save_pretrained(root / "features")
    return root


def command(program: Program, root: Path, out: Path, teacher: str = "sd", *more: str) -> list[str]:
    return [
        *("distill", program, str(root / teacher), "--data", str(root / "pictures"), "--out", str(out)),
        *("--steps", "4", "--batch-size", "2", "--device", "cpu", "--dtype", "float32"),
        *more,
    ]


def options(root: Path, out: Path, **changes: Any) -> Options:
    places = {"teacher": str(root / "sd"), "data": str(root / "pictures"), "out": out}
    return Options(**(COMMON | places | changes))


def distil(program: Program, root: Path, out: Path, **changes: Any) -> None:
    """In this process."""
    own = {name: changes.pop(name, value) for name, value in OWN[program].items()}
    if program == "lcm":
        distill_lcm(options(root, out, **changes), LcmOptions(**own))
    else:
        distill_turbo(options(root, out, **changes), TurboOptions(**own), AddSettings())


@contextmanager
def one_line(capsys: pytest.CaptureFixture[str], *words: str, status: int = 78) -> Iterator[None]:
    """Whatever is done within ends so, and its last line has these words."""
    with pytest.raises(typer.Exit) as ended:
        yield
    assert ended.value.exit_code == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fewstep: ")
    for word in words:
        assert word in line


def assert_sound(catalog: Path, name: str) -> None:
    """As fewstep models check finds it: pictures by each of the entry's rules."""
    spec = load_catalog(extra=catalog)[name]
    engine = load_engine(spec, WorkerSettings())
    problems = [run_trial(engine, spec, trial).problem for trial in trials_of(spec)]
    assert problems
    assert not any(problems), problems


# The commands


def run(program: Program, root: Path, out: Path, teacher: str, *more: str) -> str:
    """What it says. It printed the entry that serves its result, and drew the prompt with each checkpoint."""
    result = fewstep(*command(program, root, out, teacher, "--sample", "a red apple", "--save-every", "2", *more))
    assert result.returncode == 0, result.stderr
    assert "data: 6 pictures of" in result.stderr
    assert (out / "catalog.toml").read_text() in result.stderr
    assert f"FEWSTEP_EXTRA_CATALOG={out}/catalog.toml fewstep serve --model {out.name}" in result.stderr
    for step in (2, 4):
        with Image.open(out / "training" / "samples" / f"step-{step:06}.png") as sheet:
            assert sheet.size == (3 * 32, 16 + 32)
    assert_sound(out / "catalog.toml", out.name)
    return result.stderr


@pytest.mark.parametrize(
    ("teacher", "more"), [("sd", ("--rank", "4")), ("sdxl", ("--full", "--gradient-checkpointing"))]
)
def test_an_lcm_is_served(root: Path, tmp_path: Path, teacher: str, more: tuple[str, ...]) -> None:
    run("lcm", root, tmp_path / "my-lcm", teacher, *more)


@pytest.mark.parametrize(("solver_timesteps", "columns"), [(1, 1), (2, 2), (3, 2)])
def test_an_lcm_of_few_timesteps_is_sampled_at_no_more(
    root: Path, tmp_path: Path, solver_timesteps: int, columns: int
) -> None:
    distil("lcm", root, tmp_path, solver_timesteps=solver_timesteps, prompts=["a red apple"])
    with Image.open(tmp_path / "training" / "samples" / "step-000004.png") as sheet:
        assert sheet.width == 32 * columns


def test_a_whole_turbo_and_its_lora_are_served(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "my-turbo"
    said = run("turbo", root, out, "sdxl", "--lora", "4", "--gradient-checkpointing")
    assert re.search(r"rank 4, \d+ layers, .* it holds \d+\.\d% of what the layers differ in", said)
    assert "is in biases and norms, where a LoRA has no place" in said
    assert 'guidance = "none"' in (out / "catalog.toml").read_text()
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(out)
    assert type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    weights = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert_sound(out / "lora" / "catalog.toml", "my-turbo-lora")


def test_a_turbo_lora_alone_is_trained_through_a_classifiers_features_and_served(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "my-lora"
    said = run("turbo", root, out, "sd", "--lora-only", "4", "--features", str(root / "features"), "--fp32")
    assert "student: a LoRA of rank 4" in said
    assert {path.name for path in out.iterdir()} == {LORA_FILE, "scheduler_config.json", "catalog.toml", "training"}
    assert {tensor.dtype for tensor in load_file(out / LORA_FILE).values()} == {torch.float32}


def test_a_turbo_lora_goes_on_from_an_lcm_lora(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a rate of next to nothing it ends where it began. From another start it is another run."""
    lcm, out = tmp_path / "lcm", tmp_path / "turbo"
    distil("lcm", root, lcm, rate=0.1)
    distil("turbo", root, out, lora_only=4, start=lcm, half=False, rate=1e-9)
    begun, ended = load_file(lcm / LORA_FILE), load_file(out / LORA_FILE)
    assert begun.keys() == ended.keys()
    assert all(torch.allclose(weight.float(), ended[name], atol=1e-6) for name, weight in begun.items())
    assert any(weight.abs().max() > 0.01 for name, weight in begun.items() if "lora_B" in name)
    with one_line(capsys, "was written with start = ", "and now it is None"):
        distil("turbo", root, out, lora_only=4, half=False, rate=1e-9)


@pytest.mark.parametrize(("program", "written"), [("lcm", LORA_FILE), ("turbo", "model_index.json")])
def test_ctrl_c_says_how_to_go_on(root: Path, tmp_path: Path, program: Program, written: str) -> None:
    log = tmp_path / "training" / "loss.csv"
    arguments = [*command(program, root, tmp_path), "--steps", "100000", "--save-every", "100000"]
    process = subprocess.Popen([sys.executable, "-m", "cli", *arguments], stderr=subprocess.PIPE, text=True)
    while not log.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    found = re.search(r"stopped at step (\d+) of 100000; its checkpoint is written\. The same command goes on", stderr)
    assert found, stderr
    state = torch.load(tmp_path / "training" / "checkpoint.pt", weights_only=True)
    assert state["step"] == int(found[1])
    assert (tmp_path / written).exists()


def test_the_bundled_miniature_is_distilled_from_its_own_pictures(tmp_path: Path) -> None:
    places = ["bundled:mini-sd", "--data", "mini", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    small = ["--steps", "1", "--pictures", "8", "--batch-size", "2", "--rank", "2", "--device", "cpu"]
    result = fewstep("distill", "lcm", *places, *small)
    assert result.returncode == 0, result.stderr
    assert "8 painted pictures of" in result.stderr
    assert list((tmp_path / "cache").iterdir())


def test_a_lora_is_extracted_from_any_two_models(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_pretrained(root / "sd" / "unet")
    for weight in unet.parameters():
        weight.data += 0.01 * torch.randn_like(weight)
    unet.save_pretrained(tmp_path / "tuned")
    arguments = (str(root / "sd"), str(tmp_path / "tuned"), "--out", str(tmp_path / "lora"), "--device", "cpu")
    result = fewstep("distill", "extract", *arguments, "--keep", "0.8")
    assert result.returncode == 0, result.stderr
    found = re.search(r"rank \d+, \d+ layers, .* it holds (\d+\.\d)% of what the layers differ in", result.stderr)
    assert found
    assert 80 <= float(found[1]) < 90
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(root / "sd")
    pipe.load_lora_weights(tmp_path / "lora")
    assert pipe.get_active_adapters() == ["default_0"]


# What begins again


def test_a_finished_run_writes_its_result_again_and_encodes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distil("lcm", root, tmp_path)
    lora = tmp_path / LORA_FILE
    first = lora.read_bytes()
    assert "encoding pictures" in capsys.readouterr().err
    lora.unlink()
    distil("lcm", root, tmp_path)
    assert "encoding pictures" not in capsys.readouterr().err
    assert lora.read_bytes() == first


@pytest.mark.parametrize(
    ("program", "change", "words"),
    [
        ("lcm", {"rank": 8}, "was written with rank = 4, and now it is 8"),
        ("turbo", {"features": "features"}, "was written with features = teacher, and now it is "),
    ],
)
def test_other_settings_for_a_begun_run_are_refused(
    root: Path,
    tmp_path: Path,
    program: Program,
    change: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(root)  # where the features are
    distil(program, root, tmp_path)
    with one_line(capsys, words):
        distil(program, root, tmp_path, **change)


def test_another_schedule_of_the_teacher_is_another_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sd_folder(tmp_path / "sd")
    distil("lcm", root, tmp_path / "out", teacher=str(tmp_path / "sd"))
    change_config(tmp_path / "sd" / "scheduler", beta_end=0.02)
    with one_line(capsys, "was written with teacher's scheduler = "):
        distil("lcm", root, tmp_path / "out", teacher=str(tmp_path / "sd"))


# What goes wrong


WRONG_IN_ALL: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"size": "33"}, ("--size 33", "N or WxH is needed, in multiples of 8 pixels")),
    ({"size": "32x"}, ("--size 32x", "N or WxH")),
    ({"num_painted": 8}, ("--pictures 8 is for --data mini",)),
    ({"device": "cuda:99"}, ("--device cuda:99",)),
    ({"device": "toaster"}, ("--device toaster",)),
    ({"data": "nowhere"}, ("there is no folder nowhere",)),
    ({"teacher": "nowhere"}, ("nowhere", "there is no such folder, and the catalog has only", "mini-lcm")),
]


@pytest.mark.parametrize(
    ("program", "changes", "words"),
    [
        *((program, *wrong) for program in PROGRAMS for wrong in WRONG_IN_ALL),
        ("lcm", {"guidance": (5.0, 3.0)}, ("--guidance 5 3", "1 <= LOW <= HIGH")),
        ("lcm", {"guidance": (0.0, 3.0)}, ("--guidance 0 3", "1 <= LOW <= HIGH")),
        ("lcm", {"guidance": (3.0, math.inf)}, ("--guidance 3 inf", "1 <= LOW <= HIGH")),
        ("lcm", {"full": True}, ("--rank 4 and --full", "a whole network has no rank")),
        ("turbo", {"lora": 4, "lora_only": 8}, ("--lora 4 and --lora-only 8", "is one already")),
        ("turbo", {"start": Path("lcm")}, ("--start lcm is for --lora-only", "a whole network starts as its teacher")),
        ("turbo", {"start": Path("nowhere"), "lora_only": 4}, ("--start nowhere: the folder of a LoRA", LORA_FILE)),
        (
            "turbo",
            {"features": "nowhere"},
            ("--features nowhere", "'teacher' or the folder of a LatentClassifier is needed"),
        ),
    ],
)
def test_a_wrong_option_is_named(
    root: Path,
    tmp_path: Path,
    program: Program,
    changes: dict[str, Any],
    words: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with one_line(capsys, *words):
        distil(program, root, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()  # before anything was encoded


def test_a_lora_of_another_rank_is_no_start(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distil("lcm", root, tmp_path / "lcm")
    with one_line(capsys, f"{tmp_path / 'lcm'}: ", "lora_A.weight is (4, ", "and (8, ", "the same teacher and rank"):
        distil("turbo", root, tmp_path / "out", start=tmp_path / "lcm", lora_only=8)


def test_a_teacher_that_predicts_pictures_is_refused_before_anything_is_encoded(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sd_folder(tmp_path / "sd")
    change_config(tmp_path / "sd" / "scheduler", prediction_type="sample")
    with one_line(capsys, "its prediction_type is 'sample'"):
        distil("turbo", root, tmp_path / "out", teacher=str(tmp_path / "sd"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "teacher", "reason"),
    [
        ("sd", "sd", "is the teacher's own folder, which would be overwritten"),
        ("sd/unet", "sd", "is the teacher's own folder"),
        ("sdxl", "sd", "has another model in it, which would be overwritten"),
        ("pictures/0.png", "sd", "is a file: a folder is needed"),
    ],
)
def test_no_other_model_is_overwritten(
    root: Path, out: str, teacher: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with one_line(capsys, f"--out {root / out} {reason}"):
        distil("lcm", root, root / out, teacher=str(root / teacher))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_full_disk_is_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While pictures are encoded."""
    with one_line(capsys, "weights can't be written or read; is the disk full? "), full_disk(1000):
        distil("lcm", root, tmp_path / "out")


@pytest.mark.parametrize(
    ("program", "rank", "option"), [("lcm", "rank", "--rank"), ("turbo", "lora_only", "--lora-only")]
)
def test_too_little_memory_says_what_to_lower(
    root: Path, tmp_path: Path, program: Program, rank: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoRA of petabytes."""
    ways = (
        "fewstep: there is too little memory for this training: add --gradient-checkpointing, or ",
        "lower --batch-size (2 now; --accumulate makes up for it), or lower --size",
        f"or lower {option} ({10**13} now)",
    )
    with one_line(capsys, *ways, status=1):
        distil(program, root, tmp_path, **{rank: 10**13})


def test_a_gpus_memory_too(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(typer.Exit),
        told(options(root, tmp_path, gradient_checkpointing=True, size="512"), "leave --full out"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    line = capsys.readouterr().err.splitlines()[-1]
    assert "lower --size (512 now), or leave --full out" in line
    assert "gradient" not in line


@pytest.mark.parametrize(
    ("base", "tuned", "rank", "keep", "words"),
    [
        ("sd", "sdxl", None, None, "they are of two architectures: add_embedding.linear_1.bias is not there in"),
        ("sd", "sd", None, None, "don't differ: there is nothing to extract"),
        ("sd", "pictures", None, None, "neither a UNet's folder nor one of diffusers"),
        ("sd", "sdxl", 4, 0.5, "--rank 4 and --keep 0.5: one of them says the other"),
    ],
)
def test_what_can_not_be_extracted_is_one_line(
    root: Path,
    tmp_path: Path,
    base: str,
    tuned: str,
    rank: int | None,
    keep: float | None,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with one_line(capsys, words):
        extract_lora(str(root / base), str(root / tuned), tmp_path / "lora", rank, keep, True, "cpu")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("out", ["sd", "sd/unet"])
def test_an_extracted_lora_does_not_go_among_a_models_files(
    root: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with one_line(capsys, f"--out {root / out} has a model in it"):
        extract_lora(str(root / "sd"), str(root / "sdxl"), root / out, 4, None, True, "cpu")
