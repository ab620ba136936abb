"""Verdicts on pictures, held against those of diffusers' own pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from models.catalog import ModelSpec
from models.loading import LoadError, load_pipeline
from tests.small_models import make_safety_folder, small_spec

CPU = torch.device("cpu")
Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    root: Path = tmp_path_factory.mktemp("small")
    return small_spec(root, lora=None)


@pytest.fixture(scope="module")
def images() -> Images:
    """Colours, gradients and noise, 40x32."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (20, 32, 40, 3))
    colours = rng.integers(0, 256, (20, 1, 1, 3)) * np.linspace(0.2, 1, 40)[None, None, :, None]
    return np.concatenate([noise, np.broadcast_to(colours, (20, 32, 40, 3))]).astype(np.uint8)


def checked(spec: ModelSpec, folder: Path, concept_threshold: float, care_threshold: float = 2.0) -> ModelSpec:
    make_safety_folder(folder, concept_threshold, care_threshold)
    return spec.model_copy(update={"safety_checker": str(folder)})


def cosines(folder: Path, images: Images) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of each picture with the nearest concept, and with the nearest one that asks for special care."""
    checker = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")
    pixels = CLIPImageProcessor.from_pretrained(folder / "feature_extractor")(list(images), return_tensors="pt")
    with torch.no_grad():
        embeds = checker.visual_projection(checker.vision_model(pixels.pixel_values)[1])
        concepts, care = (cosine_distance(embeds, e) for e in (checker.concept_embeds, checker.special_care_embeds))
    return concepts.amax(1).numpy(), care.amax(1).numpy()


def ask_diffusers(spec: ModelSpec, images: Images, dtype: torch.dtype) -> list[bool]:
    """Its pipeline gets pictures as its decoder would give them."""
    assert spec.safety_checker is not None
    parts: dict[str, Any] = {
        "safety_checker": StableDiffusionSafetyChecker.from_pretrained(spec.safety_checker, subfolder="safety_checker"),
        "feature_extractor": CLIPImageProcessor.from_pretrained(spec.safety_checker, subfolder="feature_extractor"),
    }
    pipe = StableDiffusionPipeline.from_pretrained(spec.source, **parts).to(dtype)
    decoded = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    _, verdicts = pipe.run_safety_checker(decoded, CPU, dtype)
    return list(verdicts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verdicts_are_those_of_diffusers(spec: ModelSpec, images: Images, tmp_path: Path, dtype: torch.dtype) -> None:
    """With thresholds in the midst of the pictures' cosines, some of which need special care."""
    make_safety_folder(tmp_path, 2)
    concepts, care = cosines(tmp_path, images)
    half = checked(spec, tmp_path, float(np.median(concepts)) + 0.004, float(np.median(care)))
    verdicts = load_pipeline(half, CPU, dtype).check(list(images))
    assert verdicts == ask_diffusers(half, images, dtype)
    assert 5 < sum(verdicts) < 35
    if dtype == torch.float32:
        above = concepts > np.median(concepts) + 0.0045
        assert (np.array(verdicts) != above).any(), "special care must have decided some"


@pytest.mark.parametrize(("threshold", "is_blocked"), [(2.0, False), (-2.0, True)])
def test_all_or_nothing(spec: ModelSpec, images: Images, tmp_path: Path, threshold: float, is_blocked: bool) -> None:
    pipeline = load_pipeline(checked(spec, tmp_path, threshold), CPU, torch.float32)
    mixed = [images[0], images[0][:24], images[39]]
    assert pipeline.check(mixed) == [is_blocked] * 3


def test_a_score_that_is_not_a_number_is_no_clean_bill(spec: ModelSpec, images: Images, tmp_path: Path) -> None:
    pipeline = load_pipeline(checked(spec, tmp_path, float("nan")), CPU, torch.float32)
    assert pipeline.check(list(images[:2])) == [True, True]


def test_published_files_name_their_weights_in_another_way(spec: ModelSpec, images: Images, tmp_path: Path) -> None:
    half = checked(spec, tmp_path, 0.3)
    expected = load_pipeline(half, CPU, torch.float32).check(list(images))
    path = tmp_path / "safety_checker" / "model.safetensors"
    weights = {name.replace("vision_model.", "vision_model.vision_model."): w for name, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    assert load_pipeline(half, CPU, torch.float32).check(list(images)) == expected


def test_a_checker_without_all_its_weights_never_serves(spec: ModelSpec, tmp_path: Path) -> None:
    broken = checked(spec, tmp_path, -2)
    path = tmp_path / "safety_checker" / "model.safetensors"
    weights = load_file(path)
    del weights["concept_embeds_weights"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"small: .*SafetyChecker.* lacks 1 weights: concept_embeds_weights"):
        load_pipeline(broken, CPU, torch.float32)


def test_a_missing_checker_is_named(spec: ModelSpec, tmp_path: Path) -> None:
    broken = checked(spec, tmp_path, 2)
    shutil.rmtree(tmp_path / "safety_checker")
    with pytest.raises(LoadError, match=rf"small: there is no folder {tmp_path}/safety_checker"):
        load_pipeline(broken, CPU, torch.float32)


def test_a_missing_feature_extractor_is_named(spec: ModelSpec, tmp_path: Path) -> None:
    broken = checked(spec, tmp_path, 2)
    shutil.rmtree(tmp_path / "feature_extractor")
    with pytest.raises(LoadError, match=rf"small: can't load CLIPImageProcessor from {tmp_path}"):
        load_pipeline(broken, CPU, torch.float32)
