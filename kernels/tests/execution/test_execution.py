"""The kernels as compiled for gfx942, on the CPU.

A few tests of the ops, and those of the lanes themselves (test_lanes.py), in a process with KERNELS_ON=lanes. All
tests of all ops: `make kernels`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from execution import driver

TESTS = Path(__file__).parents[1]
SELECTED = [
    "execution/test_lanes.py",
    "test_implicit_reward.py::test_matches_oracle",
    "test_dpo_loss.py::test_matches_oracle",
    "test_keyed_noise.py",
    "test_rpo_loss.py::test_worked_by_hand",
]
KEYWORDS = "lanes or triton and (bfloat16 or worked_by_hand or noise_matches)"


def test_ops_as_compiled() -> None:
    reason = driver.missing()
    if reason:
        pytest.skip(f"compiled kernels on the CPU: {reason}")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", KEYWORDS, *SELECTED]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, env=environment | {"KERNELS_ON": "lanes"})
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
