"""Style LoRAs on request: merged into a network's weights in place, and out of them again.

Networks are replayed as recordings (models/tracing.py, models/graphs.py), which see weights that change in place but
not layers that are added. Merged LoRAs cost nothing per step, and the network stays the one that was recorded;
`benchmarks/loras.py` compares with adapters that stay beside the weights.
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.catalog import StyleLora
from models.lora_files import Factors, Lora, LoraReader
from models.networks import LoadError

MAX_RESIDENT = 16
RETRY_S = 5.0

Merge = tuple[Mapping[str, Factors], float]  # layer -> its change, and how strong


@dataclass(frozen=True, slots=True)
class ChosenLora:
    """A LoRA that somebody asked for with a weight; its file may still be being read."""

    name: str
    weight: float
    reading: Future[Lora]

    @property
    def is_read(self) -> bool:
        """Or can't be: then `lora` raises."""
        return self.reading.done()

    @property
    def lora(self) -> Lora:
        """Waits for the file. Raises LoadError."""
        return self.reading.result()


class StyleLoras:
    """The style LoRAs of one model, which `entries` names; `networks` are what they may change, by diffusers' names.

    `max_resident` stay in memory, those used last; a request under way keeps its own besides. Files are read on a
    thread beside the one that owns the device: everything else here belongs to that one.
    """

    def __init__(
        self,
        model: str,
        entries: Mapping[str, StyleLora],
        device: torch.device,
        networks: Mapping[str, nn.Module] | None = None,
        reader: LoraReader | None = None,
        max_resident: int = MAX_RESIDENT,
    ) -> None:
        self._model = model
        self._entries = dict(entries)
        self._device = device
        self._networks = {name: styled(network) for name, network in (networks or {}).items()}
        self._reader = reader
        self._max_resident = max_resident
        self._resident: OrderedDict[str, Future[Lora]] = OrderedDict()
        self._tried_s: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loras")

    @property
    def num_resident(self) -> int:
        """How many are in memory and stay there. May be asked from any thread."""
        return sum(reading.done() and reading.exception() is None for reading in list(self._resident.values()))

    def know(self, entries: Mapping[str, StyleLora]) -> None:
        """From now on these may be asked for. What was read for an entry that is another one now is forgotten."""
        for name in list(self._resident):
            if entries.get(name) != self._entries.get(name):
                del self._resident[name]
        self._entries = dict(entries)

    def fetch(self, weights: Iterable[tuple[str, float]]) -> tuple[ChosenLora, ...]:
        """Starts to read what isn't in memory."""
        return tuple(ChosenLora(name, weight, self._reading(name)) for name, weight in weights)

    def fetch_first(self) -> tuple[ChosenLora, ...]:
        """As many as stay in memory, each with its default weight."""
        entries = list(self._entries.values())[: self._max_resident]
        return self.fetch((entry.name, entry.weight.default) for entry in entries)

    def use(self, chosen: tuple[ChosenLora, ...]) -> bool:
        """Puts these into the networks' weights in place of those before. False: they were there already.

        Raises LoadError for one that can't be read, and whatever merging raises: a network that failed at it is then as
        it was loaded.
        """
        loras = [(choice.lora, choice.weight) for choice in chosen]
        for lora, _ in loras:
            lora.move(self._device)
        has_changed = False
        for name, network in self._networks.items():
            merges = [(lora.networks[name], weight) for lora, weight in loras if name in lora.networks]
            has_changed |= network.merge(merges)
        return has_changed

    def of_text(self, chosen: tuple[ChosenLora, ...]) -> Hashable:
        """What stands for those that change what prompts are encoded to."""
        return tuple((choice.lora.number, choice.weight) for choice in chosen if choice.lora.touches_text)

    def _reading(self, name: str) -> Future[Lora]:
        if name not in self._resident or self._may_try_again(name):
            self._resident[name] = self._start_reading(name)
            self._tried_s[name] = time.monotonic()
        self._resident.move_to_end(name)
        while len(self._resident) > self._max_resident:
            self._resident.popitem(last=False)
        return self._resident[name]

    def _may_try_again(self, name: str) -> bool:
        """A file that can't be read may have been mended. Reading it for every request would hold up the others."""
        reading = self._resident[name]
        has_failed = reading.done() and reading.exception() is not None
        return has_failed and time.monotonic() >= self._tried_s[name] + RETRY_S

    def _start_reading(self, name: str) -> Future[Lora]:
        if self._reader is not None and name in self._entries:
            return self._thread.submit(self._reader.read, self._entries[name])
        unknown: Future[Lora] = Future()
        unknown.set_exception(LoadError(f"{self._model}: this worker knows no LoRA {name!r}"))
        return unknown


class StyledNetwork:
    """A network's weights and the LoRAs that are merged into them.

    Every merge starts from a pristine copy of the layers that LoRAs touch, in float32, and is rounded to the network's
    own format once: the same LoRAs give the same weights, bit for bit, whatever was merged before.
    """

    def __init__(self, network: nn.Module) -> None:
        self._weights = {
            name: module.weight for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
        }
        self._pristine: dict[str, Tensor] = {}
        self._merged: Sequence[Merge] = []

    @torch.inference_mode()
    def merge(self, merges: Sequence[Merge]) -> bool:
        """False: these are in the weights already. A merge that fails leaves the weights as they were loaded."""
        if _are_same(merges, self._merged):
            return False
        touched = {layer for layers, _ in (*self._merged, *merges) for layer in layers}
        for layer in touched - self._pristine.keys():
            self._pristine[layer] = self._weights[layer].data.clone()
        try:
            for layer in touched:
                self._weights[layer].data.copy_(self._changed(layer, merges))
        except BaseException:
            for layer in touched:
                self._weights[layer].data.copy_(self._pristine[layer])
            self._merged = []
            raise
        self._merged = merges
        return True

    def _changed(self, layer: str, merges: Sequence[Merge]) -> Tensor:
        changes = [(layers[layer], strength) for layers, strength in merges if layer in layers]
        if not changes:
            return self._pristine[layer]
        weight = self._pristine[layer].to(torch.float32, copy=True)
        for factors, strength in changes:
            change = factors.up.float() @ factors.down.float()
            weight.add_(change.reshape(weight.shape), alpha=factors.scale * strength)
        return weight


def _are_same(one: Sequence[Merge], other: Sequence[Merge]) -> bool:
    """The same LoRAs, not others with equal factors: comparing those would take longer than merging."""
    return [(id(layers), strength) for layers, strength in one] == [
        (id(layers), strength) for layers, strength in other
    ]


_styled: weakref.WeakKeyDictionary[nn.Module, StyledNetwork] = weakref.WeakKeyDictionary()


def styled(network: nn.Module) -> StyledNetwork:
    """The one that belongs to a network: two models that share a text encoder must know what the other has merged."""
    if network not in _styled:
        _styled[network] = StyledNetwork(network)
    return _styled[network]
