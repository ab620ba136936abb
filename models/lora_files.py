"""From a LoRA's file to the change of each layer that it touches.

LoRAs come in several formats: diffusers' old and new one, PEFT's, and kohya's with its names and alphas. diffusers
translates between them; the rules of what is left stand here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.catalog import ModelSpec, StyleLora
from models.hub.lockfile import LOCK_FILE
from models.networks import LoadError, check_weights, explained
from models.sources import SourceError, locate

Shapes = Mapping[str, Mapping[str, torch.Size]]  # network -> layer -> weight

# "…to_q.lora_A.weight", "…to_q.lora_A.NAME.weight", "…to_q.lora.down.weight", "…processor.to_q_lora.down.weight",
# "…q_proj.lora_linear_layer.down.weight"
_FACTOR = re.compile(
    r"(?P<layer>.+?)(\.lora_(?P<letter>[AB])(\.\w+)?|(\.lora|_lora|\.lora_linear_layer)\.(?P<side>up|down))\.weight"
)
_OTHER_KINDS = {"dora_scale": "DoRA", "magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "lora_mid": "LoCon"}
_OLD_TEXT_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True, slots=True)
class Factors:
    """A layer's change is scale * up @ down: `up` is "out rank", `down` "rank in", or for a convolution
    "rank (in height width)"."""

    up: Tensor
    down: Tensor
    scale: float

    def to(self, device: torch.device) -> Factors:
        return Factors(self.up.to(device), self.down.to(device), self.scale)


@dataclass(slots=True, eq=False)
class Lora:
    """A style LoRA in memory: network -> layer -> factors. `device` is where these are.

    `number` tells it from others of the same name, which an earlier reading of the catalog may have had.
    """

    name: str
    networks: dict[str, dict[str, Factors]]
    device: torch.device
    number: int = field(default_factory=itertools.count().__next__)

    @property
    def touches_text(self) -> bool:
        return any(network != "unet" for network in self.networks)

    def move(self, device: torch.device) -> None:
        if self.device != device:
            for layers in self.networks.values():
                layers.update({layer: factors.to(device) for layer, factors in layers.items()})
            self.device = device


class LoraReader:
    """Reads LoRAs for one model: `pipeline_class` is diffusers', `networks` its UNet and text encoders by their names.

    Touches nothing but the file and host memory, so it may run beside the device's own thread.
    """

    def __init__(
        self, spec: ModelSpec, pipeline_class: Any, networks: Mapping[str, nn.Module], lock_file: Path = LOCK_FILE
    ) -> None:
        self._spec = spec
        self._pipeline_class = pipeline_class
        self._unet_config = networks["unet"].config
        self._shapes: Shapes = {name: dict(_weight_shapes(network)) for name, network in networks.items()}
        self._lock_file = lock_file

    def read(self, entry: StyleLora) -> Lora:
        """Raises LoadError that names the model, the LoRA and the reason."""
        try:
            spec = self._spec.model_copy(update={"loras": {entry.name: entry}})
            path = locate(spec, f"loras.{entry.name}", lock_file=self._lock_file).path
            with explained(f"can't load the LoRA {path}"):
                networks = self.read_file(path)
        except SourceError as error:
            raise LoadError(str(error)) from error
        except LoadError as error:
            raise LoadError(f"{self._spec.name}: loras.{entry.name}: {error}") from error
        return Lora(entry.name, networks, torch.device("cpu"))

    def read_file(self, path: Path) -> dict[str, dict[str, Factors]]:
        """Network -> layer -> factors. Raises LoadError where the file is damaged, ValueError where it doesn't fit."""
        check_weights(path)
        return dict(self._group(*self._translate(path)))

    def _translate(self, path: Path) -> Any:
        """diffusers' names and tensors, kohya's alphas, and PEFT's configuration where the file has one."""
        _refuse_other_kinds(path)
        return self._pipeline_class.lora_state_dict(
            path.parent,
            weight_name=path.name,
            use_safetensors=True,
            unet_config=self._unet_config,
            return_lora_metadata=True,
        )

    def _group(
        self, tensors: Mapping[str, Tensor], alphas: Mapping[str, float] | None, config: Mapping[str, Any] | None
    ) -> Iterator[tuple[str, dict[str, Factors]]]:
        if strange := [key for key in tensors if key.partition(".")[0] not in self._shapes]:
            raise ValueError(f"{strange[0]} belongs to none of {', '.join(self._shapes)}")
        for network, shapes in self._shapes.items():
            pairs = _pair(network, _part(tensors, network), shapes)
            scales = _Scales(network, _part(alphas or {}, network), _part(config or {}, network), shapes)
            if layers := {layer: _fit(layer, *pair, scales, shapes) for layer, pair in pairs.items()}:
                yield network, layers
        if not tensors:
            raise ValueError("it touches no layer")


