"""Styles: the programs that redraw pictures, and the LoRA that learns from them."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.styles import restyled_judge
from models.training.mini.autoencoder import build_kl
from models.training.mini.dataset import Composer, Pixels
from models.training.mini.judging import Case, CaseMaker
from models.training.mini.recognizer import look_distance
from models.training.mini.restyling import STYLES
from models.training.mini.sprites import draw_sprites
from models.training.mini.style import StyleTraining, restyled_latents
from models.training.mini.teacher import CaptionedLatents, PaintedBatches
from models.training.mini.vocabulary import Vocabulary
from models.training.teachers import Layout, open_teacher
from models.training.trainer import CPU
from tests.models.training.test_stages import small_networks
from tests.training_data import assert_lower, on_one_batch, settings

BUNDLED = Path(__file__).parents[4] / "models" / "bundled"


@pytest.fixture(scope="module")
def maker(shapes: Vocabulary) -> CaseMaker:
    return CaseMaker(shapes, draw_sprites(shapes))


@pytest.fixture(scope="module")
def cases(maker: CaseMaker) -> list[Case]:
    return [case for case in maker.cases(60) if case.kind == "shape"]


@pytest.mark.parametrize("style", STYLES)
def test_restyled_things_and_backgrounds_can_be_told_apart(maker: CaseMaker, cases: list[Case], style: str) -> None:
    composer, rng = Composer(maker.vocabulary), random.Random(0)
    judge = restyled_judge(maker, STYLES[style])
    verdicts = [judge.judge(case, STYLES[style](composer.compose(case.scene, rng))) for case in cases]
    assert np.mean([verdict.near for verdict in verdicts]) >= 0.7  # some differ by colour only, which styles mute
    assert np.mean([verdict.background for verdict in verdicts]) >= 0.95


def test_neon_is_night_and_sketch_is_paper_on_every_background(shapes: Vocabulary) -> None:
    for color in shapes.colors:
        empty: Pixels = np.full((64, 64, 3), color.rgb, np.uint8)
        assert STYLES["neon"](empty).max() < 80
        assert STYLES["sketch"](empty).min() > 180


def test_looks_differ_by_style_and_not_from_themselves(shapes: Vocabulary, cases: list[Case]) -> None:
    composer = Composer(shapes)
    pictures = [composer.compose(case.scene, random.Random(0)) for case in cases]
    restyled = [STYLES["neon"](picture) for picture in pictures]
    assert look_distance(pictures, pictures) == 0
    assert look_distance(restyled, pictures) > 20


def test_pictures_are_restyled_once_and_encoded_by_the_teacher(shapes: Vocabulary, tmp_path: Path) -> None:
    encoders = open_teacher(str(BUNDLED / "mini-sd"), {}).load_encoders(CPU)
    first = restyled_latents(encoders, shapes, STYLES["neon"], 4, tmp_path, seed=1)

    def fail(_picture: Pixels) -> Pixels:
        raise AssertionError("painted again")

    again = restyled_latents(encoders, shapes, fail, 4, tmp_path, seed=1)
    assert first.latents.shape == (4, 4, 16, 16)
    assert torch.equal(first.latents, again.latents)
    assert [scene.things for scene in first.scenes] == [scene.things for scene in again.scenes]


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_style_training_lowers_its_loss(data: CaptionedLatents, tmp_path: Path, layout: Layout) -> None:
    networks = small_networks(data.tokenizer, layout)
    networks.pipeline(build_kl((8, 8, 8)), data.tokenizer).save_pretrained(tmp_path / "teacher")
    teacher = open_teacher(str(tmp_path / "teacher"), {})
    batches = PaintedBatches(data, teacher.load_encoders(CPU))
    unet, diffusion = teacher.load_unet(CPU, torch.float32), teacher.build_diffusion(CPU)
    training = StyleTraining(unet, diffusion, batches, tmp_path / "run", settings(40, rate=1e-2))
    training.trainer.fit(on_one_batch(training), on_save=training.save)
    assert_lower(tmp_path / "run", 0.9)
    saved = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert any(name.startswith("unet.conv_out.lora_B") and weight.any() for name, weight in saved.items())
