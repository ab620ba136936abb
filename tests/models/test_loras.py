"""LoRA files of all sorts, sound and unsound, and what they do to a network's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.catalog import ModelSpec
from models.loading import load_pipeline
from models.lora_files import Lora, LoraReader
from models.loras import StyledNetwork, StyleLoras, styled
from models.networks import LoadError
from tests.small_models import small_sdxl_spec, small_spec
from tests.style_loras import ATTENTION, TEXT, WITH_CONVOLUTIONS, by_name, style, write_lora

CPU = torch.device("cpu")
EVERYTHING = {"unet": WITH_CONVOLUTIONS, "text_encoder": TEXT}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return small_spec(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def base(spec: ModelSpec) -> Path:
    return Path(spec.source)


@pytest.fixture(scope="module")
def unet(base: Path) -> UNet2DConditionModel:
    network: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(base / "unet")
    return network


@pytest.fixture(scope="module")
def read(spec: ModelSpec) -> Callable[[Path], Lora]:
    reader = load_pipeline(spec, CPU, torch.float32).loras._reader
    assert reader is not None
    return lambda path: reader.read(style(path))


def test_all_formats_say_the_same(read: Callable[[Path], Lora], base: Path, tmp_path: Path) -> None:
    one, *others = (
        read(write_lora(tmp_path / f"{form}.safetensors", base, EVERYTHING, form))
        for form in ("peft", "diffusers", "kohya")
    )
    assert one.touches_text
    assert len(one.networks["unet"]) > 30
    for other in others:
        assert other.networks.keys() == one.networks.keys()
        for network, layers in one.networks.items():
            assert other.networks[network].keys() == layers.keys()
            for layer, factors in layers.items():
                same = other.networks[network][layer]
                assert torch.equal(same.up, factors.up)
                assert torch.equal(same.down, factors.down)
                assert same.scale == factors.scale == 1


def test_each_layer_has_its_own_alpha(read: Callable[[Path], Lora], base: Path, tmp_path: Path) -> None:
    """diffusers itself loses those of attention layers when they differ, and says so in a warning."""
    path = write_lora(tmp_path / "kohya.safetensors", base, EVERYTHING, "kohya", alpha=1.0, rank=4)
    tensors = load_file(path)
    special = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.alpha"
    text = "lora_te_text_model_encoder_layers_1_self_attn_q_proj.alpha"
    tensors[special], tensors[text] = torch.tensor(6.0), torch.tensor(2.0)
    save_file(tensors, path)
    lora = read(path)
    scales = {layer: factors.scale for layer, factors in lora.networks["unet"].items()}
    assert scales.pop("mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0") == 1.5
    assert set(scales.values()) == {0.25}
    scales = {layer: factors.scale for layer, factors in lora.networks["text_encoder"].items()}
    assert scales.pop("encoder.layers.1.self_attn.q_proj") == 0.5
    assert set(scales.values()) == {0.25}


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_a_configuration_in_the_file_counts(
    read: Callable[[Path], Lora], base: Path, tmp_path: Path, use_rslora: bool, scale: float
) -> None:
    """As diffusers' training scripts write it."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    config = LoraConfig(
        r=4, lora_alpha=8, alpha_pattern={"attn1.to_q": 2}, target_modules=["to_q", "to_v"], use_rslora=use_rslora
    )
    unet.add_adapter(config)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(unet), unet_lora_adapter_metadata=config.to_dict()
    )
    layers = read(tmp_path / "pytorch_lora_weights.safetensors").networks["unet"]
    for layer, factors in layers.items():
        assert factors.scale == (scale / 4 if layer.endswith("attn1.to_q") else scale), layer


def test_kohyas_files_for_sdxl_count_blocks_in_another_way(tmp_path: Path) -> None:
    spec = small_sdxl_spec(tmp_path)
    reader = load_pipeline(spec, CPU, torch.float32).loras._reader
    assert reader is not None
    base = Path(spec.source)
    path = write_lora(tmp_path / "kohya.safetensors", base, {"unet": r"down_blocks\.1\.att.*attn1\.to_q"}, "kohya")
    tensors = {key.replace("down_blocks_1_attentions_0", "input_blocks_3_1"): t for key, t in load_file(path).items()}
    assert any("input_blocks" in key for key in tensors)
    save_file(tensors, path)
    assert list(reader.read(style(path)).networks["unet"]) == [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ]


def test_what_was_read_stays_when_the_file_is_overwritten(
    read: Callable[[Path], Lora], base: Path, tmp_path: Path
) -> None:
    path = write_lora(tmp_path / "ink.safetensors", base, {"unet": WITH_CONVOLUTIONS})
    layers = read(path).networks["unet"]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(factors.up.any() and factors.down.any() for factors in layers.values())


