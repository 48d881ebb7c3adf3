"""Kernels and bytes of code that runs on fake tensors: what each operator launches on a GPU, and what it moves.

A kernel reads each of its operands and writes each of its results once, an expanded dimension counted once, what a
cache may save not at all. Operators that launch several kernels, read an operand twice or leave one unread are listed
below, with the reason. Counted for NVIDIA's path: cuBLAS adds a bias in the product's own kernel, cuDNN's convolution
does not. What libraries decide at run time (a product split along its inner dimension, a convolution's change of
layout) is not in the count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fastpref.plan.meter import operations_of

CASTS = "copies between dtypes"
FUSED = "fused by inductor"
GROUPS = (
    "matrix products",
    "LoRA products",
    "convolutions",
    "attention",
    "norms",
    "elementwise",
    FUSED,
    CASTS,
    "copies, cat",
    "reductions",
    "other",
)
LIBRARIES = GROUPS[:4]

_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
_COPIES = {
    "_to_copy",
    "copy_",
    "clone",
    "cat",
    "slice_backward",
    "select_backward",
    "fill_",
    "zero_",
    "constant_pad_nd",
}
_COPIES |= {"zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "repeat", "slice_scatter"}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
_OVERWRITTEN = {"copy_", "fill_", "zero_"}  # whose first operand is not read

# (kernels, how often the first two operands are read)
_SEVERAL: dict[str, tuple[int, int]] = {
    "native_group_norm": (3, 2),  # moments; their product with the gains, small; normalisation
    "native_group_norm_backward": (4, 2),  # sums of dy and x·dy; two small ones for the coefficients; dx
    "native_layer_norm": (1, 1),  # a row stays in the cache between its moments and its normalisation
    "native_layer_norm_backward": (1, 1),  # the same; gains and offsets are frozen
    "_scaled_dot_product_flash_attention_for_cpu_backward": (3, 1),  # rows of dO·O; dQ, dK, dV; dQ to 16 bits
    "slice_backward": (2, 1),  # zeros, then a copy into them
    "select_backward": (2, 1),
    "group_norm_silu": (2, 2),  # kernels/fastpref_kernels/group_norm_silu: moments, normalisation
    "group_norm_silu_backward": (2, 2),
}


BANDWIDTH, RATE = 4.26e12, 790e12  # an H200's, measured: bytes/s of a large copy, operations/s of bf16 products


@dataclass
class Tally:
    """Of one operator."""

    launches: int = 0
    moved: int = 0  # bytes
    flops: int = 0
    seconds: float = 0.0  # modelled, not measured: bytes or operations, whichever takes longer

    def add(self, launches: int, moved: int, flops: int = 0) -> None:
        """One more call."""
        self.merge(Tally(launches, moved, flops, max(moved / BANDWIDTH, flops / RATE)))

    def merge(self, other: Tally) -> None:
        """All calls of another."""
        self.launches += other.launches
        self.moved += other.moved
        self.flops += other.flops
        self.seconds += other.seconds


class PassMeter(TorchDispatchMode):
    """Counts what runs inside, by (group, operator)."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[torch.Tensor] = []
        self.found: dict[tuple[str, str], Tally] = defaultdict(Tally)
        self.casts_in_blocks = 0
        self._depth = 0
        self._frozen: Any = WeakIdKeyDictionary()

    def freeze(self, weights: Iterable[torch.Tensor]) -> PassMeter:
        """Tell it the weights that are not trained: a product with none of them is one of the LoRA."""
        self.frozen = list(weights)
        for tensor in self.frozen:
            self._frozen[tensor.untyped_storage()] = None
        return self

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Torch compiles below this mode, too."""
        return True

    @contextmanager
    def blocks(self, unet: Any) -> Iterator[None]:
        """Inside, casts in the down, mid and up blocks of ``unet`` are counted apart: all but the fp32 islands."""

        def step(by: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self._depth += by

            return hook

        handles = []
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            handles += [block.register_forward_pre_hook(step(1)), block.register_forward_hook(step(-1))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace != "prim" and not func.is_view and name not in _ALLOCATIONS and tree_leaves(out):
            self._count(func, name, args, kwargs, out)
        return out

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        special = _SPECIAL.get(name)
        if special is not None:
            for entry, launches, moved, flops in special(args, out):
                self.found[entry].add(launches, moved, flops)
            return
        group = self._group(func, name, args, out)
        launches, reads = _SEVERAL.get(name, (1, 1))
        results = {argument.name for argument in func._schema.arguments if argument.is_out}
        given = args, {key: value for key, value in kwargs.items() if key not in results}
        operands = [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)]
        read = sum(map(_bytes, operands[1:] if name in _OVERWRITTEN else operands))
        read += (reads - 1) * sum(map(_bytes, operands[: 2 if name.endswith("backward") else 1]))
        written = sum(map(_bytes, (x for x in tree_leaves(out) if isinstance(x, torch.Tensor))))
        self.found[group, name].add(launches, read + written, operations_of(func, args, kwargs, out))
        if group == CASTS and self._depth:
            self.casts_in_blocks += 1

    def _group(self, func: Any, name: str, args: Any, out: Any) -> str:
        if name in _PRODUCTS:
            factors = [x for x in args[-2:] if isinstance(x, torch.Tensor)]
            return GROUPS[0 if any(x.untyped_storage() in self._frozen for x in factors) else 1]
        if "attention" in name:
            return "attention"
        if "norm" in name:
            return "norms"
        if name in _COPIES:
            source = args[1] if name == "copy_" else args[0] if args else None
            changed = name in ("_to_copy", "copy_") and isinstance(source, torch.Tensor) and source.dtype != out.dtype
            return CASTS if changed else "copies, cat"
        if name in ("sum", "mean"):
            return "reductions"
        pointwise = torch.Tag.pointwise in func.tags or name.removesuffix("_backward") in ("gelu", "silu", "geglu")
        return "elementwise" if pointwise else "other"


Entry = tuple[tuple[str, str], int, int, int]


def _convolution(args: Any, out: Any) -> list[Entry]:
    """cuDNN's has no bias: torch adds it in a kernel of its own."""
    x, weight, bias = args[:3]
    flops = operations_of(torch.ops.aten.convolution.default, args, {}, out)
    found: list[Entry] = [(("convolutions", "convolution"), 1, _bytes(x) + _bytes(weight) + _bytes(out), flops)]
    if bias is not None:
        found.append((("elementwise", "bias of a convolution"), 1, 2 * _bytes(out) + _bytes(bias), 0))
    return found


