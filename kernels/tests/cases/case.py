"""What a case says of its op: configurations, workloads, sample arguments, planted faults, rows of the README.

The module of an op has `cases()`, `workloads()`, `samples()` (arguments of its custom ops by name, with a variant in
brackets), `FAULTS` and `ROWS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

BF16 = torch.bfloat16
ALPHAS_CUMPROD = torch.linspace(0.99, 0.01, 100)
Inputs = dict[str, Any]


def tensor(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


@dataclass(frozen=True)
class KernelCase:
    """One kernel in one configuration that its launcher can choose."""

    name: str  # unique, e.g. "implicit_reward_fwd[bf16,ref]"
    kernel: Any  # a triton.runtime.JITFunction; an interpreted function under TRITON_INTERPRET=1
    signature: dict[str, str]  # every argument that is no constexpr, in order: "*bf16" "*fp32" "i32" "i64" "fp32"
    constexprs: dict[str, object]  # block sizes and flags
    aligned: tuple[str, ...] = ()  # pointers, sizes and strides that are multiples of 16 on the fast path
    num_warps: int = 4
    num_stages: int = 3
    wide: tuple[str, ...] = ()  # pointers whose every global access is 16 bytes on NVIDIA when `aligned` holds
    min_occupancy: float = 0.25  # theoretical, of the threads of a multiprocessor
    tensor_cores: bool = False  # its products must be matrix instructions
    max_registers: int | None = None  # as the launch says, on NVIDIA; None leaves it to ptxas
    scalars_in_lanes: int = 0  # scalar registers that gfx942 may keep in lanes of vector registers

    def __post_init__(self) -> None:
        arguments = [name for name in self.kernel.arg_names if name not in self.constexprs]
        if arguments != list(self.signature):
            raise ValueError(f"{self.name}: the kernel takes {arguments}, the signature has {list(self.signature)}")
        for name in (*self.aligned, *self.wide):
            if name not in self.signature:
                raise ValueError(f"{self.name}: no argument {name!r}")
        for name in self.wide:
            if not self.signature[name].startswith("*"):
                raise ValueError(f"{self.name}: {name!r} is no pointer")


@dataclass(frozen=True)
class Workload:
    """One op in one variant.

    make(shape, dtype, device): inputs. run, eager (inputs -> outputs): the op, and plain torch in the inputs' dtypes.
    wrt: inputs that get a gradient. per: the input or output size that bytes are counted for.
    forward, backward: bytes per element at 16 bits, None where the op's docstring states none; stated: where it does.
    """

    op: str
    variant: str
    make: Callable[[tuple[int, ...], torch.dtype, str], Inputs]
    run: Callable[[Inputs], tuple[Tensor, ...]]
    eager: Callable[[Inputs], tuple[Tensor, ...]]
    wrt: tuple[str, ...]
    shape: tuple[int, ...]  # small, for tests
    forward: float | None = None
    backward: float | None = None
    stated: str = ""
    elements: Callable[[tuple[int, ...]], int] = field(default=lambda shape: int(torch.Size(shape).numel()))

    @property
    def name(self) -> str:
        return f"{self.op}[{self.variant}]" if self.variant else self.op


class Fault(NamedTuple):
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest, from kernels/tests


def on(module: str, keywords: str) -> tuple[str, ...]:
    """The tests of a module on the kernels, by keyword."""
    return f"test_{module}.py", "-k", f"triton and ({keywords})"


class Row(NamedTuple):
    """A row of the README's table of ops; bytes are per element at 16 bits."""

    op: str
    value: str
    gradient: str
    forward: str = ""
    backward: str = ""