# What can't be loaded


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.cat([tensor, tensor], 1) if "lora_A" in key else tensor for key, tensor in tensors.items()}


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def without_ups(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if "lora_B" not in key}


def flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor[0] if "lora_B" in key else tensor for key, tensor in tensors.items()}


FIRST = r"down_blocks\.1\.attentions\.0\.transformer_blocks\.0\.attn1\.to_\w"
DAMAGES: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (
        doubled,
        rf"it is for another architecture: unet\.{FIRST} has weights \(32, 32\), "
        r"the LoRA's factors are \(32, 4\) and \(4, 64\)",
    ),
    (renamed("blocks.1", "blocks.7"), r"for another architecture: the model has no layer unet\.down_blocks\.7\.att"),
    (renamed("unet.", "transformer."), r"transformer\.\S+ belongs to none of unet, text_encoder"),
    (renamed("lora_A.weight", "lora_A.bias"), rf"{FIRST}\.lora_A\.bias is no part of a LoRA"),
    (renamed("lora_A.weight", "lora_magnitude_vector"), r"it is a DoRA; only plain LoRAs are supported"),
    (renamed("lora_A.weight", "lokr_w1"), r"it is a LoKr; only plain LoRAs are supported"),
    (without_ups, rf"{FIRST} has only one of its two factors"),
    (flat, rf"the factors of unet\.{FIRST} are no matrices: they are \(4,\) and \(4, 32\)"),
    (lambda _: {}, r"it touches no layer"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[reason[-24:] for _, reason in DAMAGES])
def test_a_file_that_is_something_else(
    read: Callable[[Path], Lora], base: Path, tmp_path: Path, damage: Any, reason: str
) -> None:
    path = write_lora(tmp_path / "ink.safetensors", base, {"unet": ATTENTION})
    save_file({key: tensor.contiguous() for key, tensor in damage(load_file(path)).items()}, path)
    with pytest.raises(LoadError, match=rf"small: loras\.ink: can't load the LoRA {path}: .*{reason}"):
        read(path)


def test_a_missing_file(read: Callable[[Path], Lora], tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=rf"small: loras\.ink: {tmp_path} has no ink\.safetensors; it has no"):
        read(tmp_path / "ink.safetensors")


def test_a_truncated_file(read: Callable[[Path], Lora], base: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "ink.safetensors", base, {"unet": ATTENTION})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LoadError, match=rf"small: loras\.ink: {path} is not a sound safetensors file"):
        read(path)


def test_a_pickle_is_never_read(read: Callable[[Path], Lora], tmp_path: Path) -> None:
    path = tmp_path / "ink.safetensors"
    torch.save({"unet.x.lora_A.weight": torch.ones(1)}, path)
    with pytest.raises(LoadError, match="is not a sound safetensors file"):
        read(path)


def test_a_lora_for_sdxl_is_none_for_sd(read: Callable[[Path], Lora], tmp_path: Path) -> None:
    other = Path(small_sdxl_spec(tmp_path).source)
    with pytest.raises(LoadError, match=r"another architecture: unet\.\S+attn2\.to_k has weights \(32, 32\)"):
        read(write_lora(tmp_path / "xl.safetensors", other, {"unet": ATTENTION}))


# In the weights


