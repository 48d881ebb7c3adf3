"""What this machine offers for training, and why what is missing is."""

from __future__ import annotations

import importlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.table import Table

from fastpref.memory import free_bytes, total_bytes
from fastpref.models.attention import attention_fault
from fastpref.models.loading import resolve_device

_GB = 1e9


@dataclass(frozen=True)
class Finding:
    """One line: what, whether it can be used, and what there is to say about it."""

    name: str
    usable: bool
    note: str


def findings() -> list[Finding]:
    """Everything a recipe may ask for, tried out where a trial is cheap."""
    device = resolve_device("auto")
    return [
        Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads"),
        _gpu(),
        _package("triton", "the kernels' GPU path; without a GPU they run on the CPU in torch"),
        *(_attention(name, package, device) for name, package in (("xformers", "xformers"), ("flash", "flash-attn"))),
        _package("bitsandbytes", "8-bit optimizers"),
        _package("deepspeed", "engine=deepspeed"),
        Finding("memory", True, f"{free_bytes(_CPU) / _GB:.1f} GB free of {total_bytes(_CPU) / _GB:.1f} GB"),
        _disk(Path()),
    ]


def table(found: list[Finding]) -> Table:
    """The findings for a terminal."""
    shown = Table("", "usable", "")
    for line in found:
        shown.add_row(line.name, "yes" if line.usable else "no", line.note)
    return shown


_CPU = torch.device("cpu")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "no GPU is visible" if built else "this torch is built for the CPU only"
        return Finding("GPU", False, why)
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Finding("GPU", True, "; ".join(f"{p.name}, {p.total_memory / _GB:.0f} GB" for p in names))


def _package(name: str, use: str, trial: Callable[[str], object] = importlib.import_module) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, False, f"not installed ({use})")
    logging.disable(logging.WARNING)  # what packages say on import is said in the table, or is no matter here
    try:
        trial(name)
    except Exception as error:  # an import of a foreign package may fail in any way
        return Finding(name, False, f"{found} cannot be imported: {' '.join(str(error).split())[:120]} ({use})")
    finally:
        logging.disable(logging.NOTSET)
    return Finding(name, True, f"{found} ({use})")


def _attention(choice: str, package: str, device: torch.device) -> Finding:
    dtype = torch.bfloat16
    fault = attention_fault(choice, device, dtype)
    use = f"attention={choice}"
    if fault is None:
        return Finding(package, True, f"{version(package)} ({use})")
    return Finding(package, False, f"{fault}; attention=auto uses torch's ({use})")


def _disk(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    return Finding("disk", True, f"{usage.free / _GB:.1f} GB free of {usage.total / _GB:.1f} GB at {folder.resolve()}")
