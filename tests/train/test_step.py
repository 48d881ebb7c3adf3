"""The step itself: batches come ahead of it, its numbers after it, its profile. Waiting is in test_device."""

from __future__ import annotations

import csv
import gzip
import json
import math
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.train import loader
from fastpref.train.job import TrainJob
from fastpref.train.offline import OfflineTrainer
from fastpref.train.profile import IDLE, StepProfiler, step_table

MakeConfig = Callable[..., Config]


def trainer_of(config: Config) -> OfflineTrainer:
    trainer = TrainJob.open(config).trainer
    assert isinstance(trainer, OfflineTrainer)
    return trainer


def test_metrics_a_step_late_are_those_of_waiting_for_each(one_level_config: MakeConfig) -> None:
    waiting, ahead = (trainer_of(one_level_config("method=rpo", "micro_batch_size=4")) for _ in range(2))
    lines = [waiting.step(step) for step in range(4)]
    launched = [ahead.launch(step) for step in range(4)]
    assert [launch() for launch in launched] == lines


def test_a_bad_step_changes_nothing_although_the_host_learns_of_it_later(one_level_config: MakeConfig) -> None:
    """The second of three steps has no finite loss: weights and optimizer are as if it had not been."""
    runs = []
    for bad in (True, False):
        trainer = trainer_of(
            one_level_config("method=dpo", "micro_batch_size=4", "ema_decay=0.9", "max_skipped_steps=1")
        )
        solve, calls = trainer.objective.solve, 0

        def broken(rewards: Any, related: Any = None, solve: Any = solve) -> Any:
            nonlocal calls
            calls += 1
            solution = solve(rewards, related)
            return solution._replace(loss=solution.loss * math.nan, grad_w=solution.grad_w * math.nan)

        first = trainer.launch(0)
        if bad:
            object.__setattr__(trainer.objective, "solve", broken)
            second = trainer.launch(1)
            object.__delattr__(trainer.objective, "solve")
        third = trainer.launch(2)
        if bad:
            assert calls == 2 and trainer.skipped == 0
            assert math.isfinite(first()["grad_norm"]) and second()["grad_norm"] is None
            assert trainer.skipped == 1
        assert math.isfinite(third()["grad_norm"])
        runs.append(trainer.engine.state()[0])
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_an_unlucky_micro_batch_spoils_only_its_step_and_a_limit_stops_the_run(one_level_config: MakeConfig) -> None:
    trainer = trainer_of(one_level_config("method=dpo", "micro_batch_size=4", "max_skipped_steps=0"))
    trainer._loader.take(0, 0).stored.latents_w.fill_(math.nan)  # a copy: the store keeps its own
    take = trainer._loader.take
    trainer._loader.take = lambda step, number: _poisoned(take(step, number), number == 1)  # type: ignore[method-assign]
    before = [parameter.detach().clone() for parameter in trainer.policy.trainable.values()]
    launched = trainer.launch(0)
    with pytest.raises(UserError, match="non-finite"):
        launched()
    for parameter, kept in zip(trainer.policy.trainable.values(), before, strict=True):
        assert torch.equal(parameter, kept)


def _poisoned(loaded: loader.Loaded, yes: bool) -> loader.Loaded:
    if yes:
        loaded.stored.latents_l.fill_(math.nan)
    return loaded


def test_the_loader_is_ahead_and_gives_what_was_asked_for(one_level_config: MakeConfig) -> None:
    trainer = trainer_of(one_level_config("method=rpo", "micro_batch_size=4"))
    assert [rows.start for rows in trainer._loader.micro_batches] == [0, 4, 0, 4], "rewards first: twice"
    read, threads = trainer.batches.read, []

    def spy(plan: Any, rows: slice) -> Any:
        threads.append((threading.current_thread().name, plan.slot, rows.start))
        return read(plan, rows)

    trainer.batches.read = spy  # type: ignore[method-assign]
    for step, number in ((0, 0), (0, 1), (0, 2), (3, 1), (0, 0)):
        loaded = trainer._loader.take(step, number)
        plan = trainer.sampler.batch(step)
        assert np.array_equal(loaded.plan.indices, plan.indices) and loaded.rows.start == 4 * (number % 2)
        assert (loaded.embeddings is not None) == (number == 0)
        expected = read(plan, loaded.rows)
        assert torch.equal(loaded.stored.latents_l, expected.latents_l)
    trainer._loader._pool.shutdown()
    assert {name.split("_")[0] for name, *_ in threads} == {"loader"}
    assert [(slot, start) for _, slot, start in threads[:5]] == [(0, 0), (0, 4), (0, 0), (0, 4), (1, 0)]


