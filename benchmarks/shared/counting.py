"""What calls on the meta device would take of a real one: arithmetic, traffic, and memory."""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

META = torch.device("meta")


@dataclass(frozen=True)
class Attention:
    """One shape of attention: query and key are "b heads tokens width"."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    is_causal: bool
    has_mask: bool


class Counter:
    """What calls on the meta device would cost a device, operation by operation.

    `kernels` has the FLOPs and the bytes read and written of each. One operation is about one kernel in eager mode.
    Count outside of `torch.inference_mode`, which hides the parts of composite operations.
    """

    def __init__(self) -> None:
        self.kernels: list[tuple[int, int]] = []
        self.attentions: dict[Attention, int] = {}
        self._modes = ExitStack()

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self.kernels)

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self.kernels)

    def __enter__(self) -> Self:
        self._modes.enter_context(torch.no_grad())
        self._modes.enter_context(_Operations(self))
        self._modes.enter_context(_Attentions(self))
        return self

    def __exit__(self, *details: object) -> None:
        self._modes.close()

    def add(self, flops: int, *touched: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(touched) if isinstance(leaf, Tensor)]
        self.kernels.append((flops, sum(tensor.numel() * tensor.element_size() for tensor in tensors)))


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh")

    def __init__(self, counter: Counter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if not func.is_view and packet.__name__ not in self.FREE:
            count = flop_registry.get(packet)
            flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=output)
            self._counter.add(flops, args, kwargs, output)
        return output


class _Attentions(TorchFunctionMode):
    """Attention as the one kernel that it is on a device; the meta device would take it apart."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **named: Any
    ) -> Tensor:
        attention = Attention(
            tuple(query.shape), tuple(key.shape), bool(named.get("is_causal", False)), attn_mask is not None
        )
        self._counter.attentions[attention] = self._counter.attentions.get(attention, 0) + 1
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        num_products = query.shape[:-1].numel() * key.shape[-2]
        flops = 2 * num_products * (query.shape[-1] + value.shape[-1])
        self._counter.add(flops, query, key, value, attn_mask, output)
        return output


class Peak:
    """The most bytes that tensors made inside it take at once, on the meta device too: `num_bytes`.

    Attention counts as one kernel, and kernels' own workspaces don't count. Not inside `torch.inference_mode`. With
    `is_training` gradients are followed, attention is the caller's to choose a kernel for, and `flops` is counted.
    """

    def __init__(self, is_training: bool = False) -> None:
        self.num_bytes = self.flops = self._live = 0
        self._is_training = is_training
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        if not self._is_training:
            self._modes.enter_context(torch.no_grad())
        self._modes.enter_context(_Allocations(self))
        if not self._is_training:
            self._modes.enter_context(_Attentions(Counter()))
        return self

    def __exit__(self, *details: object) -> None:
        self._modes.close()

    def hold(self, storage: torch.UntypedStorage) -> None:
        self._live += storage.nbytes()
        self.num_bytes = max(self.num_bytes, self._live)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, num_bytes: int) -> None:
        self._live -= num_bytes


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, peak: Peak) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._peak = peak
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self._peak.flops += count(*args, **(kwargs or {}), out_val=output)
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(output):
            if storage._cdata not in given and storage not in self._known:
                self._known[storage] = True
                self._peak.hold(storage)
        return output


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
