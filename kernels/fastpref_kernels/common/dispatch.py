"""Which path an op takes: Triton on a GPU, torch on the CPU and for float64.

Triton is imported only where a kernel can run: a torch built for a GPU, the interpreter (TRITON_INTERPRET=1), or
FASTPREF_KERNELS_TRITON=1 (ahead-of-time compilation on a machine without a GPU). Elsewhere `jit` leaves the kernels
as plain functions that nothing calls, so a CPU run neither needs triton nor pays for its import.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_WANTED = (
    bool(torch.version.cuda or torch.version.hip) or INTERPRETED or os.environ.get("FASTPREF_KERNELS_TRITON") == "1"
)


def _import_triton() -> Any:
    try:
        import triton
        import triton.language
    except ImportError:  # no wheel for this platform: every op has a torch path, which runs on any device
        return None, None
    return triton, triton.language


triton: Any
tl: Any
triton, tl = _import_triton() if _WANTED else (None, None)


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, or nothing where triton is not wanted.

    No variant is compiled for the values of arguments that are annotated `int` (1, multiples of 16).
    """
    if triton is None:
        return kernel
    plain = [name for name, kind in kernel.__annotations__.items() if kind == "int"]
    return triton.jit(kernel, do_not_specialize=plain)


_on_cpu = False


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Within this context CPU tensors take the Triton path, run by the interpreter; for tests."""
    global _on_cpu
    if triton is None or not INTERPRETED:
        raise RuntimeError("the Triton interpreter is off: set TRITON_INTERPRET=1 before fastpref_kernels is imported")
    previous, _on_cpu = _on_cpu, True
    try:
        yield
    finally:
        _on_cpu = previous


def use_triton(x: torch.Tensor) -> bool:
    """True if an op on `x` launches Triton kernels; float64 is for proofs and takes the torch path on every device."""
    return triton is not None and x.dtype != torch.float64 and (x.is_cuda or _on_cpu)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