def test_what_the_loader_meets_is_raised_in_the_step(one_level_config: MakeConfig) -> None:
    trainer = trainer_of(one_level_config("method=dpo"))

    def broken(*_: object) -> Any:
        raise UserError("the store's file is damaged")

    trainer.batches.read = broken  # type: ignore[method-assign]
    with pytest.raises(UserError, match="damaged"):
        trainer.step(0)


def test_a_phase_is_what_its_inner_phases_leave_and_idle_what_no_phase_does() -> None:
    def mark(name: str, begin: float, end: float, thread: int = 1) -> dict[str, Any]:
        return {"cat": "user_annotation", "name": name, "ts": begin, "dur": end - begin, "tid": thread}

    events = [mark("fastpref step", 0, 4000), mark("fastpref step", 4000, 8000)]
    events += [mark("fastpref: loss", 0, 3000), mark("fastpref: noise", 1000, 2000), mark("fastpref: loss", 5000, 7000)]
    rows = step_table([*events, mark("fastpref: data", 0, 8000, thread=2)])
    expected = [("noise", 0.5, 0.125), ("loss", 2.0, 0.5), (IDLE, 1.5, 0.375)]
    assert [(row["phase"], row["ms"], row["share"]) for row in rows] == expected


def test_profile_writes_a_trace_and_a_table_that_adds_up(
    one_level_config: MakeConfig, one_level_unet: Path, tmp_path: Path
) -> None:
    from fastpref.runs import run_training

    common = ["method=rpo", "micro_batch_size=4", "steps=8", f"unet={one_level_unet}"]
    run_training(one_level_config(*common, "profile=true", "name=profiled"))
    folder = tmp_path / "runs" / "profiled" / "profile"
    with gzip.open(folder / "trace.json.gz") as stream:
        events = json.load(stream)["traceEvents"]
    assert len(events) > 1000
    rows = list(csv.DictReader((folder / "phases.csv").read_text().splitlines()))
    share = {row["phase"]: float(row["share"]) for row in rows}
    # marks cover a step: little is idle, unless a busy machine takes its time just between two of them
    assert sum(share.values()) == pytest.approx(1, abs=0.01) and 0 <= share[IDLE] < 0.5
    assert {"data", "noise", "policy forward", "reference", "loss", "backward", "optimizer", "logging"} < share.keys()
    marks = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    assert marks["fastpref step"] == 5 and marks["fastpref: reference"] == 2 * 5, "two micro batches a step"
    assert marks["fastpref: policy forward"] == 2 * marks["fastpref: reference"], "rewards first: the policy twice"
    plain = one_level_config(*common, "name=plain")
    run_training(plain)
    lines = [(tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in ("profiled", "plain")]
    assert [json.loads(line)["loss"] for line in lines[0]] == [json.loads(line)["loss"] for line in lines[1]]


def test_a_run_shorter_than_the_window_is_profiled_to_its_end(tmp_path: Path) -> None:
    from rich.console import Console

    for steps, there in ((2, False), (3, True)):
        profiler = StepProfiler(True, torch.device("cpu"), Console(quiet=True))
        for step in range(steps):
            with profiler.step():
                torch.ones(1)
            profiler.close(tmp_path / str(steps), last=step == steps - 1)
        assert (tmp_path / str(steps) / "profile" / "phases.csv").is_file() == there


def test_keys_and_values_of_a_shared_prompt_are_computed_once_and_are_the_same(sdxl_config: MakeConfig) -> None:
    """Half of the rows in the cross-attention's projections; loss and gradient as without, in float64."""
    from fastpref.models.policy import load_policy

    config = sdxl_config("method=dpo", "precision=fp64", "gradient_checkpointing=full", "caption_dropout=0.5")
    job = TrainJob.open(config)
    shared = job.trainer.policy  # type: ignore[attr-defined]
    plain = load_policy(config, job.model_dir, job.device, needs_reference=False)
    trainer = job.trainer
    assert isinstance(trainer, OfflineTrainer)
    batch = trainer.batches.build(trainer.sampler.batch(0), slice(0, 8))
    found = []
    for policy in (shared, plain):
        rows: list[int] = []
        block = policy.unet.down_blocks[1].attentions[0].transformer_blocks[0]
        for projection in (block.attn1.to_k.base_layer, block.attn2.to_k.base_layer):
            projection.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(len(inputs[0])))
        with torch.no_grad():
            for parameter in policy.trainable.values():
                parameter += 0.01 * torch.cos(torch.arange(parameter.numel(), dtype=parameter.dtype)).view_as(parameter)
        error = (policy.predict(batch.noisy, batch.timesteps, batch.conditioning) - batch.target).square().mean()
        error.backward()
        found.append((rows, error.item(), torch.cat([p.grad.flatten() for p in policy.trainable.values()])))
    assert found[0][0] == [16, 8, 16, 8] and found[1][0] == [16, 16, 16, 16]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-12)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-9, atol=1e-14)
