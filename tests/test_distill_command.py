"""fewstep distill lcm as somebody runs it: the result is served, and what goes wrong is one line."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from commands.distilling import Options, told
from commands.lcm import LcmOptions, distill_lcm
from tests.small_models import make_sd_folder, make_sdxl_folder
from tests.test_cli import fewstep
from tests.training_data import change_config, full_disk, write_pictures


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distill")
    make_sd_folder(root / "sd")
    make_sdxl_folder(root / "sdxl")
    write_pictures(root / "pictures")
    return root


def command(root: Path, out: Path, teacher: str = "sd", *more: str) -> list[str]:
    return [
        *("distill", "lcm", str(root / teacher), "--data", str(root / "pictures"), "--out", str(out)),
        *("--steps", "4", "--batch-size", "2", "--device", "cpu", "--dtype", "float32"),
        *more,
    ]


@pytest.mark.parametrize(
    ("teacher", "more"), [("sd", ("--rank", "4")), ("sdxl", ("--full", "--gradient-checkpointing"))]
)
def test_the_result_is_served_by_the_entry_that_is_printed(
    root: Path, tmp_path: Path, teacher: str, more: tuple[str, ...]
) -> None:
    out = tmp_path / "my-lcm"
    result = fewstep(*command(root, out, teacher, "--sample", "a red apple", "--save-every", "2", *more))
    assert result.returncode == 0, result.stderr
    assert "data: 6 pictures of" in result.stderr
    assert (out / "catalog.toml").read_text() in result.stderr
    assert f"FEWSTEP_EXTRA_CATALOG={out}/catalog.toml fewstep serve --model my-lcm" in result.stderr
    for step in (2, 4):
        with Image.open(out / "training" / "samples" / f"step-{step:06}.png") as sheet:
            assert sheet.size == (3 * 32, 16 + 32)
    check = fewstep("models", "check", "my-lcm", FEWSTEP_EXTRA_CATALOG=str(out / "catalog.toml"))
    assert check.returncode == 0, check.stderr
    assert "sound" in check.stdout


def test_ctrl_c_says_how_to_go_on(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "training" / "loss.csv"
    arguments = [*command(root, tmp_path), "--steps", "100000", "--save-every", "100000"]
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
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_the_bundled_miniature_is_distilled_from_its_own_pictures(tmp_path: Path) -> None:
    arguments = [
        "bundled:mini-sd",
        "--data",
        "mini",
        "--out",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path / "cache"),
    ]
    small = ["--steps", "1", "--pictures", "8", "--batch-size", "2", "--rank", "2", "--device", "cpu"]
    result = fewstep("distill", "lcm", *arguments, *small)
    assert result.returncode == 0, result.stderr
    assert "8 painted pictures of" in result.stderr
    assert list((tmp_path / "cache").iterdir())


def options(root: Path, out: Path, **changes: Any) -> Options:
    values: dict[str, Any] = {
        "teacher": str(root / "sd"),
        "data": str(root / "pictures"),
        "out": out,
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
    return Options(**(values | changes))


def distil(
    root: Path,
    out: Path,
    full: bool = False,
    rank: int | None = 4,
    guidance: tuple[float, float] = (3.0, 15.0),
    **changes: Any,
) -> None:
    """In this process."""
    distill_lcm(options(root, out, **changes), LcmOptions(full, rank, solver_timesteps=50, guidance=guidance))


def test_a_finished_run_writes_its_result_again_and_encodes_nothing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distil(root, tmp_path)
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    first = lora.read_bytes()
    assert "encoding pictures" in capsys.readouterr().err
    lora.unlink()
    distil(root, tmp_path)
    assert "encoding pictures" not in capsys.readouterr().err
    assert lora.read_bytes() == first


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": "33"}, ("--size 33", "N or WxH is needed, in multiples of 8 pixels")),
        ({"size": "32x"}, ("--size 32x", "N or WxH")),
        ({"guidance": (5.0, 3.0)}, ("--guidance 5 3", "1 <= LOW <= HIGH")),
        ({"guidance": (0.0, 3.0)}, ("--guidance 0 3", "1 <= LOW <= HIGH")),
        ({"guidance": (3.0, math.inf)}, ("--guidance 3 inf", "1 <= LOW <= HIGH")),
        ({"full": True}, ("--rank 4 and --full", "a whole network has no rank")),
        ({"num_painted": 8}, ("--pictures 8 is for --data mini",)),
        ({"device": "cuda:99"}, ("--device cuda:99",)),
        ({"device": "toaster"}, ("--device toaster",)),
        ({"data": "nowhere"}, ("there is no folder nowhere",)),
        ({"teacher": "nowhere"}, ("nowhere", "there is no such folder, and the catalog has only", "mini-lcm")),
    ],
)
def test_a_wrong_option_is_named(
    root: Path, tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        distil(root, tmp_path, **changes)
    assert ended.value.exit_code == 78
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fewstep: ")
    for word in words:
        assert word in line


def refusal(root: Path, out: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    with pytest.raises(typer.Exit) as ended:
        distil(root, out, **changes)
    assert ended.value.exit_code == 78
    return capsys.readouterr().err.splitlines()[-1]


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
    assert f"--out {root / out} {reason}" in refusal(root, root / out, capsys, teacher=str(root / teacher))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_full_disk_is_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While pictures are encoded."""
    with full_disk(1000):
        assert "weights can't be written or read; is the disk full? " in refusal(root, tmp_path / "out", capsys)


def test_other_settings_for_a_begun_run_are_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distil(root, tmp_path)
    with pytest.raises(typer.Exit):
        distil(root, tmp_path, rank=8)
    assert "was written with rank = 4, and now it is 8" in capsys.readouterr().err.splitlines()[-1]


def test_another_schedule_of_the_teacher_is_another_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sd_folder(tmp_path / "sd")
    distil(root, tmp_path / "out", teacher=str(tmp_path / "sd"))
    change_config(tmp_path / "sd" / "scheduler", beta_end=0.02)
    with pytest.raises(typer.Exit):
        distil(root, tmp_path / "out", teacher=str(tmp_path / "sd"))
    assert "was written with teacher's scheduler = " in capsys.readouterr().err.splitlines()[-1]


def test_too_little_memory_says_what_to_lower(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A LoRA of petabytes."""
    with pytest.raises(typer.Exit) as ended:
        distil(root, tmp_path, rank=10**13)
    assert ended.value.exit_code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fewstep: there is too little memory for this training: add --gradient-checkpointing, or ")
    for word in ("lower --batch-size (2 now", "lower --size", f"lower --rank ({10**13} now)"):
        assert word in line


def test_a_gpus_memory_too(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(typer.Exit),
        told(options(root, tmp_path, gradient_checkpointing=True, size="512"), "leave --full out"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    line = capsys.readouterr().err.splitlines()[-1]
    assert "lower --size (512 now), or leave --full out" in line
    assert "gradient" not in line
