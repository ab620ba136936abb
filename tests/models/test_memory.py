"""What a model needs of memory, from its files and its entry."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.catalog import LoraSpec, ModelSpec, StyleLora
from models.memory import GIB, WORKING_SHARE, Estimate, estimate, weight_bytes
from tests.small_models import small_sdxl_spec, small_spec


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    small_sdxl_spec(folder)
    return folder


def spec_of(root: Path, **changes: Any) -> ModelSpec:
    return small_spec(root, **({"lora": None} | changes))


def sure(guess: Estimate | None) -> Estimate:
    assert guess is not None
    return guess


def num_weights(folder: Path) -> int:
    """float32 numbers of all networks below it."""
    return sum(weight_bytes(file, "float32") for file in folder.rglob("*.safetensors")) // 4


def test_it_counts_all_networks_in_the_dtype_that_they_are_loaded_in(root: Path) -> None:
    expected = num_weights(root / "sd") + num_weights(root / "tiny")
    full, half = (sure(estimate(spec_of(root), dtype)) for dtype in ("float32", "bfloat16"))
    assert (full.weights, half.weights) == (4 * expected, 2 * expected)
    assert full.working == round(WORKING_SHARE * full.weights)
    assert full.needed == full.weights + full.working


def test_weights_that_are_no_floats_keep_their_size(tmp_path: Path) -> None:
    save_file({"ids": torch.zeros(10, dtype=torch.int64), "weight": torch.zeros(10)}, tmp_path / "some.safetensors")
    assert weight_bytes(tmp_path / "some.safetensors", "float16") == 10 * 8 + 10 * 2


def test_of_two_variants_one_is_counted(root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(root / "sd", tmp_path / "sd"))
    for file in list(folder.rglob("*.safetensors")):
        shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    plain = sure(estimate(spec_of(root), "float32"))
    for variant in (None, "fp16"):
        assert sure(estimate(spec_of(root, source=str(folder), variant=variant), "float32")).weights == plain.weights


def test_what_is_taken_from_elsewhere_is_counted_instead(root: Path) -> None:
    plain = sure(estimate(spec_of(root), "float32"))
    other = sure(estimate(spec_of(root, vae=str(root / "sdxl" / "vae")), "float32"))
    difference = num_weights(root / "sdxl" / "vae") - num_weights(root / "sd" / "vae")
    assert other.weights - plain.weights == 4 * difference


def test_the_entry_knows_better(root: Path) -> None:
    """Its figure is that of a GPU in the entry's dtype, float16."""
    spec = spec_of(root, memory_gib=2.0)
    assert sure(estimate(spec, "float16")).needed == 2 * GIB
    assert sure(estimate(spec, "float32")).needed == 4 * GIB


def test_files_that_are_not_here(root: Path) -> None:
    assert estimate(spec_of(root, source="nobody/has-this"), "float16") is None
    known = sure(estimate(spec_of(root, source="nobody/has-this", memory_gib=2.0), "float16"))
    assert (known.needed, known.networks) == (2 * GIB, frozenset())


def test_shared_networks_count_once(root: Path) -> None:
    first = sure(estimate(spec_of(root), "float32"))
    second = sure(estimate(spec_of(root, name="second"), "float32", first.networks))
    assert (second.weights, second.shared) == (0, first.weights)
    half = sure(estimate(spec_of(root, name="second"), "float16", first.networks))
    assert half.shared == 0, "another dtype is another network"


def test_what_a_fused_lora_changes_is_not_shared(root: Path) -> None:
    first = sure(estimate(spec_of(root), "float32"))
    fused = sure(estimate(spec_of(root, lora=LoraSpec(source=str(root / "lora"))), "float32", first.networks))
    assert fused.weights == 4 * num_weights(root / "sd" / "unet")
    assert sure(estimate(spec_of(root), "float32", fused.networks)).weights == fused.weights


def test_style_loras_want_room_for_a_copy(root: Path) -> None:
    ink = StyleLora(name="ink", description="ink", source="nobody/ink", models=["small"], license="MIT")
    plain, styled = (sure(estimate(spec_of(root, loras=loras), "float32")) for loras in ({}, {"ink": ink}))
    assert styled.working - plain.working == 4 * num_weights(root / "sd" / "unet")
    assert styled.networks == plain.networks


def test_a_damaged_file_counts_as_large_as_it_is(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no header at all" * 10)
    assert weight_bytes(damaged, "float32") == 160


def test_it_needs_no_torch() -> None:
    code = "import sys, models.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_files_of_style_loras_count(tmp_path: Path) -> None:
    spec = small_spec(tmp_path, lora=None)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    entry: dict[str, Any] = {"description": "d", "models": ["small"], "license": "MIT"}
    ink = StyleLora(name="ink", source=str(file.parent), **entry)
    lost = StyleLora(name="lost", source=str(tmp_path / "nowhere"), **entry)

    def working(**loras: StyleLora) -> int:
        needed = estimate(spec.model_copy(update={"loras": loras}), "float32")
        assert needed is not None
        return needed.working

    assert working(ink=ink) - working(lost=lost) == file.stat().st_size
    assert working(ink=ink, lost=lost) == working(ink=ink)
