"""Which files of a repository are taken: names in, names out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.catalog import LoraSpec, Range, StyleLora
from models.hub.needs import Selection, need_of, needs_of, select
from tests.small_models import small_spec

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "requires_safety_checker": True,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SMALL = {
    "model_index.json",
    "feature_extractor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
}
SAFETY = {
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
}
UNWANTED = {
    ".gitattributes",
    "README.md",
    "v1-5-pruned.safetensors",
    "v1-5-pruned.ckpt",
    "image_encoder/config.json",
    "image_encoder/model.safetensors",
    "safety_checker/pytorch_model.bin",
    "text_encoder/pytorch_model.bin",
    "unet/.cache.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/onnx/model.safetensors",
    "tokenizer/tokenizer.ckpt",
}
PLAIN = {
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
}
FP16 = {"text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"}
EVERYTHING = SMALL | SAFETY | UNWANTED | PLAIN | FP16


def take(tmp_path: Path, part: str, names: set[str], files: dict[str, Any] | None = None, **changes: Any) -> Selection:
    texts = {"model_index.json": INDEX} | (files or {})
    spec = small_spec(tmp_path, **({"source": "acme/sd", "lora": None} | changes))
    return select(need_of(spec, part), names, lambda name: json.dumps(texts[name]).encode() if name in texts else None)


@pytest.fixture
def tmp(tmp_path: Path) -> Path:
    """Where `small_spec` finds that there is nothing to make."""
    (tmp_path / "sd").mkdir()
    return tmp_path


def test_a_pipeline_takes_plain_weights(tmp: Path) -> None:
    assert take(tmp, "source", EVERYTHING) == Selection(frozenset(SMALL | PLAIN))


def test_the_variant_is_taken_where_a_network_has_one(tmp: Path) -> None:
    selection = take(tmp, "source", EVERYTHING, variant="fp16")
    assert selection == Selection(frozenset(SMALL | FP16 | {"vae/diffusion_pytorch_model.safetensors"}))


def test_what_the_entry_replaces_is_left_out(tmp: Path) -> None:
    selection = take(tmp, "source", EVERYTHING, unet="acme/unet", vae="acme/vae")
    without = {name for name in SMALL | PLAIN if not name.startswith(("unet/", "vae/"))}
    assert selection == Selection(frozenset(without))


def test_the_configs_of_a_single_file(tmp: Path) -> None:
    selection = take(tmp, "config", EVERYTHING, source="/models/one.safetensors", config="acme/sd")
    assert selection == Selection(frozenset(SMALL))


def test_the_safety_checker_is_two_folders(tmp: Path) -> None:
    selection = take(tmp, "safety_checker", EVERYTHING, safety_checker="acme/sd", variant="fp16")
    assert selection == Selection(frozenset(SAFETY))


@pytest.mark.parametrize("infix", ["", ".fp16"])
def test_sharded_weights_with_their_index(tmp: Path, infix: str) -> None:
    index = f"unet/diffusion_pytorch_model.safetensors.index{infix}.json"
    shards = {f"unet/diffusion_pytorch_model{infix}-0000{number}-of-00002.safetensors" for number in (1, 2)}
    unsharded = {name for name in EVERYTHING if not name.startswith("unet/diffusion")}
    weight_map = {"weight_map": {shard: shard.removeprefix("unet/") for shard in shards}}
    selection = take(tmp, "source", unsharded | shards | {index}, {index: weight_map}, variant=infix[1:] or None)
    assert {name for name in selection.names if name.startswith("unet/")} == shards | {index, "unet/config.json"}
    assert selection.lacking == ()
    first = min(shards)
    partial = take(
        tmp, "source", unsharded | shards - {first} | {index}, {index: weight_map}, variant=infix[1:] or None
    )
    assert partial.lacking == (first,)


@pytest.mark.parametrize(("part", "folder"), [("unet", ""), ("unet", "unet"), ("vae", ""), ("tiny_vae", "vae")])
def test_a_single_network_at_the_root_or_in_its_folder(tmp: Path, part: str, folder: str) -> None:
    prefix = f"{folder}/" if folder else ""
    wanted = {f"{prefix}config.json", f"{prefix}diffusion_pytorch_model.fp16.safetensors"}
    others = {f"{prefix}diffusion_pytorch_model.safetensors", f"{prefix}diffusion_pytorch_model.bin", "README.md"}
    selection = take(tmp, part, wanted | others, None, variant="fp16", **{part: "acme/network"})
    assert selection == Selection(frozenset(wanted), folder=folder)


def test_of_a_lora_only_its_weights(tmp: Path) -> None:
    lora = LoraSpec(source="acme/lora", weight_name="pixel.safetensors")
    names = {"pixel.safetensors", "other.safetensors", "README.md"}
    assert take(tmp, "lora", names, lora=lora) == Selection(frozenset({"pixel.safetensors"}))
    (lacking,) = take(tmp, "lora", names - {"pixel.safetensors"}, lora=lora).lacking
    assert lacking == "pixel.safetensors (it has other.safetensors)"


@pytest.mark.parametrize(
    ("gone", "lacking"),
    [
        ("model_index.json", "model_index.json"),
        ("vae/config.json", "vae/config.json"),
        ("tokenizer/", "tokenizer/*.json"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/*.safetensors"),
        (
            "unet/diffusion_pytorch_model.safetensors",
            "unet/*.safetensors (only unet/diffusion_pytorch_model.bin, a pickle, which is never loaded)",
        ),
    ],
)
def test_what_a_repository_lacks_is_named(tmp: Path, gone: str, lacking: str) -> None:
    names = {name for name in EVERYTHING - FP16 if not name.startswith(gone)}
    assert take(tmp, "source", names).lacking == (lacking,)


def test_an_index_that_is_no_json(tmp: Path) -> None:
    need = need_of(small_spec(tmp, source="acme/sd"), "source")
    assert select(need, EVERYTHING, lambda _: b"<html>").lacking == ("model_index.json",)


def test_every_part_that_the_entry_names_and_its_revision(tmp: Path) -> None:
    style = StyleLora(
        name="pixel",
        description="d",
        source="acme/pixel",
        models=["small"],
        weight=Range(default=1, min=0, max=1),
        license="MIT",
    )
    spec = small_spec(
        tmp,
        source="acme/sd",
        revision="v1",
        variant="fp16",
        vae="acme/vae",
        tiny_vae=None,
        safety_checker="acme/sd",
        lora=LoraSpec(source="acme/lora"),
        loras={"pixel": style},
    )
    needs = {need.part: (need.source, need.revision, need.variant) for need in needs_of(spec)}
    assert needs == {
        "source": ("acme/sd", "v1", "fp16"),
        "vae": ("acme/vae", None, "fp16"),
        "safety_checker": ("acme/sd", "v1", "fp16"),
        "lora": ("acme/lora", None, None),
        "loras.pixel": ("acme/pixel", None, None),
    }
