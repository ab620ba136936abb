"""A LoRA out of two networks: the difference of their weights, layer by layer, at a lower rank.

The best approximation of a matrix at a rank is its largest singular values' part (Eckart & Young, 1936). A LoRA is just
such a product (Hu et al., arXiv 2106.09685, section 4.1), so what a tuned model has learnt can be added to others of
the same architecture, as it is done with SDXL-Turbo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from models.networks import check_weights, weight_files
from models.training.errors import ExtractError
from models.training.trainer import CPU

CONFIG = "config.json"
FP16 = "fp16"


@dataclass(frozen=True)
class Weights:
    """A UNet's weights, read one by one, in fp32. `name` is what messages call it."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    @classmethod
    def of_network(cls, unet: Any, name: str) -> Weights:
        """Of one in memory, as it is when they are read."""
        tensors = dict(unet.state_dict())
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        return cls(name, shapes, lambda key: tensors[key].detach().to(CPU, torch.float32))

    @classmethod
    def of_folder(cls, folder: Path, variant: str | None = None) -> Weights:
        """Of a UNet's folder, or of a diffusers folder that has one.

        Raises LoadError for files that can't be read, ExtractError for a folder without a UNet.
        """
        place = _unet_folder(folder)
        files: dict[str, Any] = {}
        for path in _files_of(place, variant):
            file: Any = safe_open(path, framework="pt")
            files |= dict.fromkeys(file.keys(), file)
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}
        return cls(str(folder), shapes, lambda name: files[name].get_tensor(name).float())

    @property
    def layers(self) -> list[str]:
        """Those that a LoRA can change: linear ones and convolutions."""
        return [name.removesuffix(".weight") for name in sorted(self.shapes) if self._is_layer(name)]

    @property
    def others(self) -> list[str]:
        """All weights but those of the layers: biases and norms."""
        return [name for name in sorted(self.shapes) if not self._is_layer(name)]

    def _is_layer(self, name: str) -> bool:
        return name.endswith(".weight") and len(self.shapes[name]) in (2, 4)


def _unet_folder(folder: Path) -> Path:
    for place in (folder / "unet", folder):
        if (place / CONFIG).is_file():
            return place
    raise ExtractError(f"{folder} is neither a UNet's folder nor one of diffusers with a UNet: there is no {CONFIG}")


def _files_of(folder: Path, variant: str | None) -> list[Path]:
    check_weights(folder)
    has_plain = any("." not in path.name.removesuffix(".safetensors") for path in folder.glob("*.safetensors"))
    return weight_files(folder, variant if has_plain else FP16)


def check_same(base: Weights, tuned: Weights) -> None:
    """Raises ExtractError that names the first layer which only one of them has, or which differs in shape."""
    for name in sorted({*base.shapes, *tuned.shapes}):
        shapes = [weights.shapes.get(name) for weights in (base, tuned)]
        if shapes[0] != shapes[1]:
            said = [f"{shape or 'not there'} in {one.name}" for shape, one in zip(shapes, (base, tuned), strict=True)]
            raise ExtractError(f"they are of two architectures: {name} is {said[0]} and {said[1]}")


@dataclass(frozen=True)
class Layer:
    """A layer's difference, as the singular values and vectors of its matrix `"out (in h w)"`; `shape` is the
    weight's."""

    shape: tuple[int, ...]
    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, difference: Tensor, device: torch.device) -> Layer:
        left, values, right = torch.linalg.svd(difference.flatten(1).to(device), full_matrices=False)
        return cls(tuple(difference.shape), *(part.to(CPU) for part in (left, values, right)))

    @property
    def energies(self) -> Tensor:
        """What each singular value adds to the sum of squares."""
        return self.values.double().square()

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Down and up, of equal size; filled up with zeros where the layer has less than this rank, since some readers
        take one rank for all layers."""
        root = self.values[:rank].sqrt()
        missing = rank - len(root)
        down = torch.cat([root[:, None] * self.right[:rank], torch.zeros(missing, self.right.shape[1])])
        up = torch.cat([self.left[:, :rank] * root, torch.zeros(len(self.left), missing)], dim=1)
        is_convolution = len(self.shape) == 4
        return down.reshape(rank, *self.shape[1:]), up[..., None, None] if is_convolution else up


@dataclass(frozen=True)
class Extract:
    """A LoRA, `layers` by name; `kept` is the share of the layers' difference that is in it, `left_out` the share of
    all difference that lies in biases and norms, where a LoRA has no place. Shares are of sums of squares."""

    rank: int
    layers: Mapping[str, tuple[Tensor, Tensor]]
    kept: float
    left_out: float

    @property
    def num_parameters(self) -> int:
        return sum(down.numel() + up.numel() for down, up in self.layers.values())

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write it as diffusers' `load_lora_weights` reads it; its alpha is its rank."""
        tensors = {}
        for name, (down, up) in self.layers.items():
            tensors[f"{name}.lora_A.weight"] = down.to(dtype).contiguous()
            tensors[f"{name}.lora_B.weight"] = up.to(dtype).contiguous()
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=tensors)


def extract(
    base: Weights, tuned: Weights, rank: int | None = None, keep: float | None = None, device: torch.device = CPU
) -> Extract:
    """The LoRA that leads from `base` to `tuned`: of this rank, or of the smallest one that keeps this share of the
    layers' difference.

    Raises ExtractError for networks of two architectures, and for two whose layers are the same.
    """
    check_same(base, tuned)
    if rank is None:
        rank = smallest_rank(base, tuned, 1.0 if keep is None else keep, device)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    total = kept = 0.0
    for name, difference in _layer_differences(base, tuned, "extracting"):
        layer = Layer.of(difference, device)
        factors[name] = layer.factors(rank)
        total += float(layer.energies.sum())
        kept += float(layer.energies[:rank].sum())
    left_out = sum(float((tuned.read(name) - base.read(name)).square().sum()) for name in base.others)
    return Extract(rank, factors, kept / total, left_out / (left_out + total))


def smallest_rank(base: Weights, tuned: Weights, keep: float, device: torch.device = CPU) -> int:
    """Which, given to every layer, keeps this share of what all of them differ in."""
    energies = [
        torch.linalg.svdvals(difference.flatten(1).to(device)).to(CPU).double().square()
        for _, difference in _layer_differences(base, tuned, "choosing the rank")
    ]
    by_rank = torch.nn.utils.rnn.pad_sequence(energies).sum(1).cumsum(0)
    return int((by_rank < keep * by_rank[-1]).sum()) + 1


def _layer_differences(base: Weights, tuned: Weights, doing: str) -> Iterator[tuple[str, Tensor]]:
    """Of the layers that differ, by their names. Raises ExtractError where there is none."""
    is_same = True
    for layer in tqdm(base.layers, desc=doing, mininterval=2.0):
        difference = tuned.read(f"{layer}.weight") - base.read(f"{layer}.weight")
        if difference.any():
            is_same = False
            yield layer, difference
    if is_same:
        raise ExtractError(f"the layers of {base.name} and {tuned.name} don't differ: there is nothing to extract")
