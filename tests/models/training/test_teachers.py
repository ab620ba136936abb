"""Teachers from folders and catalog entries: what they tell a UNet, and what is no teacher."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from models.catalog import ModelSpec
from models.loading import LoadError, load_diffusers
from models.training.errors import TeacherError
from models.training.teachers import Conditions, Layout, Teacher, call_unet, open_teacher
from tests.small_models import make_sd_folder, small_lcm_spec, small_sd_turbo_spec, small_sdxl_spec, small_spec
from tests.training_data import CPU, KINDS, Kind, change_config, make_teacher

PROMPTS = ["a red apple", "one two"]


@pytest.fixture
def own_folder(root: Path, tmp_path: Path) -> Path:
    """A teacher that a test may damage."""
    make_teacher(root, "sd")
    shutil.copytree(root / "sd", tmp_path / "sd")
    return tmp_path / "sd"


@pytest.mark.parametrize("kind", KINDS)
def test_layout_size_and_prediction_are_the_folders(root: Path, kind: Kind) -> None:
    teacher = make_teacher(root, kind)
    assert teacher.layout == kind.removesuffix("-v")
    assert teacher.default_size == (32, 32)
    prediction = "v_prediction" if kind == "sd-v" else "epsilon"
    assert teacher.build_diffusion(CPU).prediction_type == prediction


def test_a_network_is_told_what_diffusers_tells_it_in_stable_diffusion(root: Path) -> None:
    teacher = make_teacher(root, "sd")
    pipe = load_diffusers(small_spec(root, source=str(root / "sd"), lora=None), CPU, torch.float32)
    theirs, _ = pipe.encode_prompt(PROMPTS, CPU, 1, False)
    ours = teacher.load_encoders(CPU).encode_captions(PROMPTS)
    assert torch.equal(ours.states, theirs)
    assert ours.pooled is None


@pytest.mark.parametrize("zeros", [True, False])
def test_a_network_is_told_what_diffusers_tells_it_in_sdxl(root: Path, tmp_path: Path, zeros: bool) -> None:
    make_teacher(root, "sdxl")
    folder = shutil.copytree(root / "sdxl", tmp_path / "sdxl")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    spec = small_sdxl_spec(tmp_path, source=str(folder))
    pipe = load_diffusers(spec, CPU, torch.float32)
    theirs, nothing, pooled, pooled_nothing = pipe.encode_prompt(PROMPTS, device=CPU, do_classifier_free_guidance=True)
    ours = open_teacher(str(folder), {}).load_encoders(CPU).encode_captions([*PROMPTS, None])
    assert ours.pooled is not None
    assert torch.equal(ours.states, torch.cat([theirs, nothing[:1]]))
    assert torch.equal(ours.pooled, torch.cat([pooled, pooled_nothing[:1]]))
    assert bool(ours.states[2].any()) is not zeros


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_encoded_as_the_network_sees_them(root: Path, kind: Kind) -> None:
    encoders = make_teacher(root, kind).load_encoders(CPU)
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, std = encoders.encode_pictures(pixels)
    theirs = encoders.vae.encode(pixels).latent_dist
    assert mean.shape == (2, 4, 8, 12)
    assert torch.equal(mean, theirs.mean * 0.5)
    assert torch.equal(std, theirs.std * 0.5)


def test_rows_of_no_caption_keep_the_size_of_their_pictures(root: Path) -> None:
    teacher = make_teacher(root, "sdxl")
    encoders = teacher.load_encoders(CPU)
    time_ids = encoders.plain_time_ids(torch.zeros(2, 4, 8, 12))
    assert time_ids is not None
    assert time_ids.tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    rows = encoders.encode_captions(PROMPTS).with_time_ids(time_ids)
    both = Conditions.stack([rows, encoders.encode_captions([None]).spread_over(rows)])
    assert (len(both), both.time_ids.shape if both.time_ids is not None else None) == (4, (4, 6))
    with torch.no_grad():
        output = call_unet(teacher.load_unet(CPU, torch.float32), torch.randn(4, 4, 8, 12), torch.tensor([5] * 4), both)
    assert output.shape == (4, 4, 8, 12)


def test_an_entry_of_the_catalog_is_a_teacher_without_its_lora(root: Path, tmp_path: Path) -> None:
    make_teacher(root, "sd")
    spec = small_spec(tmp_path, source=str(root / "sd"))
    assert spec.lora is not None
    teacher = open_teacher("small", {"small": spec})
    assert teacher.name == "small"
    assert not any("lora" in name for name, _ in teacher.load_unet(CPU, torch.float32).named_modules())
    assert teacher.serving_keys == {"source": str(root / "sd")}
    assert teacher.entry["tiny_vae"] == spec.tiny_vae


def test_the_parts_that_an_entry_replaces_are_replaced(root: Path, own_folder: Path) -> None:
    make_teacher(root, "sd")
    change_config(own_folder / "vae", scaling_factor=0.25)
    spec = small_spec(root, source=str(root / "sd"), vae=str(own_folder))
    teacher = open_teacher("small", {"small": spec})
    assert teacher.load_encoders(CPU).vae.config.scaling_factor == 0.25
    assert teacher.serving_keys["vae"] == str(own_folder)


def test_weights_in_half_precision_only_are_read_and_served_so(root: Path, own_folder: Path) -> None:
    whole = make_teacher(root, "sd").load_unet(CPU, torch.float32)
    whole.half().save_pretrained(own_folder / "unet", variant="fp16")
    (own_folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    teacher = open_teacher(str(own_folder), {})
    assert torch.equal(teacher.load_unet(CPU, torch.float16).conv_in.weight, whole.conv_in.weight)
    assert teacher.serving_keys == {"variant": "fp16", "source": str(own_folder)}


@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_the_bundled_miniatures_are_teachers_wherever_they_are_installed(layout: Layout) -> None:
    teacher = open_teacher(f"bundled:mini-{layout}", {})
    assert (teacher.layout, teacher.default_size) == (layout, (64, 64))
    assert teacher.serving_keys == {"variant": "fp16", "source": f"bundled:mini-{layout}"}


def test_a_fingerprint_is_of_weights_and_not_of_places(root: Path, own_folder: Path) -> None:
    teacher, copy = make_teacher(root, "sd"), open_teacher(str(own_folder), {})
    assert teacher.fingerprint_of("unet", "vae") == copy.fingerprint_of("unet", "vae")
    unet = copy.load_unet(CPU, torch.float32)
    torch.nn.init.ones_(unet.conv_in.weight)
    unet.save_pretrained(own_folder / "unet")
    assert teacher.fingerprint_of("unet") != copy.fingerprint_of("unet")
    assert teacher.fingerprint_of("vae") == copy.fingerprint_of("vae")


def assert_no_teacher(name: str, reason: str, **catalog: ModelSpec) -> None:
    with pytest.raises(TeacherError, match=f"^{re.escape(name)}.*{reason}"):
        open_teacher(name, catalog)


def test_neither_a_folder_nor_an_entry(root: Path) -> None:
    assert_no_teacher("nowhere", "no such folder, and the catalog has only small", small=small_spec(root))


def test_a_folder_of_another_layout(own_folder: Path) -> None:
    index = json.loads((own_folder / "model_index.json").read_text())
    del index["text_encoder"]
    (own_folder / "model_index.json").write_text(json.dumps(index))
    reason = r"has unet \(UNet2DConditionModel\), vae \(AutoencoderKL\); Stable Diffusion is made of text_encoder"
    assert_no_teacher(str(own_folder), reason)


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("unet", {"in_channels": 9}, "takes 9 channels as for inpainting; text to image takes 4"),
        ("unet", {"in_channels": 8}, "takes 8 channels; text to image takes 4"),
        ("unet", {"time_cond_proj_dim": 256}, "a few-step model itself: its UNet has time_cond_proj_dim"),
        ("unet", {"addition_embed_type": "text"}, "addition_embed_type of its UNet is 'text'; .* it is None"),
        ("scheduler", {"beta_schedule": None, "trained_betas": None}, "its DDIMScheduler has no beta_schedule"),
        ("scheduler", {"prediction_type": "flow"}, "'flow' is none of epsilon, v_prediction, sample"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "the last timestep is pure noise"),
    ],
)
def test_a_model_that_cannot_be_distilled(own_folder: Path, part: str, changes: dict[str, object], reason: str) -> None:
    change_config(own_folder / part, **changes)
    assert_no_teacher(str(own_folder), reason)


def test_few_step_entries_are_no_teachers(root: Path) -> None:
    assert_no_teacher("small", "guidance is 'none'", small=small_sd_turbo_spec(root))
    assert_no_teacher("small", "guidance is 'embedded'", small=small_lcm_spec(root))


def test_a_single_file_is_no_teacher(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "everything.safetensors"
    assert_no_teacher(
        "small", "is a single file", small=small_spec(root, source=str(path), config=str(root / "sd"), lora=None)
    )
    path.touch()
    assert_no_teacher(str(path), "is a single file: a teacher has to be a folder that diffusers wrote")


@pytest.mark.parametrize("missing", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_file(own_folder: Path, missing: str) -> None:
    (own_folder / missing).unlink()
    with pytest.raises(LoadError, match=f"can't read {own_folder / missing}: "):
        open_teacher(str(own_folder), {})


def test_missing_weights(own_folder: Path) -> None:
    (own_folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    teacher: Teacher = open_teacher(str(own_folder), {})
    with pytest.raises(LoadError, match=f"there are no weights in {own_folder / 'vae'}"):
        teacher.load("vae", CPU, torch.float32)


def test_missing_tokenizers(tmp_path: Path) -> None:
    make_sd_folder(tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "tokenizer")
    with pytest.raises(LoadError, match=f"can't load the tokenizers of {tmp_path / 'sd'}"):
        open_teacher(str(tmp_path / "sd"), {}).load_encoders(CPU)