def _convolution_backward(args: Any, out: Any) -> list[Entry]:
    """A kernel a gradient that is asked for; only those of the weights read the input."""
    grad, x, weight = args[:3]
    flops = operations_of(torch.ops.aten.convolution_backward.default, args, {}, out)
    wanted = [gradient is not None for gradient in out[:2]]
    moved = sum(_bytes(grad) + _bytes(weight if of_input else x) for of_input in (True, False) if wanted[not of_input])
    moved += sum(_bytes(gradient) for gradient in out if gradient is not None)
    return [(("convolutions", "convolution_backward"), sum(wanted), moved, flops)]


def _lora_linear(args: Any, out: Any) -> list[Entry]:
    """The low-rank factor, then both products, one onto the other; fp32 weights of a LoRA are cast by the op."""
    x, weight, bias, lora_a, lora_b, _ = args
    found: list[Entry] = _fp32_loras(x, lora_a, lora_b)
    rows = x.numel() // x.shape[-1]
    outputs, inputs, rank = *weight.shape, lora_a.shape[0]
    low = rows * rank * x.element_size()
    found.append((("LoRA products", "lora_linear: t"), 1, _bytes(x) + _half(lora_a, x) + low, 2 * rows * inputs * rank))
    moved = _bytes(x) + _bytes(weight) + _bytes(out[0]) + (0 if bias is None else _bytes(bias))
    return found + _both(moved, rows, (inputs, outputs), rank, _half(lora_b, x) + low, _bytes(out[0]))


def _both(moved: int, rows: int, sizes: tuple[int, int], rank: int, factors: int, result: int) -> list[Entry]:
    """The product with the weight, ``moved`` bytes, and onto it that of the two ``factors``."""
    large, small = 2 * rows * sizes[0] * sizes[1], 2 * rows * sizes[1] * rank
    product: Entry = (("matrix products", "lora_linear"), 1, moved, large)
    return [product, (("LoRA products", "lora_linear: onto y"), 1, factors + 2 * result, small)]


def _lora_linear_backward(args: Any, out: Any) -> list[Entry]:
    grad, x, weight, lora_a, lora_b, t, _, needs_x, needs_lora = args
    found: list[Entry] = _fp32_loras(x, lora_a, lora_b)
    rows = x.numel() // x.shape[-1]
    outputs, inputs, rank = *weight.shape, lora_a.shape[0]
    low = _bytes(t)
    found.append(
        (("LoRA products", "lora_linear: u"), 1, _bytes(grad) + _half(lora_b, x) + low, 2 * rows * outputs * rank)
    )
    if needs_x:
        moved = _bytes(grad) + _bytes(weight) + _bytes(out[0])
        found += _both(moved, rows, (outputs, inputs), rank, _half(lora_a, x) + low, _bytes(out[0]))
    if needs_lora:
        moved = _bytes(x) + _bytes(grad) + 2 * low + _half(lora_a, x) + _half(lora_b, x)
        found.append((("LoRA products", "lora_linear: dA, dB"), 2, moved, 2 * rows * rank * (inputs + outputs)))
        found += _fp32_loras(x, lora_a, lora_b)
    return found


def _fp32_loras(x: torch.Tensor, *loras: torch.Tensor) -> list[Entry]:
    wide = [lora for lora in loras if lora.dtype != x.dtype]
    return [((CASTS, "in lora_linear"), len(wide), sum(_bytes(w) + _half(w, x) for w in wide), 0)] if wide else []


_SPECIAL: dict[str, Callable[[Any, Any], list[Entry]]] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "lora_linear": _lora_linear,
    "lora_linear_backward": _lora_linear_backward,
}


def _half(weight: torch.Tensor, x: torch.Tensor) -> int:
    """Bytes of a weight in the precision of x."""
    return weight.numel() * x.element_size()


def _bytes(x: torch.Tensor) -> int:
    count = 1 if x.numel() else 0
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


class CudaAutocast(TorchFunctionMode):
    """Norms as autocast treats them on CUDA, operands and results in fp32; its list for CPUs leaves them in half."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.layer_norm, functional.group_norm):
            args = tuple(x.float() if isinstance(x, torch.Tensor) else x for x in args)
            kwargs = {k: x.float() if isinstance(x, torch.Tensor) else x for k, x in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))
