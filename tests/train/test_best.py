"""The best checkpoint: which one it is, that it stays, and that what is exported are its weights."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.runs import run_training
from fastpref.train.best import BestCheckpoint
from fastpref.train.job import Stopped
from fastpref.train.offline import OfflineTrainer

EVERY = 2


def steps(*losses: float | None) -> list[dict[str, Any]]:
    return [{"loss": loss, "margin": loss, "accuracy": None} for loss in losses]


@pytest.mark.parametrize(
    ("metric", "best"),
    [("loss", (4, 1.0)), ("margin", (2, 3.0)), ("accuracy", None), (None, None)],
)
def test_means_over_all_steps_since_the_checkpoint_before(
    tmp_path: Path, metric: str | None, best: tuple[int, float] | None
) -> None:
    """NaN does not count, nor do equals; a state goes on where it was."""
    found = BestCheckpoint(metric)
    for place, step in enumerate(steps(2.0, 4.0, 1.0, math.nan, 0.0, 2.0), 1):
        found.add(step)
        if place % 2 == 0:
            found.close(place)
            (tmp_path / f"step-{place:06d}").mkdir()
        again = BestCheckpoint(metric)
        assert not again.load_state(json.loads(json.dumps(found.state())), tmp_path)
        found = again
    assert found.found == (best and {"step": best[0], "metric": metric, "value": best[1]})
    assert found.step == (best and best[0])


def test_what_is_gone_or_was_best_otherwise_is_not_the_best_any_more(tmp_path: Path) -> None:
    found = BestCheckpoint("loss")
    found.add(steps(2.0)[0])
    found.close(1)
    lost = BestCheckpoint("loss")
    assert "step-000001, the best so far, is not there" in lost.load_state(found.state(), tmp_path)
    other = BestCheckpoint("margin")
    assert not other.load_state(found.state(), tmp_path)
    assert lost.found is None and other.found is None


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_best_stays_through_a_stop_and_is_exported(
    sd15_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that keeps one checkpoint, logs seldom and is stopped between two, against one that keeps them all."""
    base = ["method=dpo", "seed=3", "steps=8", f"checkpoint_every={EVERY}", "keep_best=accuracy", "resume=auto"]
    base += ["ema_decay=0.9"]
    whole = sd15_config("name=whole", "export_checkpoints=true", "keep_checkpoints=9", *base)
    run_training(whole)
    values = [json.loads(line)["accuracy"] for line in (whole.run_dir / "metrics.jsonl").read_text().splitlines()]
    means = {start + EVERY: sum(values[start : start + EVERY]) / EVERY for start in range(0, 8, EVERY)}
    best = max(means, key=lambda step: means[step])
    found = json.loads((whole.run_dir / "summary.json").read_text())["best_checkpoint"]
    assert found == {"step": best, "metric": "accuracy", "value": means[best]}
    assert best == 6, "with these pairs it is not the last one"

    config, plain = sd15_config("name=stopped", "keep_checkpoints=1", "log_every=5", *base), OfflineTrainer.launch

    def signalled(self: OfflineTrainer, step: int) -> Any:
        if step == best:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, step)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(OfflineTrainer, "launch", signalled)
        run_training(config)
    run_training(config)
    run, step = config.run_dir, f"step-{best:06d}"
    assert json.loads((run / "summary.json").read_text())["best_checkpoint"] == found
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [step, "step-000008"]
    assert same(run / "best", whole.run_dir / "exports" / step) and same(run, whole.run_dir)
    assert not same(run / "best", run)

    file = run / "checkpoints" / step / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"the best checkpoint is damaged .*keep_best=null leaves it out"):
        run_training(config)
    run_training(config.model_copy(update={"keep_best": None}))
    assert json.loads((run / "summary.json").read_text())["best_checkpoint"] is None
