"""LoRAs out of the difference of two networks: through plain diffusers they bring the tuned network back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors.torch import load_file
from torch import Tensor, nn

from models.lora_files import LoraReader
from models.networks import LoadError
from models.training.errors import ExtractError
from models.training.extract import Extract, Weights, extract, smallest_rank
from models.training.teachers import Conditions, Teacher, call_unet
from tests.small_models import small_spec
from tests.training_data import CPU, KINDS, Kind, make_teacher

FULL_RANK = 10_000
PIPELINES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def tune(teacher: Teacher, folder: Path, *, biases: float = 0.0, rank: int | None = None) -> Any:
    """A UNet with other weights in all of its layers, written to `folder`: by changes of `rank`, else of any."""
    torch.manual_seed(1)
    unet = teacher.load_unet(CPU, torch.float32)
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.data.contiguous().flatten(1)
            inner = rank or weight.shape[1]
            change = torch.randn(len(weight), inner) @ torch.randn(inner, weight.shape[1])
            scales = 0.5 ** torch.arange(weight.shape[1])
            change = change if rank else change * scales  # singular values that fall
            module.weight.data = (weight + 0.3 * change / change.norm() * weight.norm()).view_as(module.weight)
            if module.bias is not None:
                module.bias.data += biases
    unet.save_pretrained(folder)
    return unet


def draw(teacher: Teacher, unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    width, pooled = teacher.unet_config["cross_attention_dim"], None
    if teacher.layout == "sdxl":
        added = teacher.unet_config["projection_class_embeddings_input_dim"]
        pooled = torch.randn(2, added - 6 * teacher.unet_config["addition_time_embed_dim"], generator=generator)
    times = None if pooled is None else torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)
    conditions = Conditions(torch.randn(2, 7, width, generator=generator), pooled, times)
    with torch.no_grad():
        return call_unet(unet, torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([700, 20]), conditions)


def draw_with(teacher: Teacher, lora: Path) -> Tensor:
    """By diffusers' own pipeline, which loads the LoRA."""
    pipe = getattr(diffusers, PIPELINES[teacher.layout]).from_pretrained(teacher.folder)
    pipe.load_lora_weights(lora)
    return draw(teacher, pipe.unet.eval())


def weights_of(teacher: Teacher) -> Weights:
    return Weights.of_folder(teacher.folder)


