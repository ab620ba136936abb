"""The whole recipe, a few steps of each stage: every folder that ships loads and draws."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file

from models.training.errors import TrainingError
from models.training.mini.export import CARDS
from models.training.mini.recipe import LCM, LCM_FULL, Recipe
from models.training.mini.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def recipe(shapes: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    out = tmp_path_factory.mktemp("recipe")
    recipe = Recipe(out / "runs", shapes, share=1e-4, bundled=out / "bundled")
    for stage in recipe.stages.values():
        stage()
    return recipe


def load(folder: Path, **others: Any) -> Any:
    pipeline = AutoPipelineForText2Image.from_pretrained(folder, variant="fp16", dtype=torch.float32, **others)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_draws(pipeline: Any) -> None:
    (picture,) = pipeline("a red star", num_inference_steps=2, output_type="np").images
    assert picture.shape == (64, 64, 3)


def assert_in_half_precision(weights: Path) -> None:
    assert {weight.dtype for weight in load_file(weights).values()} == {torch.float16}


@pytest.mark.parametrize("name", ["mini-sd", "mini-sdxl"])
def test_each_model_that_ships_loads_in_diffusers_and_draws(recipe: Recipe, name: str) -> None:
    assert_draws(load(recipe.bundled / name))
    assert_in_half_precision(recipe.bundled / name / "unet" / "diffusion_pytorch_model.fp16.safetensors")


def test_the_full_lcm_draws_with_the_rest_of_its_teacher(recipe: Recipe) -> None:
    folder = recipe.bundled / "mini-lcm-full"
    unet = UNet2DConditionModel.from_pretrained(folder, variant="fp16", dtype=torch.float32)
    assert unet.config.time_cond_proj_dim
    pipeline = load(recipe.bundled / "mini-sdxl", unet=unet)
    pipeline.scheduler = LCMScheduler.from_pretrained(folder)
    assert_draws(pipeline)
    assert_in_half_precision(folder / "diffusion_pytorch_model.fp16.safetensors")


def test_no_tokenizer_keeps_the_padding_of_its_last_call(recipe: Recipe) -> None:
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in recipe.bundled.rglob("tokenizer.json")]
    assert [(table["truncation"], table["padding"]) for table in tables] == [(None, None)] * 3


def test_whatever_ships_has_its_card(recipe: Recipe) -> None:
    folders = {folder.name: folder for folder in recipe.bundled.iterdir()}
    assert folders.keys() == {card.stem for card in CARDS.iterdir()}
    for name, folder in folders.items():
        assert (folder / "README.md").read_text(encoding="utf-8") == (CARDS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["mini-lcm-lora", "mini-neon", "mini-sketch", "mini-turbo-lora"])
def test_each_lora_that_ships_loads_in_diffusers(recipe: Recipe, name: str) -> None:
    base = recipe.bundled / ("mini-sdxl" if "turbo" in name else "mini-sd")
    pipeline = DiffusionPipeline.from_pretrained(base, variant="fp16", dtype=torch.float32)
    pipeline.load_lora_weights(recipe.bundled / name)
    pipeline.fuse_lora()
    assert_in_half_precision(recipe.bundled / name / "pytorch_lora_weights.safetensors")


def test_the_scheduler_says_with_how_many_timesteps_it_was_distilled(recipe: Recipe) -> None:
    for name, lcm in (("mini-lcm-lora", LCM), ("mini-lcm-full", LCM_FULL)):
        config = LCMScheduler.from_pretrained(recipe.bundled / name).config
        assert (config.original_inference_steps, config.prediction_type) == (lcm.solver_timesteps, "v_prediction")


def test_turbos_scheduler_ends_at_the_last_timesteps_of_training(recipe: Recipe) -> None:
    scheduler = EulerAncestralDiscreteScheduler.from_pretrained(recipe.bundled / "mini-turbo-lora")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_export_ships_what_was_made_so_far(recipe: Recipe, tmp_path: Path) -> None:
    half = Recipe(tmp_path / "runs", recipe.vocabulary, bundled=tmp_path / "bundled")
    with pytest.raises(TrainingError, match="has nothing to export"):
        half.export()
    shutil.copytree(recipe.out / "lcm", half.out / "lcm")
    half.export()
    assert [folder.name for folder in half.bundled.iterdir()] == ["mini-lcm-lora"]
    assert (half.bundled / "mini-lcm-lora" / "scheduler_config.json").exists()


def test_going_on_from_finished_models_keeps_their_latents(recipe: Recipe, tmp_path: Path) -> None:
    more = Recipe(tmp_path / "runs", recipe.vocabulary, share=5e-3, start=recipe.bundled)
    more.autoencoder()
    before = AutoencoderKL.from_pretrained(recipe.bundled / "mini-sd", subfolder="vae", variant="fp16").state_dict()
    after = AutoencoderKL.from_pretrained(more.out / "autoencoder" / "vae").state_dict()
    changed = {name.partition(".")[0] for name in after if not torch.equal(before[name].float(), after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_stages_that_are_done_do_nothing(recipe: Recipe) -> None:
    files = [*recipe.out.rglob("checkpoint.pt"), *recipe.out.rglob("latents.safetensors")]
    written = {path: path.stat().st_mtime_ns for path in files}
    # Autoencoders; latents of the world and of two styles; a teacher and its warm-up; another; LCMs; features; Turbo;
    # styles.
    assert len(written) == 2 + 3 + 2 + 1 + 3 + 1 + 3 + 2
    for name in ("latents", "teacher", "lcm", "styles"):
        recipe.stages[name]()
    assert {path: path.stat().st_mtime_ns for path in files} == written
