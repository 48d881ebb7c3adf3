"""The layout of a kernel hub: what is in it, and that it is loaded beside the installed package."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastpref_kernels

HUB = Path(fastpref_kernels.__file__).parents[1] / "hub.py"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "new"
    subprocess.run([sys.executable, str(HUB), str(folder)], check=True, capture_output=True)
    return folder


def load(variant: Path) -> ModuleType:
    """As the library `kernels` does: under the id of the metadata, from a path that is nowhere in sys.path."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec and spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_build_is_loaded_beside_the_installed_package(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ops are its own, eagerly and as registered; values and gradients are the same."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() != HUB.parent])
    loaded = load(hub / "build" / "torch-cpu")
    assert loaded.__name__ != "fastpref_kernels" and loaded.geglu is not fastpref_kernels.geglu
    results = []
    for package in (loaded, fastpref_kernels):
        hidden = torch.linspace(-2, 2, 24).view(2, 12).requires_grad_()
        out = package.geglu(hidden)
        registered = getattr(torch.ops, package.__name__).geglu(hidden.detach())
        registered = registered[0] if isinstance(registered, tuple) else registered
        assert torch.equal(out, registered)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), hidden)))
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other) and mine.abs().sum() > 0
    assert {name.partition(".")[0] for name in sys.modules if name.startswith(loaded.__name__)} == {loaded.__name__}


def test_every_variant_is_the_package_and_says_what_it_is_for(hub: Path) -> None:
    variants = sorted((hub / "build").iterdir())
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    package = Path(fastpref_kernels.__file__).parent
    for place in (*variants, hub / "torch-ext" / "fastpref_kernels"):
        files = {path.relative_to(place): path.read_bytes() for path in place.rglob("*.py")}
        assert files == {path.relative_to(package): path.read_bytes() for path in package.rglob("*.py")}
    facts = [json.loads((variant / "metadata.json").read_text()) for variant in variants]
    assert [fact["backend"]["type"] for fact in facts] == ["cpu", "cuda", "rocm"]
    assert len({fact["id"] for fact in facts}) == 1 and facts[0]["id"].isidentifier()
    assert 'name = "fastpref-kernels"' in (hub / "build.toml").read_text() and (hub / "README.md").is_file()


LIBRARY = """
import sys, torch, fastpref_kernels
from pathlib import Path
from kernels import get_local_kernel
from kernels._rust import Build
hub = Path(sys.argv[1])
assert [str(backend) for backend in Build.open(hub).general.backends] == ["cpu", "cuda", "rocm"]
loaded, hidden = get_local_kernel(hub, backend="cpu"), torch.linspace(-2, 2, 24).view(2, 12)
assert torch.equal(loaded.geglu(hidden), fastpref_kernels.geglu(hidden)) and loaded.__name__ != "fastpref_kernels"
"""


def test_the_library_itself_loads_it(hub: Path) -> None:
    """In a process of its own: here the name `kernels` is the folder's."""
    there = subprocess.run([sys.executable, "-c", "import kernels.load"], capture_output=True, cwd=hub)
    if there.returncode:
        pytest.skip("needs the package kernels")
    result = subprocess.run([sys.executable, "-c", LIBRARY, str(hub)], capture_output=True, text=True, cwd=hub)
    assert result.returncode == 0, result.stderr


def test_a_folder_with_something_in_it_is_left_alone(hub: Path) -> None:
    before = sorted(hub.rglob("*"))
    result = subprocess.run([sys.executable, str(HUB), str(hub)], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "is not empty" in result.stderr
    assert sorted(hub.rglob("*")) == before
