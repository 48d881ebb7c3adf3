"""The device a benchmark runs on: chosen with --device, named in every row, and waited for where time is taken."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastpref.models.loading import resolve_device

CPU = "cpu"
_HOST = torch.device(CPU)


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device auto|cpu|cuda``; auto is the GPU if there is one."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )


def open_device(options: argparse.Namespace) -> torch.device:
    """The chosen device; raises :class:`fastpref.errors.UserError` for a GPU that is not there."""
    return resolve_device(options.device)


def name_of(device: torch.device) -> str:
    """What a row says: 'cpu', or the card's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else CPU


def device_of(row: dict[str, Any]) -> str:
    """The device of a row; rows from before there was a choice are a CPU's."""
    return str(row.get("device") or CPU)


def several_devices(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a table has to say which device a row is of."""
    return {device_of(row) for row in rows} not in (set(), {CPU})


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device = _HOST) -> float:
    """Wall-clock seconds of one call, until the device is done with it."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def warm_up_steps(device: torch.device) -> int:
    """Steps until one is as all later ones: on a GPU algorithms are chosen, kernels compiled and graphs captured."""
    return 5 if device.type == "cuda" else 1


def forget_peak(device: torch.device) -> None:
    """Let :func:`peak_device_bytes` start anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_bytes(device: torch.device) -> int | str:
    """Most bytes of tensors that the device held at once; nothing to say on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else ""
