"""The Triton interpreter, mended for tests (written against triton 3.7.1).

As shipped it truncates fp32 to bf16 where a GPU rounds to nearest even, does bf16 arithmetic on the raw bits, and
reads and writes outside its tensors in silence. After `install()` the casts round as hardware does, arithmetic or a
reduction in bf16 is an error (kernels upcast on load), and so is any unmasked access outside the tensors given to
the launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as shipped

_tensors: list[tuple[int, int]] = []  # [first byte, one past the last) of the tensors of the launch under way


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of x rounded to the nearest bf16, ties to even; NaN becomes the canonical quiet NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _wrap(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def _rounding_cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source != tl.bfloat16:
            return shipped.TensorHandle(fp32_to_bf16(src.data.astype(np.float32)), target)
        if source == tl.bfloat16 and target != tl.bfloat16:
            return shipped.TensorHandle(bf16_to_fp32(src.data).astype(shipped._get_np_dtype(target)), target)
        return original(self, src, dst_type)

    return cast_impl


def _refuse_bf16(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise TypeError("bf16 arithmetic: upcast with .to(tl.float32)")
        return original(self, lhs, rhs, op)

    return binary_op


def _refuse_bf16_reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_impl(self: Any, inputs: Any) -> Any:
        if inputs[0].handle.dtype.scalar == tl.bfloat16:
            raise TypeError("reduction in bf16: upcast with .to(tl.float32)")
        return original(self, inputs)

    return apply_impl


def _check_bounds(pointers: Any, mask: Any, access: str) -> None:
    width = pointers.get_element_ty().primitive_bitwidth // 8
    addresses, active = np.broadcast_arrays(pointers.data, mask.data)
    addresses = addresses[active.astype(bool)]
    inside = np.zeros(addresses.shape, dtype=bool)
    for first, end in _tensors:
        inside |= (addresses >= first) & (addresses + width <= end)
    if not inside.all():
        raise IndexError(f"{access} of {int((~inside).sum())} elements outside the tensors of the launch")


def _checked_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        _check_bounds(ptrs, mask, "load")
        return original(self, ptrs, mask, *rest)

    return create_masked_load


def _checked_store(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check_bounds(ptrs, mask, "store")
        return original(self, ptrs, value, mask, *rest)

    return create_masked_store


def _span(x: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def _noting_tensors(original: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        _tensors[:] = [(x.data_ptr(), x.data_ptr() + _span(x)) for x in tensors if x.numel()]
        with np.errstate(over="ignore"):  # unsigned words wrap by design
            return original(self, *args, **kwargs)

    return __call__


_installed = False


def install() -> None:
    """Mend the interpreter of this process; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    _wrap(shipped.InterpreterBuilder, "cast_impl", _rounding_cast)
    _wrap(shipped.InterpreterBuilder, "binary_op", _refuse_bf16)
    _wrap(shipped.InterpreterBuilder, "create_masked_load", _checked_load)
    _wrap(shipped.InterpreterBuilder, "create_masked_store", _checked_store)
    _wrap(shipped.ReduceOps, "apply_impl", _refuse_bf16_reduction)
    _wrap(shipped.GridExecutor, "__call__", _noting_tensors)
