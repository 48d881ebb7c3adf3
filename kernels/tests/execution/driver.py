"""A Triton driver whose device is the CPU, lane by lane: `install()`, then launch kernels on CPU tensors as on a GPU.

Triton specialises and compiles the launch for gfx942 as it would there; what runs is its LLVM IR (see lower.py).
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from . import lower

VERSION = "3.7.1"
WAVE = 64


def missing() -> str | None:
    """Why this machine cannot run the compiled kernels, or None."""
    if triton.__version__ != VERSION:
        return f"reads the LLVM IR of triton {VERSION}, this is {triton.__version__}"
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "needs Linux on x86-64"
    return None if shutil.which("gcc") else "needs gcc"


class _Launcher:
    """Puts a launch's arguments into slots of 8 bytes and runs the grid."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kinds = list(source.signature.values())
        self.threads = metadata.num_warps * WAVE

    def __call__(self, x: int, y: int, z: int, stream: int, entry: Any, *rest: Any) -> None:
        arguments = rest[4:]  # after the packed metadata, the launch metadata and two hooks
        slots = [_slot(kind, value) for kind, value in zip(self.kinds, arguments, strict=True) if kind != "constexpr"]
        packed = b"".join(slots) + bytes(16)  # two scratch pointers that no kernel here uses
        if lower.runtime().lanes_run(entry, packed, x, y, z, self.threads):
            raise RuntimeError("the lanes wait for each other for ever")


def _slot(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return struct.pack("<Q", value.data_ptr())
    if kind == "fp32":
        return struct.pack("<f4x", value)
    return struct.pack("<q", int(value))


class LaneDriver(DriverBase):
    """gfx942 as Triton sees it: 64 KB of local memory, waves of 64, at most 1024 lanes."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.libraries: list[ctypes.CDLL] = []
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda device: {"max_shared_mem": 64 << 10}
        )

    def note_files(self, module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
        self.files = files

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        path = next(path for file, path in self.files.items() if file.endswith(".llir"))
        library = lower.library(Path(path).read_text(), name)
        self.libraries.append(library)
        return library, ctypes.cast(library.entry, ctypes.c_void_p), 0, 0, 1024

    @staticmethod
    def is_active() -> bool:
        return False  # never chosen by itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", "gfx942", WAVE)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("lanes on a CPU are not timed")


def install() -> None:
    """Every launch of this process runs on the CPU. Raises RuntimeError where it cannot, see `missing`."""
    reason = missing()
    if reason:
        raise RuntimeError(reason)
    os.environ["TRITON_CACHE_DIR"] = str(lower.CACHE / "triton")
    os.environ["AMDGCN_USE_BUFFER_OPS"] = "0"  # plain pointers, which a CPU has too
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    driver = LaneDriver()
    knobs.runtime.kernel_load_start_hook.add(driver.note_files)
    triton.runtime.driver.set_active(driver)


@contextmanager
def without_barriers() -> Iterator[None]:
    """Within this context lanes run past every barrier."""
    flag = ctypes.c_int.in_dll(lower.runtime(), "lanes_without_barriers")
    flag.value = 1
    try:
        yield
    finally:
        flag.value = 0
