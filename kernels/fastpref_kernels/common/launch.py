"""Launches of kernels whose host time is that of one call: what a shape decides is worked out once and kept.

A launcher keeps, by shape, strides, dtype and flags (`remembered`), a `Launch`: the kernel with its grid, numbers and
constants. From its second call on a `Launch` hands the tensors to the compiled kernel and skips Triton's own look at
every argument, which takes longer than the rest: that look depends on the dtypes, which the launcher's key has, on the
numbers, which are fixed, and on which pointers are multiples of 16, which is looked at here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .dispatch import triton

Found = TypeVar("Found")
_LIMIT = 4096  # shapes that one launcher remembers
_MISSING: Any = object()
# Of Triton, whose compiled kernels take what `Launch` hands them; under another version launches go Triton's own way.
_KNOWN = ("3.6.", "3.7.")
_H200 = 132  # multiprocessors; where there is no GPU kernels are prepared as for this one


def remembered(work: Callable[..., Found]) -> Callable[..., Found]:
    """`work` of hashable arguments, done once for each; an error is not kept. Symbolic sizes, and a compiler that
    traces the call, get it done anew."""
    kept: dict[Hashable, Found] = {}

    def look_up(*key: Any) -> Found:
        if is_compiling():
            return work(*key)
        try:
            found = kept.get(key, _MISSING)
        except TypeError:  # a symbolic size has no hash
            return work(*key)
        if found is _MISSING:
            if len(kept) >= _LIMIT:
                kept.clear()
            found = kept[key] = work(*key)
        return found

    return look_up


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at the same time at least, if there is one for each."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _H200


class Launch:
    """A kernel, its grid, and all arguments but the tensors, which come first.

    numbers: the arguments behind the tensors, in order; constants: the constexprs, in order, which are the last.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], constants: dict[str, Any], num_warps: int
    ) -> None:
        self._kernel, self._grid, self._numbers = kernel, grid, numbers
        self._constants, self._options = constants, {"num_warps": num_warps}
        self._rest = (*numbers, *constants.values())
        self._compiled: dict[Hashable, Any] = {}
        self._indirect = type(kernel).__name__ != "JITFunction" or not triton.__version__.startswith(_KNOWN)

    @property
    def programs(self) -> int:
        """In the grid."""
        return int(torch.Size(self._grid).numel())

    def __call__(self, *tensors: Tensor) -> None:
        """Run it on tensors of the dtypes that it was made for."""
        places = 0
        for x in tensors:
            places |= x.data_ptr()
        # a hook, such as a profiler's, wants what only Triton's own way puts together
        if self._indirect or triton.knobs.runtime.launch_enter_hook.calls:
            self._look_and_run(tensors)
            return
        driver = triton.runtime.driver.active
        device = key = driver.get_current_device()
        if places & 15:
            key = (device, *[x.data_ptr() & 15 == 0 for x in tensors])
        found = self._compiled.get(key)
        if found is None:
            kernel = self._look_and_run(tensors)
            handles = kernel.function, kernel.packed_metadata, None, None, None
            self._compiled[key] = kernel.run, (*self._grid, 1, 1)[:3], handles
        else:
            run, grid, handles = found
            run(*grid, driver.get_current_stream(device), *handles, *tensors, *self._rest)

    def _look_and_run(self, tensors: tuple[Tensor, ...]) -> Any:
        return self._kernel[self._grid](*tensors, *self._numbers, **self._constants, **self._options)
