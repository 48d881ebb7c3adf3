"""A folder an op: what each holds, and what may import what."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest
import torch
from cases import all_cases, rows, samples, workloads

import fastpref_kernels
from fastpref_kernels import OPERATORS
from fastpref_kernels.common.operator import REGISTERED

TESTS = Path(__file__).parent
PACKAGE = Path(fastpref_kernels.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def test_the_folders_are_the_list() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {*OPERATORS, "common"}


@pytest.mark.parametrize("op", OPERATORS)
def test_an_op_has_its_files_its_oracle_and_its_case(op: str) -> None:
    names = ["__init__.py", "torch.py", *(["triton.py"] if all_cases(op)[op] else [])]
    files = [PACKAGE / op / name for name in names]
    files += [TESTS / folder / f"{op}.py" for folder in ("reference", "cases")]
    assert [str(path) for path in (*files, TESTS / f"test_{op}.py") if not path.is_file()] == []
    assert op in {w.op for w in workloads().values()} and any(row.op.startswith(f"`{op}(") for row in rows())


def test_every_registered_op_belongs_to_a_folder_and_has_sample_arguments() -> None:
    homes = {operator.plain.__module__.split(".")[1] for operator in REGISTERED.values()}
    assert homes == {*OPERATORS}
    assert {*REGISTERED} == {name.split("[")[0] for name in samples()}


def test_no_oracle_or_case_without_an_op() -> None:
    for folder, others in (("reference", {"__init__"}), ("cases", {"__init__", "case"})):
        assert {path.stem for path in (TESTS / folder).glob("*.py")} - others == {*OPERATORS}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports(path: Path) -> None:
    """Relative ones within the package, so that it works under any name; no op is imported by common/. Importing
    <op>/torch.py sets `torch` in <op>/__init__.py, so that may not mean torch by it."""
    for node in imports(path):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        inside = isinstance(node, ast.ImportFrom) and node.level
        assert inside or not any(name.startswith("fastpref") for name in names), f"line {node.lineno}"
        if path.parent.name == "common":
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), f"line {node.lineno}"
        if path.name == "__init__.py" and path.parent != PACKAGE and isinstance(node, ast.Import):
            assert not {"torch", "triton"} & {alias.asname or alias.name.split(".")[0] for alias in node.names}


@pytest.mark.parametrize("op", OPERATORS)
def test_torch_and_triton_are_the_real_ones_within_an_op(op: str) -> None:
    for name in {"torch", "triton"} & {path.stem for path in (PACKAGE / op).glob("*.py")}:
        module = importlib.import_module(f"fastpref_kernels.{op}.{name}")
        assert getattr(module, "torch", torch) is torch
        assert getattr(module, "tl", sys.modules["triton.language"]) is sys.modules["triton.language"]
