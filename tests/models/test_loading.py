"""Real loading code on small folders of the same architecture."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.catalog import LoraSpec, ModelSpec, SchedulerSpec, get_spec, load_catalog
from models.loading import LoadError, load_diffusers, load_pipeline
from tests.single_file import write_single_file
from tests.small_models import small_sdxl_spec, small_spec
from tests.style_loras import Format, write_lora

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return small_spec(tmp_path_factory.mktemp("small"))


@pytest.fixture
def own_spec(spec: ModelSpec, tmp_path: Path) -> ModelSpec:
    """A copy whose files a test may damage."""
    shutil.copytree(Path(spec.source).parent, tmp_path, dirs_exist_ok=True)
    return small_spec(tmp_path)


def draw(spec: ModelSpec) -> np.ndarray:
    image = load_diffusers(spec, CPU, torch.float32)(
        "a red apple", num_inference_steps=2, guidance_scale=0, generator=torch.Generator().manual_seed(0)
    ).images[0]
    return np.asarray(image).astype(int)


def unet_file(spec: ModelSpec) -> Path:
    return next((Path(spec.source) / "unet").glob("*.safetensors"))


def test_the_lora_is_fused(spec: ModelSpec) -> None:
    without = draw(spec.model_copy(update={"lora": None}))
    assert np.abs(draw(spec) - without).max() > 5
    assert lora_layers(spec) == []


def lora_layers(spec: ModelSpec) -> list[str]:
    unet = load_diffusers(spec, CPU, torch.float32).unet
    return [name for name, _ in unet.named_modules() if "lora" in name]


def test_half_of_a_lora_is_something_else(spec: ModelSpec) -> None:
    assert spec.lora is not None
    half = spec.model_copy(update={"lora": LoraSpec(source=spec.lora.source, scale=0.5)})
    assert np.abs(draw(half) - draw(spec)).max() > 2


def test_a_variant_is_taken_where_there_is_one(own_spec: ModelSpec) -> None:
    load_diffusers(own_spec, CPU, torch.float32).save_pretrained(own_spec.source, variant="fp16")
    for path in Path(own_spec.source).rglob("*.safetensors"):
        if ".fp16." not in path.name:
            path.unlink()
    load_pipeline(own_spec.model_copy(update={"variant": "fp16", "lora": None}), CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_computes_in_one_dtype(spec: ModelSpec, dtype: torch.dtype) -> None:
    pipeline = load_pipeline(spec, CPU, dtype)
    latents = torch.randn(1, *pipeline.latent_shape(32, 32))
    (conditioning,) = pipeline.encode_prompts(["a red apple"])
    assert conditioning.encoded.dtype == dtype
    assert pipeline.predict(latents, torch.tensor([999.0]), [conditioning], torch.zeros(1)).dtype == torch.float32
    for pixels in (pipeline.decode(latents), pipeline.preview(latents)):
        assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (1, 32, 32, 3))


def test_without_a_tiny_decoder_previews_have_the_right_colours() -> None:
    """Of the bundled model's pictures, which the map was not fitted to."""
    spec = get_spec(load_catalog(), "mini-lcm").model_copy(update={"tiny_vae": None})
    pipeline = load_pipeline(spec, CPU, torch.float32)
    pipe = load_diffusers(spec, CPU, torch.float32)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    prompts = ["a red apple on a blue background", "a panda on a yellow background", "a fox on a white background"]
    latents = pipe(prompts, num_inference_steps=4, guidance_scale=0, generator=generators, output_type="latent").images
    full, preview = (images.float() for images in (pipeline.decode(latents), pipeline.preview(latents)))
    assert preview.shape == full.shape
    assert (full - preview).abs().mean() < 25
    assert (full - full.mean()).abs().mean() > 50, "a grey preview would be as near"


def test_a_missing_folder(spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoadError, match=r"small: source: there is no folder .*nowhere"):
        load_pipeline(spec.model_copy(update={"source": str(tmp_path / "nowhere")}), CPU, torch.float32)


def test_a_truncated_weight_file(own_spec: ModelSpec) -> None:
    path = unet_file(own_spec)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LoadError, match=rf"small: {path} is not a sound safetensors file"):
        load_pipeline(own_spec, CPU, torch.float32)


def test_a_missing_component(own_spec: ModelSpec) -> None:
    shutil.rmtree(Path(own_spec.source) / "vae")
    with pytest.raises(LoadError, match=r"small: there is no folder .*/sd/vae"):
        load_pipeline(own_spec, CPU, torch.float32)


