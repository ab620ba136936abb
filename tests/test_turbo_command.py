"""fewstep distill turbo and extract as somebody runs them: the results are served, and what goes wrong is one line."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file

from commands.turbo import TurboOptions, distill_turbo, extract_lora
from models.training.add import AddSettings
from models.training.features import LatentClassifier
from tests.small_models import make_sd_folder, make_sdxl_folder
from tests.test_cli import fewstep
from tests.test_distill_command import options
from tests.training_data import change_config, write_pictures

LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("turbo")
    make_sd_folder(root / "sd")
    make_sdxl_folder(root / "sdxl")
    write_pictures(root / "pictures")
    LatentClassifier(num_labels=3, num_colors=2, channels=(16, 32)).save_pretrained(root / "features")
    return root


def command(root: Path, out: Path, teacher: str = "sd", *more: str) -> list[str]:
    return [
        *("distill", "turbo", str(root / teacher), "--data", str(root / "pictures"), "--out", str(out)),
        *("--steps", "4", "--batch-size", "2", "--device", "cpu", "--dtype", "float32"),
        *more,
    ]


def assert_served(catalog: Path, name: str) -> None:
    check = fewstep("models", "check", name, FEWSTEP_EXTRA_CATALOG=str(catalog))
    assert check.returncode == 0, check.stderr
    assert "sound" in check.stdout


def test_a_whole_model_and_its_lora_are_served_by_the_entries_that_are_written(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "my-turbo"
    more = ("--lora", "4", "--sample", "a red apple", "--save-every", "2", "--gradient-checkpointing")
    result = fewstep(*command(root, out, "sdxl", *more))
    assert result.returncode == 0, result.stderr
    assert re.search(r"rank 4, \d+ layers, .* it holds \d+\.\d% of what the layers differ in", result.stderr)
    assert "is in biases and norms, where a LoRA has no place" in result.stderr
    assert (out / "catalog.toml").read_text() in result.stderr
    assert 'guidance = "none"' in (out / "catalog.toml").read_text()
    for step in (2, 4):
        with Image.open(out / "training" / "samples" / f"step-{step:06}.png") as sheet:
            assert sheet.size == (3 * 32, 16 + 32)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(out)
    assert type(pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert {tensor.dtype for tensor in load_file(out / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    assert_served(out / "catalog.toml", "my-turbo")
    assert_served(out / "lora" / "catalog.toml", "my-turbo-lora")


def test_a_lora_is_trained_alone_through_a_classifiers_features(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "my-lora"
    result = fewstep(*command(root, out, "sd", "--lora-only", "4", "--features", str(root / "features"), "--fp32"))
    assert result.returncode == 0, result.stderr
    assert "student: a LoRA of rank 4" in result.stderr
    assert {path.name for path in out.iterdir()} == {LORA_FILE, "scheduler_config.json", "catalog.toml", "training"}
    assert {tensor.dtype for tensor in load_file(out / LORA_FILE).values()} == {torch.float32}
    assert_served(out / "catalog.toml", "my-lora")


def test_ctrl_c_says_how_to_go_on(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "training" / "loss.csv"
    arguments = [*command(root, tmp_path), "--steps", "100000", "--save-every", "100000"]
    process = subprocess.Popen([sys.executable, "-m", "cli", *arguments], stderr=subprocess.PIPE, text=True)
    while not log.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert re.search(r"stopped at step \d+ of 100000; its checkpoint is written\. The same command goes on", stderr)
    assert (tmp_path / "model_index.json").exists()


def distil(
    root: Path,
    out: Path,
    features: str = "teacher",
    lora: int | None = None,
    lora_only: int | None = None,
    **changes: Any,
) -> None:
    """In this process."""
    own = TurboOptions(features, lora, lora_only, half=True)
    distill_turbo(options(root, out, **changes), own, AddSettings())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": 4, "lora_only": 8}, ("--lora 4 and --lora-only 8", "is one already")),
        ({"features": "nowhere"}, ("--features nowhere", "'teacher' or the folder of a LatentClassifier is needed")),
        ({"size": "33"}, ("--size 33", "N or WxH is needed")),
        ({"data": "nowhere"}, ("there is no folder nowhere",)),
        ({"teacher": "mini-none"}, ("mini-none", "there is no such folder")),
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


def test_a_teacher_that_predicts_pictures_is_refused_before_anything_is_encoded(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_sd_folder(tmp_path / "sd")
    change_config(tmp_path / "sd" / "scheduler", prediction_type="sample")
    with pytest.raises(typer.Exit):
        distil(root, tmp_path / "out", teacher=str(tmp_path / "sd"))
    errors = capsys.readouterr().err
    assert "its prediction_type is 'sample'" in errors.splitlines()[-1]
    assert "encoding pictures" not in errors


def test_other_settings_for_a_begun_run_are_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distil(root, tmp_path)
    with pytest.raises(typer.Exit):
        distil(root, tmp_path, features=str(root / "features"))
    assert "was written with features = teacher, and now it is" in capsys.readouterr().err.splitlines()[-1]


def test_too_little_memory_says_what_to_lower(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A LoRA of petabytes."""
    with pytest.raises(typer.Exit) as ended:
        distil(root, tmp_path, lora_only=10**13)
    assert ended.value.exit_code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "add --gradient-checkpointing, or lower --batch-size (2 now; --accumulate makes up for it)" in line
    assert f"or lower --lora-only ({10**13} now)" in line


def test_a_lora_is_extracted_from_any_two_models(root: Path, tmp_path: Path) -> None:
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
    with pytest.raises(typer.Exit) as ended:
        extract_lora(str(root / base), str(root / tuned), tmp_path / "lora", rank, keep, True, "cpu")
    assert ended.value.exit_code == 78
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("out", ["sd", "sd/unet"])
def test_a_lora_does_not_go_among_a_models_files(root: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        extract_lora(str(root / "sd"), str(root / "sdxl"), root / out, 4, None, True, "cpu")
    assert f"--out {root / out} has a model in it" in capsys.readouterr().err.splitlines()[-1]
