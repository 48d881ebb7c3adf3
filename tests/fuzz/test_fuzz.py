"""Eighty-eight of the fuzz cases, two hundred and twenty with the thorough ones; `make fuzz` runs thousands.

``python tests/fuzz/fuzz.py --only N`` repeats one.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.damage import damage_bytes, damage_text
from fuzz.fuzz import run_case
from fuzz.targets import TARGETS
from fuzz.world import World

CASES, GROUPS, QUICK = 220, 10, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield World.make(tmp_path_factory.mktemp("fuzz"))
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "group", [*range(QUICK), *(pytest.param(group, marks=pytest.mark.thorough) for group in range(QUICK, GROUPS))]
)
def test_damage_is_refused_or_makes_no_difference(
    world: World, tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = []
    for number in range(group, CASES, GROUPS):
        folder = tmp_path / str(number)
        folder.mkdir()
        results.append(run_case(world, 0, number, folder))
    assert not [result.line for result in results if result.outcome == "fault"]
    outcomes = Counter(result.outcome for result in results)
    assert outcomes["taken"] and outcomes["refused"]
    assert len({result.target for result in results}) >= len(TARGETS) - 3


def test_a_case_is_a_function_of_its_number() -> None:
    data = bytes(range(256)) * 4
    for damage in (damage_bytes, damage_text):
        found = [damage(random.Random(f"0 {number}"), data) for number in range(200)]
        assert found == [damage(random.Random(f"0 {number}"), data) for number in range(200)]
        assert all(damaged != data for damaged, _ in found) and len({damaged for damaged, _ in found}) > 150
