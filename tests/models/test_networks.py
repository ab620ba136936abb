"""Each network is in memory once, however many models use it."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from models.catalog import LoraSpec, ModelSpec
from models.hub.lockfile import LOCK_FILE
from models.loading import _Loader, load_pipeline
from models.networks import LoadError, Networks, weight_files
from tests.small_models import make_lora_folder, make_sd_folder, small_spec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return small_spec(tmp_path_factory.mktemp("small"))


def load_pipe(spec: ModelSpec, networks: Networks, dtype: torch.dtype = torch.float32) -> Any:
    return _Loader(spec, CPU, dtype, networks, LOCK_FILE).pipe()


def parts(pipe: Any) -> tuple[Any, Any, Any]:
    return pipe.unet, pipe.vae, pipe.text_encoder


def test_two_models_share_all_that_is_the_same(spec: ModelSpec) -> None:
    networks, plain = Networks(), spec.model_copy(update={"lora": None})
    one, other = (load_pipe(spec, networks) for spec in (plain, plain.model_copy(update={"name": "other"})))
    for mine, theirs in zip(parts(one), parts(other), strict=True):
        assert mine is theirs


def test_a_fused_lora_is_nobody_elses(spec: ModelSpec) -> None:
    networks = Networks()
    fused, plain = load_pipe(spec, networks), load_pipe(spec.model_copy(update={"lora": None}), networks)
    assert fused.unet is not plain.unet
    assert fused.vae is plain.vae
    assert fused.text_encoder is plain.text_encoder
    alone = load_pipe(spec.model_copy(update={"lora": None}), Networks())
    for mine, theirs in zip(plain.unet.parameters(), alone.unet.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_fused_lora_of_the_text_encoder_is_nobody_elses(spec: ModelSpec, tmp_path: Path) -> None:
    networks, plain = Networks(), spec.model_copy(update={"lora": None})
    pipe = load_pipe(plain, Networks())
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    layers = get_peft_model_state_dict(pipe.text_encoder)
    pipe.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    fused = load_pipe(spec.model_copy(update={"lora": LoraSpec(source=str(tmp_path))}), networks)
    assert fused.text_encoder is not load_pipe(plain, networks).text_encoder


def test_the_same_bytes_in_another_place_are_not_assumed(spec: ModelSpec, tmp_path: Path) -> None:
    """Only the Hub's cache names files by their content; elsewhere that would take a read of all of them."""
    shutil.copytree(spec.source, tmp_path / "sd")
    networks, plain = Networks(), spec.model_copy(update={"lora": None})
    copy = load_pipe(plain.model_copy(update={"source": str(tmp_path / "sd")}), networks)
    assert copy.vae is not load_pipe(plain, networks).vae


def test_files_that_have_changed_are_read_again(tmp_path: Path) -> None:
    networks = Networks()
    make_sd_folder(tmp_path / "sd")
    first = networks.load("AutoencoderKL", tmp_path / "sd" / "vae", CPU, torch.float32)
    make_sd_folder(tmp_path / "sd", time_cond_proj_dim=32)
    assert networks.load("AutoencoderKL", tmp_path / "sd" / "vae", CPU, torch.float32) is not first


def test_another_dtype_is_another_network(spec: ModelSpec) -> None:
    networks = Networks()
    half, full = load_pipe(spec, networks, torch.bfloat16), load_pipe(spec, networks, torch.float32)
    assert (half.vae.dtype, full.vae.dtype) == (torch.bfloat16, torch.float32)


def test_what_nobody_holds_is_gone(spec: ModelSpec) -> None:
    networks = Networks()
    pipeline = load_pipeline(spec, CPU, torch.float32, networks=networks)
    held = [weakref.ref(network) for network in networks._loaded.values()]
    assert len(held) == 3  # VAE, tiny VAE, text encoder; the UNet with the fused LoRA is its pipeline's own
    del pipeline
    gc.collect()
    assert [reference() for reference in held] == [None] * 3


def test_weight_files_of_a_variant(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"):
        (tmp_path / name).touch()
    assert [path.name for path in weight_files(tmp_path, None)] == ["model.safetensors"]
    assert len(weight_files(tmp_path, "fp16")) == 2
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"weights of a variant only \(model\.fp16-00001"):
        weight_files(tmp_path, None)


def test_a_lora_folder_is_no_network(spec: ModelSpec, tmp_path: Path) -> None:
    make_lora_folder(tmp_path, Path(spec.source))
    with pytest.raises(LoadError, match="can't load AutoencoderKL"):
        Networks().load("AutoencoderKL", tmp_path, CPU, torch.float32)
