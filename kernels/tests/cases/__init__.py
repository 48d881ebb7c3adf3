"""What the tests, the benchmarks and the README know of the ops: a module for each of `OPERATORS`, see case.py."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from .case import Fault, KernelCase, Row, Workload

__all__ = ["Fault", "KernelCase", "Row", "Workload", "all_cases", "faults", "rows", "samples", "workloads"]


def _modules(op: str | None = None) -> dict[str, ModuleType]:
    from fastpref_kernels import OPERATORS  # not before: mutate.py imports a copy of the package in its forks

    return {name: import_module(f"{__name__}.{name}") for name in OPERATORS if op in (None, name)}


def all_cases(op: str | None = None) -> dict[str, list[KernelCase]]:
    """The configurations of one op or of all, by op. Raises ValueError if two have the same name."""
    found = {name: module.cases() for name, module in _modules(op).items()}
    names = [case.name for cases in found.values() for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"cases with the same name: {sorted(twice)}")
    return found


def workloads() -> dict[str, Workload]:
    """Every op at any size beside eager torch, by name."""
    return {w.name: w for module in _modules().values() for w in module.workloads()}


def samples() -> dict[str, tuple]:
    """Arguments of every custom op, by name and variant."""
    return {name: given for module in _modules().values() for name, given in module.samples().items()}


def faults() -> list[Fault]:
    """What mutate.py plants."""
    return [fault for module in _modules().values() for fault in module.FAULTS]


def rows() -> list[Row]:
    """The README's table of ops."""
    return [row for module in _modules().values() for row in module.ROWS]
