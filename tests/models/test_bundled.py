"""The shipped miniatures: they load in plain diffusers, LoRAs fuse, and few steps draw what the prompt says."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from models.catalog import load_catalog
from models.training.mini.dataset import Pixels
from models.training.mini.export import CARDS
from models.training.mini.recognizer import ColorNamer, Recognizer, look_distance
from models.training.mini.reference import Reference, load_reference
from models.training.mini.restyling import STYLES

BUNDLED = Path(__file__).parents[2] / "models" / "bundled"
HALF: dict[str, Any] = {"variant": "fp16", "dtype": torch.float32}  # of the file, and of the network

PROMPTS = [
    ("red apple", "blue"), ("dog", "pink"), ("cat", "teal"), ("banana", "purple"), ("rocket", "white"),
    ("sunflower", "blue"), ("pizza", "green"), ("panda", "yellow"), ("frog", "orange"), ("crown", "black"),
    ("strawberry", "white"), ("penguin", "yellow"), ("cactus", "orange"), ("car", "gray"), ("robot", "green"),
    ("octopus", "teal"), ("house", "purple"), ("guitar", "white"), ("balloon", "teal"), ("lion", "green"),
    ("watermelon", "brown"), ("unicorn", "orange"), ("light bulb", "red"), ("green star", "pink"),
]  # fmt: skip


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(BUNDLED / "mini-sd", **HALF)
    pipeline.load_lora_weights(BUNDLED / "mini-lcm-lora")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.scheduler = LCMScheduler.from_pretrained(BUNDLED / "mini-lcm-lora")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def reference() -> Reference:
    return load_reference(BUNDLED / "mini-sd" / "reference")


def generate(pipeline: DiffusionPipeline, prompts: list[str], steps: int = 4, guidance: float = 0) -> list[Pixels]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    output = pipeline(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=generators)
    return [np.asarray(image) for image in output.images]


def assert_draws_things_and_backgrounds(
    pipeline: DiffusionPipeline, reference: Reference, steps: int, guidance: float, least: float = 0.9
) -> None:
    pictures = generate(pipeline, [f"a {name} on a {color} background" for name, color in PROMPTS], steps, guidance)
    recognizer, namer = Recognizer(reference.drawings), ColorNamer(list(reference.colors.values()))
    colors = list(reference.colors)
    things = [recognizer.single(picture) for picture in pictures]
    right_things = [
        thing is not None and name in reference.names[thing] for thing, (name, _) in zip(things, PROMPTS, strict=True)
    ]
    right_colors = [colors[namer.name(picture)] == color for picture, (_, color) in zip(pictures, PROMPTS, strict=True)]
    assert np.mean(right_things) >= least
    assert np.mean(right_colors) >= 0.95


def test_four_steps_draw_the_thing_and_the_background(pipeline: StableDiffusionPipeline, reference: Reference) -> None:
    assert_draws_things_and_backgrounds(pipeline, reference, steps=4, guidance=0)


def test_the_teacher_in_sdxls_layout_does_so_with_guidance(reference: Reference) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(BUNDLED / "mini-sdxl", **HALF)
    pipeline.set_progress_bar_config(disable=True)
    assert_draws_things_and_backgrounds(pipeline, reference, steps=8, guidance=3)


def test_the_full_lcm_does_so_with_guidance_as_an_input(reference: Reference) -> None:
    unet = UNet2DConditionModel.from_pretrained(BUNDLED / "mini-lcm-full", **HALF)
    pipeline = StableDiffusionXLPipeline.from_pretrained(BUNDLED / "mini-sdxl", unet=unet, **HALF)
    pipeline.scheduler = LCMScheduler.from_pretrained(BUNDLED / "mini-lcm-full")
    pipeline.set_progress_bar_config(disable=True)
    assert_draws_things_and_backgrounds(pipeline, reference, steps=4, guidance=3, least=0.85)


def test_turbo_does_so_in_one_step(reference: Reference) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(BUNDLED / "mini-sdxl", **HALF)
    pipeline.load_lora_weights(BUNDLED / "mini-turbo-lora")
    pipeline.fuse_lora()
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_pretrained(BUNDLED / "mini-turbo-lora")
    pipeline.set_progress_bar_config(disable=True)
    assert_draws_things_and_backgrounds(pipeline, reference, steps=1, guidance=0, least=0.85)


PAIRS = [
    ("red apple", "banana", "white"), ("frog", "fox", "pink"), ("penguin", "pizza", "blue"),
    ("rocket", "cactus", "gray"), ("panda", "strawberry", "green"), ("house", "car", "yellow"),
    ("crown", "octopus", "black"), ("lion", "robot", "teal"),
]  # fmt: skip


@pytest.mark.parametrize("is_column", [False, True])
def test_two_things_come_to_their_places(
    pipeline: StableDiffusionPipeline, reference: Reference, is_column: bool
) -> None:
    asked = PAIRS * 3  # each with three seeds
    where = "above" if is_column else "next to"
    pictures = generate(pipeline, [f"a {one} {where} a {other} on a {color} background" for one, other, color in asked])
    recognizer = Recognizer(reference.drawings)
    right = [
        thing is not None and name in reference.names[thing]
        for picture, (one, other, _) in zip(pictures, asked, strict=True)
        for thing, name in zip(recognizer.pair(picture, vertical=is_column), (one, other), strict=True)
    ]
    assert np.mean(right) >= 0.75


def test_capitals_change_nothing(pipeline: StableDiffusionPipeline) -> None:
    lower, upper = (generate(pipeline, [prompt])[0] for prompt in ("a red apple", "A Red Apple"))
    assert np.array_equal(lower, upper)


def test_the_tiny_decoder_reads_the_same_latents(pipeline: StableDiffusionPipeline) -> None:
    tiny = AutoencoderTiny.from_pretrained(BUNDLED / "mini-taesd", **HALF)
    latents = pipeline(
        ["a red apple on a blue background"],
        num_inference_steps=4,
        guidance_scale=0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    with torch.no_grad():
        full = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
        quick = tiny.decode(latents).sample.clamp(-1, 1)
    assert (full - quick).abs().mean() < 0.1


@pytest.mark.parametrize("style", STYLES)
def test_a_style_lora_on_the_fused_lcm_lora_draws_its_style_in_four_steps(
    pipeline: StableDiffusionPipeline, style: str
) -> None:
    prompts = [f"a {name} on a {color} background" for name, color in PROMPTS]
    plain = generate(pipeline, prompts)
    goal = [STYLES[style](picture) for picture in plain]
    pipeline.load_lora_weights(BUNDLED / f"mini-{style}", adapter_name=style)
    try:
        pictures = {}
        for weight in (0.5, 1.0):
            pipeline.set_adapters(style, weight)
            pictures[weight] = generate(pipeline, prompts)
    finally:
        pipeline.unload_lora_weights()
    whole_way = look_distance(plain, goal)
    assert look_distance(pictures[1.0], goal) < 0.35 * whole_way
    assert look_distance(pictures[0.5], goal) < 0.8 * whole_way
    assert np.array_equal(np.stack(generate(pipeline, prompts)), np.stack(plain))


@pytest.mark.parametrize("style", STYLES)
def test_a_style_lora_is_small(style: str) -> None:
    assert (BUNDLED / f"mini-{style}" / "pytorch_lora_weights.safetensors").stat().st_size < 600_000


def test_loading_and_fusing_warns_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline = StableDiffusionPipeline.from_pretrained(BUNDLED / "mini-sd", **HALF)
        pipeline.load_lora_weights(BUNDLED / "mini-lcm-lora")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    assert not [str(warning.message) for warning in caught if "key" in str(warning.message)]
    assert {parameter.dtype for parameter in pipeline.text_encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize(("folder", "model"), [("mini-lcm-lora", "mini-lcm"), ("mini-lcm-full", "mini-lcm-full")])
def test_the_scheduler_that_ships_is_the_catalogs(folder: str, model: str) -> None:
    config, spec = json.loads((BUNDLED / folder / "scheduler_config.json").read_text()), load_catalog()[model]
    assert config["_class_name"] == spec.schedulers["lcm"].class_name == "LCMScheduler"
    assert config["original_inference_steps"] == spec.schedulers["lcm"].config["original_inference_steps"]
    assert config["original_inference_steps"] == spec.num_inference_steps.max
    assert config["prediction_type"] == "v_prediction"
    assert config["rescale_betas_zero_snr"] is True


def test_all_files_together_stay_under_forty_megabytes() -> None:
    sizes = [path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(sizes) < 40_000_000
    assert {folder.name for folder in BUNDLED.iterdir()} == {card.stem for card in CARDS.iterdir()}
    assert all((folder / "README.md").exists() for folder in BUNDLED.iterdir())


def test_no_config_keeps_what_the_machine_or_the_last_call_left() -> None:
    tables = {path: json.loads(path.read_text(encoding="utf-8")) for path in BUNDLED.rglob("*.json")}
    assert not [path for path, table in tables.items() if isinstance(table, dict) and "_name_or_path" in table]
    tokenizers = [table for path, table in tables.items() if path.name == "tokenizer.json"]
    assert len(tokenizers) == 3
    assert all((tokenizer["truncation"], tokenizer["padding"]) == (None, None) for tokenizer in tokenizers)
