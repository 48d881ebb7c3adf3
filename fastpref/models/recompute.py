"""What a backward computes again instead of reading it from memory.

``full`` keeps the input of every residual and transformer block and runs the block's forward again (Chen et al., arXiv
1604.06174). ``selective`` keeps what matrix products, convolutions and attention have computed, and computes norms and
activations again when a gradient asks for them: no matrix work is done twice. Both give the gradients of ``none`` bit
for bit, as far as an op repeated on the same input gives the same result. Both can be captured in a CUDA graph, which
also removes what they cost in Python: they read nothing from the device and leave its random numbers alone.

torch's own selective checkpointing chooses, op by op, what to keep *besides* a block's input. Of a LoRA layer that
would be the product with the frozen weight and the one of the adapter, of which autograd needs neither: more memory
than without checkpointing. Here autograd keeps what it needs, the result of a cheap op as a recipe for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fastpref_kernels import MEMORY_BOUND

MODES = ("none", "selective", "full")  # the fastest first
Region = Callable[..., Any]  # (function, *arguments) -> function(*arguments)

# Their backward keeps the input in any case, so that a recipe needs no memory of its own. A sum is not among them: one
# that is kept stands for two products that need not be.
_CHEAP = frozenset([F.layer_norm, F.group_norm, F.silu, F.gelu, torch.Tensor.mul, *MEMORY_BOUND])


def set_recomputation(unet: Any, mode: str) -> None:
    """Make the blocks of a diffusers UNet recompute as ``mode`` says; ``auto``, before it is resolved, is ``none``."""
    region = recomputed_region(mode)
    if region is None:
        unet.disable_gradient_checkpointing()
    else:
        unet.enable_gradient_checkpointing(region)


def recomputed_region(mode: str) -> Region | None:
    """What calls a block so that its backward recomputes as ``mode`` says; None if it recomputes nothing."""
    return {"selective": _selective, "full": _full}.get(mode)


def _full(function: Callable[..., Any], *arguments: Any) -> Any:
    # In eval mode nothing in a block is random.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _selective(function: Callable[..., Any], *arguments: Any) -> Any:
    # The backward of a compiled block computes norms and activations again anyway: its compiler sees to that.
    if torch.compiler.is_compiling() or getattr(function, "_compiled_call_impl", None) is not None:
        return function(*arguments)
    recipes = _Recipes()
    try:
        with recipes, saved_tensors_hooks(recipes.pack, _unpack):
            return function(*arguments)
    finally:
        recipes.made.clear()  # what autograd has not saved by now nobody will ask for


class _Recipe:
    """How the outputs of an op are computed again, once for all that ask for them."""

    def __init__(self, function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], device: str) -> None:
        self._function, self._args, self._kwargs, self._device = function, args, kwargs, device
        self._autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self._outputs: tuple[Tensor, ...] | None = None

    def output(self, number: int) -> Tensor:
        """One output. It stays in memory until the last saved tensor that refers to this recipe is released."""
        if self._outputs is None:
            with torch.no_grad():
                if self._autocast is None:
                    self._outputs = self._computed()
                else:
                    with torch.autocast(self._device, self._autocast, cache_enabled=False):
                        self._outputs = self._computed()
        return self._outputs[number]

    def _computed(self) -> tuple[Tensor, ...]:
        kwargs = {name: _unpack(value) for name, value in self._kwargs.items()}
        return _outputs(self._function(*map(_unpack, self._args), **kwargs))


@dataclass(slots=True, eq=False)
class _Kept:
    """A tensor in memory that a recipe starts from."""

    tensor: Tensor
    version: int

    def value(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError("a tensor that a norm or activation is computed again from was changed in place")
        return self.tensor


@dataclass(slots=True, eq=False)
class _Made:
    """An output of a recipe, while its memory is there."""

    storage: weakref.ref[torch.UntypedStorage]
    recipe: _Recipe
    number: int
    dtype: torch.dtype
    version: int


@dataclass(slots=True, eq=False)
class _View:
    """A tensor that lay in the memory of a recipe's output."""

    recipe: _Recipe
    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def value(self) -> Tensor:
        return self.recipe.output(self.number).as_strided(self.size, self.stride, self.offset)


def _unpack(packed: Any) -> Any:
    return packed.value() if isinstance(packed, _Kept | _View) else packed


class _Recipes(TorchFunctionMode):
    """Inside, the results of cheap ops are remembered with their recipes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, _Made] = {}  # by the address of a storage

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in _CHEAP:
            self._remember(func, args, kwargs or {}, _outputs(found))
        return found

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """What is kept of a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        made = self.made.get(storage._cdata)
        if made is None or made.storage() is not storage:
            return tensor
        if made.version != tensor._version or made.dtype != tensor.dtype:
            return tensor  # changed since then
        return _View(made.recipe, made.number, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _remember(self, func: Any, args: Any, kwargs: dict[str, Any], outputs: tuple[Tensor, ...]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if any(output is value for output in outputs for value in given):
            return  # done in place
        if func is torch.Tensor.mul and not (len(given) == 2 and all(value.requires_grad for value in given)):
            return  # a factor is kept for the gradient of the other one only
        packed = [self._given(value) for value in args]
        recipe = _Recipe(func, packed, {k: self._given(v) for k, v in kwargs.items()}, given[0].device.type)
        for number, output in enumerate(outputs):
            storage = output.untyped_storage()
            self.made[storage._cdata] = _Made(weakref.ref(storage), recipe, number, output.dtype, output._version)

    def _given(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        packed = self.pack(value)
        return packed if isinstance(packed, _View) else _Kept(value.detach(), value._version)


def _outputs(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)
