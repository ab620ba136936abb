"""The whole recipe, a few steps of each stage: every folder that ships loads and draws."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
)
from safetensors.torch import load_file

from models.training.errors import TrainingError
from models.training.mini.export import CARDS
from models.training.mini.recipe import Recipe
from models.training.mini.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def recipe(shapes: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    out = tmp_path_factory.mktemp("recipe")
    recipe = Recipe(out / "runs", shapes, share=1e-4, bundled=out / "bundled")
    for stage in recipe.stages.values():
        stage()
    return recipe


@pytest.mark.parametrize("name", ["mini-sd", "mini-sdxl", "mini-lcm-full"])
def test_each_model_that_ships_loads_in_diffusers_and_draws(recipe: Recipe, name: str) -> None:
    pipeline = AutoPipelineForText2Image.from_pretrained(recipe.bundled / name, variant="fp16", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    (picture,) = pipeline("a red star", num_inference_steps=2, output_type="np").images
    assert picture.shape == (64, 64, 3)
    weights = load_file(recipe.bundled / name / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    card = (recipe.bundled / name / "README.md").read_text(encoding="utf-8")
    assert card == (CARDS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["mini-lcm-lora", "mini-neon", "mini-sketch", "mini-turbo-lora"])
def test_each_lora_that_ships_loads_in_diffusers(recipe: Recipe, name: str) -> None:
    base = recipe.bundled / ("mini-sdxl" if "turbo" in name else "mini-sd")
    pipeline = DiffusionPipeline.from_pretrained(base, variant="fp16", dtype=torch.float32)
    pipeline.load_lora_weights(recipe.bundled / name)
    pipeline.fuse_lora()
    assert {
        weight.dtype for weight in load_file(recipe.bundled / name / "pytorch_lora_weights.safetensors").values()
    } == {torch.float16}


def test_the_scheduler_says_with_how_many_timesteps_it_was_distilled(recipe: Recipe) -> None:
    predictions = {"mini-lcm-lora": "v_prediction", "mini-lcm-full/scheduler": "epsilon"}
    for folder, prediction_type in predictions.items():
        config = LCMScheduler.from_pretrained(recipe.bundled / folder).config
        assert (config.original_inference_steps, config.prediction_type) == (20, prediction_type)


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
    # Autoencoders; latents of the world and of two styles; two teachers, each warmed up; LCMs; features, Turbo; styles.
    assert len(written) == 2 + 3 + 4 + 2 + 2 + 2
    for name in ("latents", "teacher", "lcm", "styles"):
        recipe.stages[name]()
    assert {path: path.stat().st_mtime_ns for path in files} == written
