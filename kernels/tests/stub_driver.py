"""A Triton driver that compiles for an H200 and launches nothing: what is left of a call is its host time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class _Nothing:
    """In the launcher's place."""

    def __init__(self, source: Any, metadata: Any) -> None: ...

    def __call__(self, *arguments: Any) -> None: ...


class StubDriver(DriverBase):
    """sm_90 with 227 KB of shared memory and 1,024 threads a block."""

    def __init__(self) -> None:
        self.launcher_cls = _Nothing
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (self, 0, 0, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 227 << 10}
        )

    @staticmethod
    def is_active() -> bool:
        return False  # never chosen by itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing is launched, nothing is timed")


def install() -> None:
    """Every launch of this process ends in nothing."""
    triton.runtime.driver.set_active(StubDriver())
