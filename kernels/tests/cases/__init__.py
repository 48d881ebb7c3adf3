"""Every kernel in every configuration that its launcher can choose, a module for each op."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from .case import KernelCase

__all__ = ["KernelCase", "all_cases", "op_names"]


def op_names() -> list[str]:
    """The ops that have cases: the modules of this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "case"))


def all_cases(op: str | None = None) -> dict[str, list[KernelCase]]:
    """The cases of one op or of all, by op. Raises ValueError if two have the same name."""
    found = {name: import_module(f"{__name__}.{name}").cases() for name in ([op] if op else op_names())}
    names = [case.name for cases in found.values() for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"cases with the same name: {sorted(twice)}")
    return found
