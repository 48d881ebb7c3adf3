"""What the ahead-of-time gates need to know of a kernel: how a launcher calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