def _weight_shapes(network: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield name, module.weight.shape


def _refuse_other_kinds(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
    for key in keys:
        for mark, kind in _OTHER_KINDS.items():
            if mark in key:
                raise ValueError(f"it is a {kind}; only plain LoRAs are supported ({key})")


def _part(values: Mapping[str, Any], network: str) -> dict[str, Any]:
    """What belongs to a network, without its name."""
    return {key.removeprefix(f"{network}."): value for key, value in values.items() if key.startswith(f"{network}.")}


def _pair(network: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, tuple[Any, Any]]:
    """Layer -> (up, down)."""
    ups: dict[str, Tensor] = {}
    downs: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise ValueError(f"{network}.{key} is no part of a LoRA")
        is_up = "B" in (match["letter"] or "") or match["side"] == "up"
        (ups if is_up else downs)[_layer(network, match["layer"], shapes)] = tensor
    if odd := sorted(ups.keys() ^ downs.keys()):
        raise ValueError(f"{network}.{odd[0]} has only one of its two factors")
    return {layer: (ups[layer], downs[layer]) for layer in ups}


def _layer(network: str, name: str, shapes: Mapping[str, torch.Size]) -> str:
    """A layer's name in the network: old files name attention's layers differently, and text encoders have lost a level
    of their names in newer versions of transformers."""
    name = name.replace(".processor.", ".")
    head, _, last = name.rpartition(".")
    if network != "unet":
        name = f"{head}.{_OLD_TEXT_LAYERS.get(last, last)}"
        return name if name in shapes else name.removeprefix("text_model.")
    return f"{name}.0" if last == "to_out" else name


def _fit(layer: str, up: Tensor, down: Tensor, scales: _Scales, shapes: Mapping[str, torch.Size]) -> Factors:
    where = f"{scales.network}.{layer}"
    if layer not in shapes:
        raise ValueError(f"it is for another architecture: the model has no layer {where}")
    if min(up.dim(), down.dim()) < 2:
        raise ValueError(f"the factors of {where} are no matrices: they are {tuple(up.shape)} and {tuple(down.shape)}")
    # Copies: safetensors maps the file, which somebody may overwrite while the LoRA is in use.
    factors = Factors(up.flatten(1).clone(), down.flatten(1).clone(), scales.find(layer, rank=len(down)))
    weight, change = shapes[layer], (len(factors.up), factors.down.shape[1])
    if change != (weight[0], weight[1:].numel()) or factors.up.shape[1] != len(factors.down):
        raise ValueError(
            f"it is for another architecture: {where} has weights {tuple(weight)}, "
            f"the LoRA's factors are {tuple(up.shape)} and {tuple(down.shape)}"
        )
    return factors


class _Scales:
    """By how much a network's factors count: alpha / rank.

    kohya's files have an alpha per layer, those that diffusers saves may have PEFT's configuration. Without either it
    is 1.
    """

    def __init__(
        self, network: str, alphas: Mapping[str, float], config: Mapping[str, Any], shapes: Mapping[str, torch.Size]
    ) -> None:
        self.network = network
        self._alphas = {self._layer_of(key, shapes): alpha for key, alpha in alphas.items()}
        self._config = config
        if config.get("use_dora"):
            raise ValueError("it is a DoRA; only plain LoRAs are supported")

    def find(self, layer: str, rank: int) -> float:
        if layer in self._alphas:
            return self._alphas[layer] / rank
        if not self._config:
            return 1.0
        from peft.utils.other import get_pattern_key  # late: it loads much

        pattern = self._config.get("alpha_pattern") or {}
        alpha = float(pattern.get(get_pattern_key(pattern, layer), self._config["lora_alpha"]))
        return alpha / (rank**0.5 if self._config.get("use_rslora") else rank)

    def _layer_of(self, key: str, shapes: Mapping[str, torch.Size]) -> str:
        key = key.removesuffix(".alpha")
        match = _FACTOR.fullmatch(key)
        return _layer(self.network, match["layer"] if match else key, shapes)
