"""The benchmarks on a GPU, as far as a stand-in for one goes: their tensors are all there, and rows name it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

import devices  # noqa: E402
import ledger_noise  # noqa: E402
import limit  # noqa: E402
import offline_vs_reference as offline  # noqa: E402
import spo_vs_reference as spo  # noqa: E402
import worlds  # noqa: E402
from spo_bench import Bench  # noqa: E402
from stand_in_gpu import CUDA, StandInGpu  # noqa: E402

import fastpref.emoji.random_models  # noqa: E402, F401 - what is imported on the stand-in looks for a real GPU


@pytest.fixture
def waited() -> Iterator[list[str]]:
    """On the stand-in; what torch.cuda is asked to do."""
    called: list[str] = []
    with StandInGpu(), ExitStack() as stack:
        for name, answer in (("synchronize", None), ("reset_peak_memory_stats", None), ("max_memory_allocated", 7)):
            call = lambda *_, name=name, answer=answer: (called.append(name), answer)[1]  # noqa: E731
            stack.enter_context(mock.patch.object(torch.cuda, name, call))
        yield called


def test_offline_sides_and_bare_passes(tmp_path: Path, one_level_unet: Path, waited: list[str]) -> None:
    settings = worlds.open_world("random", tmp_path, ["device=cuda", f"unet={one_level_unet}"], pairs=16)
    trainer = worlds.trainer_of(settings, "method=dpo")
    assert trainer.policy.device.type == CUDA.type
    with mock.patch.object(limit, "warm_up_steps", lambda _: 1):
        rows = limit.measure(trainer, repeats=1)
    assert [row["peak_device_bytes"] for row in rows] == [7] and waited.count("synchronize") == 8
    literal = offline.literal_of(worlds.config_of(settings, "method=rpo"))
    found = offline.losses(worlds.trainer_of(settings, "method=rpo"), literal, 2)
    assert offline.check_same(found) < offline.LOSS_TOLERANCE
    two = {name: ledger_noise.LEDGERS[name] for name in ("ledger, bf16, rounded otherwise", "ledger, fp32")}
    with mock.patch.object(ledger_noise, "LEDGERS", two):
        rows = ledger_noise.measure(settings, draws=1, until=(0, 1))
    found = {(row["steps"], row["reference"]) for row in rows[1:]}
    assert found == {(steps, name) for steps in (0, 1) for name in (ledger_noise.OFF, *two)}
    assert float(rows[1]["noise_2000"]) == 0 < float(rows[0]["noise_2000"])


def test_a_round_of_spo_and_its_parts(tmp_path: Path, one_level_unet: Path, waited: list[str]) -> None:
    shape = [
        f"unet={one_level_unet}",
        "sample_steps=4",
        "plain_steps=2",
        "candidates=2",
        "batch_size=4",
        "rollout_batch_size=2",
        "score_threshold=0",
        "precision=fp64",  # with two candidates that are scored alike, rounding would choose the pair
    ]
    bench = Bench(spo.tiny_config(tmp_path, "device=cuda", *shape), 2, tmp_path)
    assert spo.difference(bench.ours(), bench.other()) <= spo.LOSS_TOLERANCE
    assert all(value > 0 for value in bench.time_parts(calls=1).values()) and "synchronize" in waited


def test_rows_say_which_device_they_are_of() -> None:
    old: dict[str, Any] = {"model": "emoji", "compile": "False"}
    rows = [old | {"device": "NVIDIA H200"}, old]
    assert [devices.device_of(row) for row in rows] == ["NVIDIA H200", "cpu"]
    assert list(limit.by_setting(rows)) == ["emoji", "emoji, NVIDIA H200"]