def weights(network: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_come_back_bit_for_bit(
    read: Callable[[Path], Lora], base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    targets = {"unet": WITH_CONVOLUTIONS}
    ink, clay = (
        read(write_lora(tmp_path / f"{seed}.safetensors", base, targets, seed=seed)).networks["unet"]
        for seed in range(2)
    )
    unet = UNet2DConditionModel.from_pretrained(base / "unet").requires_grad_(False).to(dtype)
    network, pristine = StyledNetwork(unet), weights(unet)
    assert network.merge([(ink, 1.0)])
    inked = weights(unet)
    assert not are_equal(inked, pristine)
    assert not network.merge([(ink, 1.0)]), "they are there already"
    for merges in ([(clay, 0.3)], [(ink, 0.5), (clay, -1.0)], [(ink, 1.0)]):
        assert network.merge(merges)
    assert are_equal(weights(unet), inked)
    assert network.merge([])
    assert are_equal(weights(unet), pristine)


def test_weights_stay_where_recordings_expect_them(
    read: Callable[[Path], Lora], unet: UNet2DConditionModel, base: Path, tmp_path: Path
) -> None:
    places = [parameter.data_ptr() for parameter in unet.requires_grad_(False).parameters()]
    ink = read(write_lora(tmp_path / "ink.safetensors", base, {"unet": WITH_CONVOLUTIONS}))
    styled(unet).merge([(ink.networks["unet"], 1.0)])
    assert [parameter.data_ptr() for parameter in unet.parameters()] == places
    styled(unet).merge([])


def test_two_models_that_share_a_network_know_what_the_other_has_merged(
    unet: UNet2DConditionModel, base: Path, tmp_path: Path
) -> None:
    path = write_lora(tmp_path / "ink.safetensors", base, {"unet": ATTENTION})
    pristine = weights(unet.requires_grad_(False))
    entries = by_name(style(path))
    spec = small_spec(base.parent)
    networks = {"unet": unet}
    one, other = (
        StyleLoras(name, entries, CPU, networks, LoraReader(spec, StableDiffusionPipeline, networks))
        for name in ("one", "other")
    )
    assert one.use(one.fetch([("ink", 1.0)]))
    assert other.use(()), "it must not compute with the other model's LoRA"
    assert are_equal(weights(unet), pristine)


def test_a_merge_that_fails_leaves_the_weights_as_they_were_loaded(
    read: Callable[[Path], Lora],
    unet: UNet2DConditionModel,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ink = read(write_lora(tmp_path / "ink.safetensors", base, {"unet": ATTENTION})).networks["unet"]
    clay = read(write_lora(tmp_path / "clay.safetensors", base, {"unet": WITH_CONVOLUTIONS}, seed=1)).networks["unet"]
    pristine = weights(unet.requires_grad_(False))
    network = StyledNetwork(unet)
    network.merge([(ink, 1.0)])
    change, calls = StyledNetwork._changed, iter(range(100))

    def run_out(self: StyledNetwork, *arguments: Any) -> Tensor:
        if next(calls) == 7:
            raise torch.OutOfMemoryError("half way")
        return change(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StyledNetwork, "_changed", run_out)
        with pytest.raises(torch.OutOfMemoryError):
            network.merge([(clay, 1.0)])
    assert are_equal(weights(unet), pristine)
    assert not network.merge([]), "and it knows that"
    assert network.merge([(ink, 1.0)])


# What stays in memory


@pytest.fixture
def shelf(spec: ModelSpec, base: Path, tmp_path: Path) -> StyleLoras:
    """Room for two of three."""
    paths = [write_lora(tmp_path / f"{name}.safetensors", base, {"unet": ATTENTION}) for name in ("a", "b", "c")]
    styled_spec = spec.model_copy(update={"loras": by_name(*map(style, paths))})
    return load_pipeline(styled_spec, CPU, torch.float32, max_loras=2).loras


def test_as_many_stay_as_were_set_and_those_used_last(shelf: StyleLoras) -> None:
    assert [choice.name for choice in shelf.fetch_first()] == ["a", "b"]
    (a,) = shelf.fetch([("a", 1.0)])
    (c,) = shelf.fetch([("c", 1.0)])
    assert shelf.use((a, c))
    assert shelf.num_resident == 2
    assert shelf.fetch([("a", 1.0)])[0].lora is a.lora, "it was used after b"
    (b,) = shelf.fetch([("b", 1.0)])
    assert shelf.use((b,)), "what had to go is read again"
    assert shelf.num_resident == 2


def test_a_request_keeps_its_loras_however_many_others_come(shelf: StyleLoras) -> None:
    all_three = shelf.fetch([(name, 1.0) for name in "abc"])
    assert shelf.use(all_three)
    assert shelf.num_resident == 2
    shelf.use(())


def test_a_new_entry_is_known_to_a_running_pipeline(shelf: StyleLoras, base: Path, tmp_path: Path) -> None:
    new = style(write_lora(tmp_path / "new.safetensors", base, {"unet": ATTENTION}, seed=5))
    (unknown,) = shelf.fetch([("new", 1.0)])
    with pytest.raises(LoadError, match="small: this worker knows no LoRA 'new'"):
        shelf.use((unknown,))
    (before,) = shelf.fetch([("a", 1.0)])
    other = style(write_lora(tmp_path / "other.safetensors", base, {"unet": ATTENTION}, seed=6), name="a")
    shelf.know(by_name(other, new))
    a, fresh = shelf.fetch([("a", 1.0), ("new", 1.0)])
    assert a.lora is not before.lora, "its entry is another one"
    assert shelf.use((fresh,))
    (gone,) = shelf.fetch([("b", 1.0)])
    with pytest.raises(LoadError, match="knows no LoRA 'b'"):
        shelf.use((gone,))
    shelf.use(())


def test_a_file_that_was_mended_is_read_again_after_a_while(
    shelf: StyleLoras, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(LoadError):
        shelf.use(shelf.fetch([("a", 1.0)]))
    path.write_bytes(content)
    with pytest.raises(LoadError):
        shelf.use(shelf.fetch([("a", 1.0)]))
    monkeypatch.setattr("models.loras.RETRY_S", 0.0)
    assert shelf.use(shelf.fetch([("a", 1.0)]))
    shelf.use(())
