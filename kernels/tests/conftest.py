"""Both paths of every op in one process: the CPU path, and the Triton kernels in the mended interpreter.

KERNELS_ON=lanes has the Triton kernels not interpreted but compiled for gfx942 and executed lane by lane (execution/);
KERNELS_ON=gpu leaves them to the GPU, for the tests of gpu/ alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

# read by triton and by fastpref_kernels when they are imported
os.environ.setdefault("FASTPREF_KERNELS_TRITON" if os.environ.get("KERNELS_ON") else "TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))  # interpreter, reference and tolerances, whatever the import mode

import pytest
import torch

from fastpref_kernels.common import dispatch

WHERE = os.environ.get("KERNELS_ON", "interpreter")
if WHERE == "lanes":
    from execution import driver

    collect_ignore = ["test_interpreter.py", "execution/test_execution.py", "gpu", "mutation", "static"]
    driver.install()
    dispatch.INTERPRETED = True  # in triton_on_cpu() only: CPU tensors may take the Triton path
elif WHERE == "interpreter":
    import interpreter

    if not dispatch.INTERPRETED:
        raise RuntimeError("fastpref_kernels is already imported: set TRITON_INTERPRET=1 before pytest starts")
    collect_ignore = ["execution/test_lanes.py"]
    interpreter.install()
elif WHERE != "gpu":
    raise RuntimeError(f"KERNELS_ON must be interpreter, lanes or gpu, got {WHERE!r}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Lanes are not watched: tests that count accesses or launches, or pick programs, belong to the interpreter, and
    so do those that launch no kernel at all."""
    if WHERE != "lanes":
        return
    inside = {"traffic", "only", "shuffled", "interpreter", "GridExecutor", "shipped", "counted"}
    launches = [item for item in items if isinstance(item, pytest.Function) and _launches(item)]
    for item in launches:
        if inside & set(item.function.__code__.co_names):
            item.add_marker(pytest.mark.skip(reason="looks into the interpreter"))
    config.hook.pytest_deselected(items=[item for item in items if item not in launches])
    items[:] = launches


def _launches(item: pytest.Function) -> bool:
    """False for the tests of whole models, of registration and of float64 gradients that take the CPU path alone."""
    if {"path", "triton_path"} & set(item.fixturenames):
        return True
    return item.path.stem not in ("test_custom_ops", "test_patch", "test_recipes") and "gradcheck" not in item.name


@pytest.fixture(params=["triton"] if WHERE == "lanes" else ["cpu", "triton"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on the CPU path and on the kernels."""
    with dispatch.triton_on_cpu() if request.param == "triton" else nullcontext():
        yield request.param


@pytest.fixture
def triton_path() -> Iterator[None]:
    """CPU tensors take the kernels, interpreted or executed lane by lane."""
    with dispatch.triton_on_cpu():
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty starts as NaN (integers: their maximum), so an element that no kernel writes shows."""
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import the compiler: seconds
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