def test_pickles_are_never_read(own_spec: ModelSpec) -> None:
    path = unet_file(own_spec)
    torch.save({"weight": torch.ones(1)}, path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(LoadError, match=r"small: .*\.bin is a pickle, which is never read"):
        load_pipeline(own_spec, CPU, torch.float32)


def test_a_lora_of_another_architecture(own_spec: ModelSpec) -> None:
    from safetensors.torch import load_file, save_file

    assert own_spec.lora is not None
    path = Path(own_spec.lora.source) / own_spec.lora.weight_name
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(LoadError, match="small: can't fuse the LoRA"):
        load_pipeline(own_spec, CPU, torch.float32)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("unet.", "transformer.", r"transformer\.\S+ belongs to none of unet, text_encoder"),
        ("unet.mid_block", "unet.middle", r"it is for another architecture: the model has no layer unet\.middle\.\S+"),
    ],
)
def test_a_lora_that_diffusers_would_fuse_in_part(own_spec: ModelSpec, old: str, new: str, reason: str) -> None:
    from safetensors.torch import load_file, save_file

    assert own_spec.lora is not None
    path = Path(own_spec.lora.source) / own_spec.lora.weight_name
    layers = load_file(path)
    assert sum(key.startswith(old) for key in layers) > 0
    save_file({re.sub(rf"^{re.escape(old)}", new, key): tensor for key, tensor in layers.items()}, path)
    with pytest.raises(LoadError, match=f"small: can't fuse the LoRA {path}: {reason}"):
        load_pipeline(own_spec, CPU, torch.float32)


@pytest.mark.parametrize("form", ["peft", "diffusers", "kohya"])
def test_a_lora_may_touch_every_layer_of_the_unet(own_spec: ModelSpec, form: Format) -> None:
    """As LCM-LoRAs do: attention, convolutions, embeddings of the timestep."""
    assert own_spec.lora is not None
    path = Path(own_spec.lora.source) / own_spec.lora.weight_name
    write_lora(path, Path(own_spec.source), {"unet": ".*"}, form, alpha=2.0)
    without = draw(own_spec.model_copy(update={"lora": None}))
    assert np.abs(draw(own_spec) - without).max() > 5


def test_a_network_without_all_its_weights(own_spec: ModelSpec) -> None:
    from safetensors.torch import load_file, save_file

    path = unet_file(own_spec)
    weights = load_file(path)
    del weights["conv_out.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"small: .*UNet2DConditionModel.* lacks 1 weights: conv_out.weight"):
        load_pipeline(own_spec, CPU, torch.float32)


def test_a_folder_of_another_family(spec: ModelSpec) -> None:
    wrong = spec.model_copy(update={"family": "sdxl", "lora": None})
    message = r"small: .*/sd has text_encoder, unet, vae; the family sdxl is made of text_encoder, text_encoder_2, unet"
    with pytest.raises(LoadError, match=message):
        load_pipeline(wrong, CPU, torch.float32)


@pytest.mark.parametrize("make_spec", [small_spec, small_sdxl_spec])
def test_a_single_file_is_the_model_of_its_folder(make_spec: Callable[..., ModelSpec], tmp_path: Path) -> None:
    folder_spec = make_spec(tmp_path, lora=None)
    path = tmp_path / "everything.safetensors"
    write_single_file(Path(folder_spec.source), path)
    file_spec = folder_spec.model_copy(update={"source": str(path), "config": folder_spec.source})
    assert np.abs(draw(file_spec) - draw(folder_spec)).max() <= 1
    assert load_pipeline(file_spec, CPU, torch.bfloat16).revision == "unpinned"


def test_a_truncated_single_file(spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "everything.safetensors"
    write_single_file(Path(spec.source), path)
    path.write_bytes(path.read_bytes()[:-100])
    broken = spec.model_copy(update={"source": str(path), "config": spec.source})
    with pytest.raises(LoadError, match=rf"small: {path} is not a sound safetensors file"):
        load_pipeline(broken, CPU, torch.float32)


def test_a_single_file_without_a_decoder(spec: ModelSpec, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "everything.safetensors"
    write_single_file(Path(spec.source), path)
    save_file({key: value for key, value in load_file(path).items() if "first_stage_model" not in key}, path)
    partial = spec.model_copy(update={"source": str(path), "config": spec.source})
    with pytest.raises(LoadError, match=rf"small: can't load StableDiffusionPipeline from {path} by .*AutoencoderKL"):
        load_pipeline(partial, CPU, torch.float32)


def test_a_scheduler_that_diffusers_cannot_make(spec: ModelSpec) -> None:
    wrong = {"lcm": SchedulerSpec(class_name="LCMScheduler", config={"beta_schedule": "foo"})}
    with pytest.raises(LoadError, match="small: can't build its StableDiffusion: foo is not implemented"):
        load_pipeline(spec.model_copy(update={"schedulers": wrong}), CPU, torch.float32)


def test_another_decoder_takes_the_place_of_the_folders_own(spec: ModelSpec, tmp_path: Path) -> None:
    vae = load_diffusers(spec, CPU, torch.float32).vae
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    vae.save_pretrained(tmp_path)
    shutil.copytree(spec.source, tmp_path / "sd", ignore=shutil.ignore_patterns("vae"))
    grey = spec.model_copy(update={"source": str(tmp_path / "sd"), "vae": str(tmp_path)})
    assert draw(grey).std() < 10 < draw(spec).std()
