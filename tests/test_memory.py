"""Freed memory and where it goes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# A new interpreter each, for its environment and its own peak; torch, which this needs none of, would take seconds.
IMPORT = "import sys, types; sys.modules['torch'] = types.ModuleType('torch')\n"
HOLES = f"""{IMPORT}
from fastpref.memory import give_back_freed_blocks, resident_bytes
give_back_freed_blocks()
bytearray(30 << 20)  # glibc learns from it to keep what is smaller
blocks = [bytearray(b"x") * (4 << 20) for _ in range(32)]
full = resident_bytes()
del blocks[::2]
print((full - resident_bytes()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize(("environment", "given_back"), [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "33554432"}, False)])
def test_freed_blocks_between_others_go_back_to_the_system(environment: dict[str, str], given_back: bool) -> None:
    """Sixteen of 4 MiB, unless the user's own setting says otherwise."""
    command = [sys.executable, "-c", HOLES]
    done = subprocess.run(command, check=True, text=True, capture_output=True, env=os.environ | environment)
    assert (int(done.stdout) >= 60) == given_back


PEAK = f"{IMPORT}from fastpref.memory import peak_rss_bytes; bytearray(b'x') * (100 << 20); print(peak_rss_bytes())"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere getrusage is all there is")
def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    """On Linux getrusage's ru_maxrss outlives exec: it would give a child what its parent held."""
    held = bytearray(b"x") * (400 << 20)
    done = subprocess.run([sys.executable, "-c", PEAK], check=True, text=True, capture_output=True)
    assert 100 << 20 <= int(done.stdout) < len(held)