@pytest.mark.parametrize("kind", KINDS)
def test_at_full_rank_it_is_the_tuned_network_and_at_a_low_one_between_the_two(
    root: Path, tmp_path: Path, kind: Kind
) -> None:
    teacher = make_teacher(root, kind)
    tuned = draw(teacher, tune(teacher, tmp_path / "tuned"))
    base = draw(teacher, teacher.load_unet(CPU, torch.float32))
    full = extract(weights_of(teacher), Weights.of_folder(tmp_path / "tuned"), rank=FULL_RANK // 20)
    full.save(tmp_path / "full", torch.float32)
    low = extract(weights_of(teacher), Weights.of_folder(tmp_path / "tuned"), rank=4)
    low.save(tmp_path / "low", torch.float32)
    distance = float((tuned - base).norm())
    assert full.kept == pytest.approx(1, abs=1e-6)
    assert full.left_out == 0
    assert float((draw_with(teacher, tmp_path / "full") - tuned).norm()) < 1e-3 * distance
    assert 0.5 < low.kept < 1
    assert 1e-3 * distance < float((draw_with(teacher, tmp_path / "low") - tuned).norm()) < 0.7 * distance


def test_it_touches_every_linear_layer_and_convolution_with_one_rank(root: Path, tmp_path: Path) -> None:
    """Even those that have less than this rank, since some readers know only one for all."""
    teacher = make_teacher(root, "sdxl")
    unet = tune(teacher, tmp_path / "tuned")
    made = extract(weights_of(teacher), Weights.of_folder(tmp_path / "tuned"), rank=12)
    layers = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert set(made.layers) == layers
    for name, (down, up) in made.layers.items():
        weight = unet.get_submodule(name).weight
        assert down.shape == (12, *weight.shape[1:])
        assert up.shape == (len(weight), 12, *([1, 1] if weight.dim() == 4 else []))
    made.save(tmp_path / "lora", torch.float16)
    tensors = load_file(tmp_path / "lora" / LORA_WEIGHT_NAME_SAFE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert sum(tensor.numel() for tensor in tensors.values()) == made.num_parameters


def test_the_service_reads_it(root: Path, tmp_path: Path) -> None:
    teacher = make_teacher(root, "sd")
    tuned = tune(teacher, tmp_path / "tuned", rank=3)
    made = extract(weights_of(teacher), Weights.of_folder(tmp_path / "tuned"), rank=3)
    made.save(tmp_path / "lora", torch.float32)
    unet = teacher.load_unet(CPU, torch.float32)
    reader = LoraReader(small_spec(root), teacher.pipeline_class, {"unet": unet})
    (layers,) = reader.read_file(tmp_path / "lora" / LORA_WEIGHT_NAME_SAFE).values()
    for name, factors in layers.items():
        change = (factors.scale * factors.up @ factors.down).view_as(unet.get_submodule(name).weight)
        wanted = tuned.get_submodule(name).weight - unet.get_submodule(name).weight
        assert torch.allclose(change, wanted, atol=1e-4), name


def test_a_share_to_keep_chooses_the_smallest_rank_that_does(root: Path, tmp_path: Path) -> None:
    teacher = make_teacher(root, "sd")
    tune(teacher, tmp_path / "tuned")
    base, tuned = weights_of(teacher), Weights.of_folder(tmp_path / "tuned")
    made = extract(base, tuned, keep=0.9)
    assert made.kept >= 0.9
    assert made.rank == smallest_rank(base, tuned, 0.9) > 1
    assert extract(base, tuned, rank=made.rank - 1).kept < 0.9
    tune(teacher, tmp_path / "low", rank=2)
    assert smallest_rank(base, Weights.of_folder(tmp_path / "low"), 0.9999) == 2


def test_it_says_how_much_lies_in_biases(root: Path, tmp_path: Path) -> None:
    teacher = make_teacher(root, "sd")
    unet = tune(teacher, tmp_path / "tuned", biases=0.1)
    base, tuned = weights_of(teacher), Weights.of_network(unet, "the student")
    layers = biases = 0.0
    for name, weight in teacher.load_unet(CPU, torch.float32).named_parameters():
        change = float((unet.get_parameter(name) - weight).detach().square().sum())
        layers, biases = (layers, biases + change) if name.endswith("bias") else (layers + change, biases)
    made = extract(base, tuned, rank=4)
    assert made.left_out == pytest.approx(biases / (layers + biases), rel=1e-3)
    assert made.left_out > 0.001


def test_layers_that_do_not_differ_are_left_out(root: Path) -> None:
    teacher = make_teacher(root, "sd")
    unet = teacher.load_unet(CPU, torch.float32)
    unet.conv_out.weight.data += 1
    made = extract(weights_of(teacher), Weights.of_network(unet, "tuned"), rank=2)
    assert list(made.layers) == ["conv_out"]
    assert isinstance(made, Extract)


def test_networks_in_half_precision_only_are_read(root: Path, tmp_path: Path) -> None:
    teacher = make_teacher(root, "sd")
    tune(teacher, tmp_path / "tuned").half().save_pretrained(tmp_path / "half", variant="fp16")
    made = extract(weights_of(teacher), Weights.of_folder(tmp_path / "half"), rank=4)
    plain = extract(weights_of(teacher), Weights.of_folder(tmp_path / "tuned"), rank=4)
    assert made.kept == pytest.approx(plain.kept, rel=1e-2)


def assert_refused(base: Weights, tuned: Weights, reason: str) -> None:
    with pytest.raises(ExtractError, match=reason):
        extract(base, tuned, rank=4)


def test_two_architectures_are_told_by_the_first_layer_that_differs(root: Path, tmp_path: Path) -> None:
    teacher = make_teacher(root, "sd")
    wide = type(teacher.load_unet(CPU, torch.float32)).from_config(
        {**teacher.unet_config, "cross_attention_dim": 64, "block_out_channels": [32, 64]}
    )
    wide.save_pretrained(tmp_path / "wide")
    base, other = weights_of(teacher), Weights.of_folder(tmp_path / "wide")
    first = min(name for name in {*base.shapes, *other.shapes} if base.shapes.get(name) != other.shapes.get(name))
    assert_refused(base, other, rf"two architectures: {re.escape(first)} is .* in {teacher.folder} and .* in .*wide")


def test_a_layer_that_only_one_has_is_named(root: Path) -> None:
    teacher = make_teacher(root, "sd")
    base = weights_of(teacher)
    shapes = {name: shape for name, shape in base.shapes.items() if name != "conv_in.weight"}
    assert_refused(base, Weights("other", shapes, base.read), "conv_in.weight is .* in .* and not there in other")


def test_two_that_are_the_same(root: Path) -> None:
    base = weights_of(make_teacher(root, "sd"))
    assert_refused(base, base, "don't differ: there is nothing to extract")


def test_folders_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(ExtractError, match=r"nowhere is neither .*: there is no config.json"):
        Weights.of_folder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoadError, match="there are no weights in"):
        Weights.of_folder(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(LoadError, match="is not a sound safetensors file"):
        Weights.of_folder(tmp_path)
