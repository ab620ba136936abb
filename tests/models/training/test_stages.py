"""Every stage, tiny: it learns a fixed small batch, and an interrupted run ends where an unbroken one does."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from models.training.mini.autoencoder import (
    PictureSource,
    build_kl,
    build_tiny,
    train_kl,
    train_tiny,
)
from models.training.mini.linear_code import LinearCode
from models.training.mini.networks import Networks, build_networks, build_text_encoder, build_unet, build_unet_xl
from models.training.mini.pixels import to_tensor
from models.training.mini.teacher import CaptionedLatents, start_from, train_jointly, warm_up
from models.training.mini.vocabulary import Vocabulary
from models.training.teachers import Layout, open_teacher
from models.training.trainer import CPU, Trainer
from tests.training_data import assert_lower, assert_same_tensors, assert_same_training, settings


class FixedSource(PictureSource):
    """The same pictures in every batch."""

    def batch(self, rng: random.Random) -> Tensor:
        rng.seed(0)
        return super().batch(rng)


@pytest.fixture
def pictures(shapes: Vocabulary) -> FixedSource:
    return FixedSource(shapes, batch_size=4)


def small_networks(tokenizer: CLIPTokenizer, layout: Layout = "sd") -> Networks:
    torch.manual_seed(1)
    networks = build_networks(layout, tokenizer, hidden=24)
    channels = (16, 16, 16)
    unet = build_unet(channels, 24) if layout == "sd" else build_unet_xl(channels, hidden=32, pooled=8)
    return replace(networks, unet=unet)


def test_the_code_is_scaled(pictures: FixedSource, code: LinearCode) -> None:
    latents = code.encode(to_tensor([pictures.composer.crowd(random.Random(seed)) for seed in range(32)]))
    assert latents.shape[1:] == (4, 16, 16)
    assert abs(float(latents.std()) - 1) < 0.2


def test_the_kl_autoencoder_learns(pictures: FixedSource, code: LinearCode, tmp_path: Path) -> None:
    torch.manual_seed(0)
    train_kl(pictures, code, tmp_path, settings(30), build_kl((8, 8, 8)))
    assert_lower(tmp_path / "kl", 0.9)
    assert (tmp_path / "vae" / "config.json").exists()


def test_the_tiny_autoencoder_learns(pictures: FixedSource, code: LinearCode, tmp_path: Path) -> None:
    torch.manual_seed(0)
    train_tiny(pictures, code.encode, tmp_path, settings(40), build_tiny(8))
    assert_lower(tmp_path / "tiny", 0.9)
    assert (tmp_path / "taesd" / "config.json").exists()


def test_the_warm_up_learns(data: CaptionedLatents, tmp_path: Path) -> None:
    warm_up(small_networks(data.tokenizer), data, tmp_path, settings(60, rate=1e-2))
    assert_lower(tmp_path / "warm_up", 0.9)


def test_a_teacher_in_sdxls_layout_starts_with_the_other_ones_text_encoder(
    data: CaptionedLatents, tmp_path: Path
) -> None:
    first, second = small_networks(data.tokenizer), small_networks(data.tokenizer, "sdxl")
    with torch.no_grad():
        for weight in first.module().parameters():
            weight.normal_()
    first.pipeline(build_kl((8, 8, 8)), data.tokenizer).save_pretrained(tmp_path)
    before = {name: weight.clone() for name, weight in second.module().state_dict().items()}
    start_from(second, tmp_path, ["text_encoder"])
    after = second.module().state_dict()
    changed = {name.partition(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"text_encoder"}
    assert_same_tensors(*(networks.text_encoders["text_encoder"].state_dict() for networks in (first, second)))


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_joint_training_learns_and_its_folder_is_a_teacher(
    data: CaptionedLatents, tmp_path: Path, layout: Layout
) -> None:
    networks = small_networks(data.tokenizer, layout)
    pipeline = networks.pipeline(build_kl((8, 8, 8)), data.tokenizer)
    train_jointly(
        networks, data, tmp_path, settings(60, rate=5e-3), lambda: pipeline.save_pretrained(tmp_path / "model")
    )
    assert_lower(tmp_path / "joint", 0.9)
    teacher = open_teacher(str(tmp_path / "model"), {})
    assert (teacher.layout, teacher.build_diffusion(CPU).prediction_type) == (layout, "v_prediction")
    tokens, read = data.tokens(["a red star", ""]), teacher.load_encoders(CPU).encode_captions(["a red star", None])
    with torch.no_grad():
        trained = networks.encode(tokens)
    assert torch.allclose(read.states, trained.states, atol=1e-5)
    assert (read.pooled is None, trained.pooled is None) == (layout == "sd", layout == "sd")
    if read.pooled is not None and trained.pooled is not None:
        assert torch.allclose(read.pooled, trained.pooled, atol=1e-5)


def test_a_resumed_run_equals_an_unbroken_one(data: CaptionedLatents, tmp_path: Path) -> None:
    def run(out: Path, until: int | None = None) -> Trainer:
        model: CLIPTextModel = build_text_encoder(data.tokenizer, hidden=16, layers=1)
        trainer = Trainer(model, out, settings(8))

        def loss_of(_step: int) -> Tensor:
            latents, tokens = data.batch(trainer, dropout=0.1)
            noise = torch.randn(8, 16)
            output: Tensor = model(tokens).pooler_output
            return ((output - noise) ** 2).mean() + 0 * latents.mean()

        trainer.fit(loss_of, until=until)
        return trainer

    torch.manual_seed(3)
    unbroken = run(tmp_path / "unbroken")
    torch.manual_seed(3)
    run(tmp_path / "broken", until=4)
    resumed = run(tmp_path / "broken")
    assert resumed.step == 8
    assert_same_training(unbroken, resumed)
