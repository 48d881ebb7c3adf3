"""A compiled UNet computes what an eager one does, in everything that a trainer asks of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastpref.config import Config, load_config
from fastpref.models import compiled
from fastpref.train.job import TrainJob
from fastpref.train.offline import OfflineTrainer
from fastpref.train.stepwise import StepwiseTrainer
from fastpref.watch import Watch

SCORER = """
def bright(images, prompts, t):
    return 1500 * images.mean(dim=(1, 2, 3)) + 800 * images.std(dim=(1, 2, 3))
"""


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced and split as always, but run by torch."""
    monkeypatch.setitem(compiled.OPTIONS, "backend", "aot_eager")
    yield
    torch._dynamo.reset()


def _assert_same(expected: tuple[list, list], found: tuple[list, list]) -> None:
    """(figures of the steps, weights): of both runs, and the weights have moved on."""
    for line, other in zip(found[0], expected[0], strict=True):
        assert line == pytest.approx(other, rel=1e-9, abs=1e-12)
    for weight, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-7, atol=1e-10)
    assert expected[0][0]["loss"] != expected[0][1]["loss"]


@pytest.mark.parametrize("graphs", [["compile=true"], ["compile=unet"]])
def test_offline_steps(sdxl_config: Callable[..., Config], one_level_unet: Path, graphs: list[str]) -> None:
    """LoRA on and off, with and without gradient, checkpointed: losses and weights as without compiling. The blocks
    are of two widths, the one graph is of one level: it takes as long as it has modules."""
    from torch._dynamo.utils import counters

    common = ["method=dpo", "precision=fp64", "gradient_checkpointing=full", "learning_rate=0.01"]
    common += [f"unet={one_level_unet}"] if "compile=unet" in graphs else []
    counters.clear()
    results = []
    for extra in ([], graphs):
        trainer = TrainJob.open(sdxl_config(*common, *extra)).trainer
        assert isinstance(trainer, OfflineTrainer)
        lines = [trainer.step(step) for step in range(2)]
        results.append((lines, [parameter.detach().clone() for parameter in trainer.policy.trainable.values()]))
        assert bool(counters["stats"]) == bool(extra)
    _assert_same(*results)


def test_a_rollout_and_its_steps(
    sdxl: Path, one_level_unet: Path, few_records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged weights, guidance, batches of several sizes, LoRA on and off: the same pairs, losses and weights."""
    (tmp_path / "steady_scorers.py").write_text(SCORER)
    monkeypatch.syspath_prepend(tmp_path)
    common = [
        *("method=spo", f"model={sdxl}", f"records={few_records}", "scorer=steady_scorers:bright", "resolution=16"),
        *("sample_steps=4", "plain_steps=2", "candidates=3", "guidance_scale=3", "rollout_prompts=3", "batch_size=4"),
        *("rollout_batch_size=2", "score_threshold=0.05", "lora_rank=4", "learning_rate=1e-3", "precision=fp64"),
        *("evaluate=false", "tracker=none", "steps=2", f"unet={one_level_unet}"),
    ]
    results = []
    for graphs in ("false", "unet"):
        trainer = TrainJob.open(load_config("", [*common, f"compile={graphs}"])).trainer
        assert isinstance(trainer, StepwiseTrainer)
        run_dir = tmp_path / graphs
        run_dir.mkdir()
        trainer.begin(run_dir, Watch())
        lines = [trainer.step(step) for step in range(2)]
        results.append((lines, [parameter.detach().clone() for parameter in trainer.policy.trainable.values()]))
    assert all(line["pairs_kept"] > 0 for line in results[0][0])
    _assert_same(*results)


def test_the_wait_is_explained(sdxl_config: Callable[..., Config], one_level_unet: Path, tmp_path: Path) -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    TrainJob.open(sdxl_config("method=sft", "compile=true", "steps=1", f"unet={one_level_unet}"), console).run(tmp_path)
    assert "0/1 compiling, which takes a while" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
