"""A LoRA out of two networks: the difference of their weights, layer by layer, at a lower rank.

The best approximation of a matrix at a rank is its largest singular values' part (Eckart & Young, 1936). A LoRA is just
such a product (Hu et al., arXiv 2106.09685, section 4.1), so what a tuned model has learnt can be added to others of
the same architecture, as it is done with SDXL-Turbo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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

Bar = Callable[[Iterable[str]], Iterable[str]]


class Weights:
    """The weights of a UNet's folder, or of a diffusers folder that has one, read one by one.

    Raises LoadError for files that can't be read, ExtractError for a folder without a UNet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = _unet_folder(folder)
        self._files: dict[str, Any] = {}
        for path in _files_of(self.folder):
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """In fp32."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor.float()


def _unet_folder(folder: Path) -> Path:
    for place in (folder / "unet", folder):
        if (place / CONFIG).is_file():
            return place
    raise ExtractError(f"{folder} is neither a UNet's folder nor one of diffusers with a UNet: there is no {CONFIG}")


def _files_of(folder: Path) -> list[Path]:
    plain = [path for path in folder.glob("*.safetensors") if "." not in path.name.removesuffix(".safetensors")]
    check_weights(folder)
    return weight_files(folder, None if plain else FP16)


def check_same(base: Weights, tuned: Weights) -> None:
    """Raises ExtractError that names the first layer which only one of them has, or which differs in shape."""
    for name in sorted({*base.names, *tuned.names}):
        layer = name.rpartition(".")[0]
        for one, other in ((base, tuned), (tuned, base)):
            if name not in one:
                raise ExtractError(
                    f"they are of two architectures: {other.folder} has the layer {layer}, {one.folder} hasn't"
                )
        if base.shape(name) != tuned.shape(name):
            raise ExtractError(
                f"they are of two architectures: the layer {layer} is {base.shape(name)} in {base.folder} and "
                f"{tuned.shape(name)} in {tuned.folder}"
            )


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
        return self.values.double().square()

    def cut(self, rank: int) -> Layer:
        """What a LoRA of this rank can use."""
        return Layer(self.shape, self.left[:, :rank], self.values[:rank], self.right[:rank])

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
    base: Weights,
    tuned: Weights,
    rank: int | None = None,
    keep: float | None = None,
    device: torch.device = CPU,
    show: bool = True,
) -> Extract:
    """The LoRA that leads from `base` to `tuned`: of this rank, or of the smallest one that keeps this share of the
    layers' difference, which takes room in memory for the difference itself.

    Raises ExtractError for networks of two architectures, and for two that are the same.
    """
    if (rank is None) == (keep is None):
        raise ValueError("either a rank or a share to keep is needed")
    check_same(base, tuned)
    layers: dict[str, Layer] = {}
    energies: dict[str, Tensor] = {}
    left_out = 0.0
    names = tqdm(base.names, desc="extracting", mininterval=2.0, disable=not show)
    for name, difference in _differences(base, tuned, names):
        layer = name.removesuffix(".weight")
        if difference.dim() < 2:
            left_out += float(difference.double().square().sum())
        elif difference.any():
            whole = Layer.of(difference, device)
            energies[layer] = whole.energies
            layers[layer] = whole if rank is None else whole.cut(rank)
    if not layers:
        raise ExtractError(f"the layers of {base.folder} and {tuned.folder} don't differ: there is nothing to extract")
    rank = rank or smallest_rank(energies.values(), keep or 1.0)
    total = sum(float(energy.sum()) for energy in energies.values())
    kept = sum(float(energy[:rank].sum()) for energy in energies.values())
    factors = {name: layer.factors(rank) for name, layer in layers.items()}
    return Extract(rank, factors, kept / total, left_out / (left_out + total))


def _differences(base: Weights, tuned: Weights, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, tuned.read(name) - base.read(name)


def smallest_rank(energies: Iterable[Tensor], keep: float) -> int:
    """Of all layers together: the squares of singular values in each are in falling order."""
    by_rank = torch.nn.utils.rnn.pad_sequence(list(energies)).sum(1).cumsum(0)
    return int((by_rank < keep * by_rank[-1]).sum()) + 1
