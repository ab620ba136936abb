"""Every stage, tiny: it learns a fixed small batch, and an interrupted run ends where an unbroken one does."""

import random
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from models.training import lcm
from models.training.mini.autoencoder import (
    PictureSource,
    build_kl,
    build_tiny,
    train_kl,
    train_tiny,
)
from models.training.mini.linear_code import LinearCode
from models.training.mini.pixels import to_tensor
from models.training.mini.teacher import CaptionedLatents, build_text_encoder, build_unet, train_jointly, warm_up
from models.training.mini.tokenizer import save_tokenizer
from models.training.mini.vocabulary import Vocabulary
from models.training.trainer import LOG, Trainer, TrainSettings


def settings(steps: int, rate: float = 3e-3) -> TrainSettings:
    return TrainSettings(steps=steps, rate=rate, warmup=3, ema_decay=0.8, save_every=1000, log_every=1)


def losses(folder: Path) -> list[float]:
    rows = (folder / LOG).read_text().splitlines()[1:]
    return [float(row.split(",")[1]) for row in rows]


def assert_lower(folder: Path, share: float) -> None:
    values = losses(folder)
    fifth = max(1, len(values) // 5)
    assert sum(values[-fifth:]) < share * sum(values[:fifth])


class FixedSource(PictureSource):
    """The same pictures in every batch."""

    def batch(self, rng: random.Random) -> Tensor:
        rng.seed(0)
        return super().batch(rng)


@pytest.fixture
def pictures(shapes: Vocabulary) -> FixedSource:
    return FixedSource(shapes, batch_size=4)


def small_unet() -> UNet2DConditionModel:
    torch.manual_seed(1)
    return build_unet((16, 16, 16), hidden=16)


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
    train_tiny(pictures, code, tmp_path, settings(40), build_tiny(8))
    assert_lower(tmp_path / "tiny", 0.9)
    assert (tmp_path / "taesd" / "config.json").exists()


def test_the_warm_up_learns(data: CaptionedLatents, tmp_path: Path) -> None:
    torch.manual_seed(0)
    warm_up(build_text_encoder(data.tokenizer, hidden=16, layers=1), data, tmp_path, settings(60, rate=1e-2))
    assert_lower(tmp_path / "warm_up", 0.9)


def test_joint_training_learns_and_writes_both_networks(data: CaptionedLatents, tmp_path: Path) -> None:
    text_encoder = build_text_encoder(data.tokenizer, hidden=16, layers=1)
    train_jointly(small_unet(), text_encoder, data, tmp_path, settings(60, rate=5e-3))
    assert_lower(tmp_path / "joint", 0.9)
    assert (tmp_path / "unet" / "config.json").exists()
    assert (tmp_path / "text_encoder" / "config.json").exists()


def test_the_teacher_is_distilled_by_the_program_for_any_teacher(data: CaptionedLatents, tmp_path: Path) -> None:
    text_encoder = build_text_encoder(data.tokenizer, hidden=16, layers=1)
    train_jointly(small_unet(), text_encoder, data, tmp_path / "teacher", settings(20, rate=5e-3))
    save_tokenizer(data.tokenizer, tmp_path / "teacher" / "tokenizer")
    data.cache.save(tmp_path / "latents")
    out = tmp_path / "lcm"
    lcm.main(tmp_path / "latents", tmp_path / "teacher", out, steps=20, batch_size=8, solver_timesteps=10, emoji=False)
    assert len(losses(out / lcm.RUN)) == 1
    lora = load_file(out / "pytorch_lora_weights.safetensors")
    assert any("lora_B" in name and bool(weight.any()) for name, weight in lora.items())
    scheduler = LCMScheduler.from_pretrained(out)
    assert scheduler.config.original_inference_steps == 10
    assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == ("v_prediction", True)


def test_a_resumed_run_equals_an_unbroken_one(data: CaptionedLatents, tmp_path: Path) -> None:
    def run(out: Path, until: int | None = None) -> Trainer:
        model = build_text_encoder(data.tokenizer, hidden=16, layers=1)
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
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name])
    with unbroken.averaged_weights(), resumed.averaged_weights():
        for name, weight in unbroken.model.state_dict().items():
            assert torch.equal(weight, resumed.model.state_dict()[name])
