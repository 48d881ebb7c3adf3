"""Peak memory and floating-point operations of code that runs on fake tensors: shapes and lifetimes, no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

import fastpref_kernels  # noqa: F401 - registers its ops


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that are alive, and their maximum; ``known`` are not counted.

    Tensors named by :meth:`set_aside` leave the ``rest``, whose maximum is kept too: that is how gradients are told
    from activations.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = self.rest = self.rest_peak = 0
        self._seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._count(value)
        return out

    def set_aside(self, tensor: torch.Tensor) -> None:
        """Count the tensor among all, but no longer in the rest."""
        entry = self._seen.get(tensor.untyped_storage())
        if entry is not None and not entry.aside:
            entry.aside = True
            self.rest -= entry.size

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        entry = _Entry(storage.nbytes())
        entry.reference = weakref.ref(storage, lambda _: self._drop(entry))
        self._seen[storage] = entry
        self.live += entry.size
        self.rest += entry.size
        self.peak, self.rest_peak = max(self.peak, self.live), max(self.rest_peak, self.rest)

    def _drop(self, entry: _Entry) -> None:
        self.live -= entry.size
        self.rest -= 0 if entry.aside else entry.size


class _Entry:
    """One counted storage."""

    reference: Any

    def __init__(self, size: int) -> None:
        self.size, self.aside = size, False


class Operations(TorchDispatchMode):
    """Floating-point operations by torch's formulas, a multiplication and an addition being two.

    torch's own FlopCounterMode attributes them to modules by hooks on their tensors, which keep what checkpointing
    recomputes alive until it is left: no peak can be taken at the same time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += operations_of(func, args, kwargs or {}, out)
        return out


def operations_of(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of one operator by torch's formula; 0 if it has none."""
    formula = _FORMULAS.get(func.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _lora_linear(x: Any, weight: Any, _: Any, lora_a: Any, lora_b: Any, *__: Any, **___: Any) -> int:
    return 2 * (x.numel() // x.shape[-1]) * (weight.numel() + lora_a.numel() + lora_b.numel())


def _lora_linear_backward(
    grad: Any, x: Any, weight: Any, lora_a: Any, lora_b: Any, *rest: Any, out_val: Any = None
) -> int:
    *_, needs_x, needs_lora = rest
    products = lora_b.numel() + needs_x * (weight.numel() + lora_a.numel())
    return 2 * (x.numel() // x.shape[-1]) * (products + needs_lora * (lora_a.numel() + lora_b.numel()))


_FORMULAS: dict[Any, Any] = {
    **flop_registry,  # and what torch does not know: the CPU's fused attention, the fused LoRA layer
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.fastpref_kernels.lora_linear: _lora_linear,
    torch.ops.fastpref_kernels.lora_linear_backward: _lora_linear_backward,
}
