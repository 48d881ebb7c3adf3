"""The reference ledger: the same training without a reference, its refusals, resuming and sharing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastpref.config import Config
from fastpref.data import ledger as files
from fastpref.data.sampling import BatchPlan
from fastpref.errors import UserError
from fastpref.models.policy import Policy
from fastpref.train.job import TrainJob
from fastpref.train.offline import OfflineTrainer
from fastpref.train.reference import _Writer, prepare_reference

MakeConfig = Callable[..., Config]
RANDOM = ["caption_dropout=0.3", "label_noise=0.2", "timestep_range=[100, 900]", "precision=fp64", "beta=200"]
METHODS = {
    "dpo": ["method=dpo", "micro_batch_size=2"],
    "rpo groups": ["method=rpo", "group_size=4", "sampling=related", "embedding=text", "micro_batch_size=4"],
    "rpo full": ["method=rpo", "train=full", "safeguard=0.8"],
}


@pytest.fixture(autouse=True)
def _own_ledgers(sdxl_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ledgers of a test lie in its own folder, two steps in a file."""
    monkeypatch.setattr(files, "FOLDER", str(tmp_path / "ledgers"))
    monkeypatch.setattr(files, "_PAIRS_PER_FILE", 16)


def trainer_of(config: Config) -> OfflineTrainer:
    """Moved off the reference, so that rewards are not all zero."""
    trainer = TrainJob.open(config).trainer
    assert isinstance(trainer, OfflineTrainer)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.policy.trainable.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(parameter.dtype)
    return trainer


def steps_of(config: Config, steps: list[int]) -> tuple[list[dict[str, Any]], torch.Tensor, Policy]:
    trainer = trainer_of(config)
    lines = [trainer.step(step) for step in steps]
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.policy.trainable.values()])
    return lines, weights, trainer.policy


def rows_of(config: Config) -> int:
    return prepare_reference(config, progress=False).rows


@pytest.mark.parametrize("method", METHODS)
def test_training_with_the_ledger_is_training_with_the_reference(one_level_config: MakeConfig, method: str) -> None:
    """Losses and weights to 1e-9 in float64, in both draws, with half of the UNet's forward rows and no reference."""
    common = [*RANDOM, *METHODS[method], "steps=6", "prepare_batch_size=3"]
    config, visited = one_level_config(*common, "reference=ledger"), [1, 3, 5]
    assert rows_of(config) == 7 * 16  # 40 pairs are 5 batches; the last file of two steps is written whole
    lines, weights, policy = steps_of(config, visited)
    expected, other_weights, other = steps_of(one_level_config(*common), visited)
    for line, wanted in zip(lines, expected, strict=True):
        assert line == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert (weights - other_weights).abs().max() < 1e-9 < (other_weights - steps_of(config, [])[1]).abs().max()
    extra = 48 if method == "rpo groups" else 0  # rewards first: the policy's second forward
    assert (policy.forwards, other.forwards) == (48 + extra, 96 + extra)
    assert policy.reference_unet is None and policy.backwards == other.backwards == 48


def test_a_lora_that_starts_from_a_file_needs_no_second_adapter(one_level_config: MakeConfig, tmp_path: Path) -> None:
    from fastpref.models.lora_file import save_lora

    start = trainer_of(one_level_config("method=dpo"))
    save_lora(start.policy.unet, tmp_path / "start.safetensors")
    common = ["method=dpo", "precision=fp64", "steps=2", f"init_lora={tmp_path / 'start.safetensors'}"]
    rows_of(one_level_config(*common))
    lines, _, policy = steps_of(one_level_config(*common, "reference=ledger"), [1])
    expected, _, other = steps_of(one_level_config(*common), [1])
    assert lines[0] == pytest.approx(expected[0], rel=1e-9, abs=1e-12) and abs(lines[0]["margin"]) > 1e-6
    adapters = [sum(".lora_" in name for name, _ in p.unet.named_parameters()) for p in (policy, other)]
    assert 2 * adapters[0] == adapters[1]


def test_a_ledger_of_other_numbers_is_found_in_the_first_step(one_level_config: MakeConfig, tmp_path: Path) -> None:
    config = one_level_config("method=dpo", "steps=2", "reference=ledger")
    rows_of(config)
    trainer = TrainJob.open(config).trainer
    assert trainer.step(0)["loss"] == pytest.approx(np.log(2), rel=1e-3)
    trainer = TrainJob.open(config).trainer
    assert isinstance(trainer, OfflineTrainer) and trainer.ledger is not None
    trainer.ledger.errors(0, 0, slice(0, 8)).view(2, 8)[0] += 1e-3  # β/2 = 1000
    with pytest.raises(UserError, match=r"1 in the logit, at most 0\.05"):
        trainer.step(0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed=1", "seed 0, here 1"),
        ("group_size=2", "group_size 1, here 2"),
        ("batch_size=4", "batch_size 8, here 4"),
        ("timestep_range=[0, 500]", r"timestep_range null, here \[0, 500\]"),
        ("precision=fp64", 'precision "fp32", here "fp64"'),
        ("caption_dropout=0.1", "caption_dropout 0.0, here 0.1"),
        ("steps=6", "6 steps need 2 draws of a pair, 1 parts are missing"),
    ],
)
def test_a_ledger_for_anything_else_is_refused(one_level_config: MakeConfig, change: str, said: str) -> None:
    common = ["method=dpo", "reference=ledger"]
    with pytest.raises(UserError, match="no reference ledger there"):
        TrainJob.open(one_level_config(*common, "steps=5"))
    rows_of(one_level_config(*common, "steps=5"))
    TrainJob.open(one_level_config("reference=ledger", "method=rpo", "group_size=1", "steps=4", "beta=9"))
    with pytest.raises(UserError, match=said) as error:
        TrainJob.open(one_level_config(*common, "steps=5", change))
    assert "fastpref prepare --reference" in str(error.value) and "\n" not in str(error.value)


def test_other_weights_are_refused(one_level_config: MakeConfig, sdxl: Path, tmp_path: Path) -> None:
    config = one_level_config("method=dpo", "reference=ledger", "steps=1")
    rows_of(config)
    unet = TrainJob.open(config).trainer.policy.unet  # type: ignore[attr-defined]
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="made for something else: another reference "):
        TrainJob.open(config.model_copy(update={"unet": str(tmp_path / "unet")}))


def test_fewer_draws_repeat_themselves(one_level_config: MakeConfig) -> None:
    """Past the draws that a ledger holds a run is refused, or repeats them: order, timesteps, noise and errors."""
    config = one_level_config("method=dpo", "reference=ledger", "steps=12", "draws=1")
    assert rows_of(config) == 5 * 16
    trainer = trainer_of(config)
    first, again = trainer.sampler.batch(3), trainer.sampler.batch(8)
    assert (again.epoch, again.slot) == (0, 3) and np.array_equal(first.indices, again.indices)
    assert not np.array_equal(trainer_of(one_level_config("method=dpo")).sampler.batch(8).indices, first.indices)
    batches = [trainer.batches.build(plan, slice(0, 8)) for plan in (first, again)]
    assert torch.equal(batches[0].noisy, batches[1].noisy)


def test_what_is_missing_is_added_and_damage_is_refused(one_level_config: MakeConfig) -> None:
    config = one_level_config("method=dpo", "reference=ledger", "steps=5")
    dry = prepare_reference(config, dry_run=True)
    assert dry.rows == 80 and not dry.path.exists()
    found = prepare_reference(config, progress=False)
    parts = sorted(found.path.glob("draw-*"))
    assert [part.name[5:16] for part in parts] == ["00000-00000", "00000-00001", "00000-00002"]
    kept = [part.read_bytes() for part in parts]
    assert rows_of(config) == 0
    parts[1].unlink()
    assert rows_of(config) == 32 and parts[1].read_bytes() == kept[1]
    assert rows_of(config.model_copy(update={"steps": 6})) == 32, "the second draw's first file"
    for flipped in (len(kept[2]) - 3, 40, 3):
        data = bytearray(kept[2])
        data[flipped] ^= 4
        parts[2].write_bytes(data)
        with pytest.raises(UserError, match=f"the ledger's file (is damaged|cannot be read).*{parts[2].name}"):
            TrainJob.open(config)
    parts[2].write_bytes(kept[2])
    (found.path / files.FACTS).write_text("{")
    with pytest.raises(UserError, match="cannot read the file"):
        TrainJob.open(config)


def test_ranks_share_the_parts(one_level_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_level_config("method=dpo", "reference=ledger", "steps=5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    path = prepare_reference(config, progress=False).path
    assert [part.name for part in path.glob("draw-*")] == ["draw-00000-00001.safetensors"]
    monkeypatch.setenv("RANK", "0")
    prepare_reference(config, progress=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert rows_of(config) == 0
    TrainJob.open(config)


def test_pairs_of_two_buckets_go_back_to_their_steps() -> None:
    buckets = np.asarray([0, 0, 1, 1, 0, 0])
    plans = [
        BatchPlan(0, np.asarray(pairs), np.asarray(pairs) + 10, n) for n, pairs in enumerate([[1, 4], [3, 2], [5, 0]])
    ]
    writer = object.__new__(_Writer)
    writer.config = SimpleNamespace(batch_size=2)  # type: ignore[assignment]
    writer.store = SimpleNamespace(bucket_ids=buckets)  # type: ignore[assignment]
    writer.sampler = SimpleNamespace(batches_per_epoch=3, batch=plans.__getitem__)  # type: ignore[assignment]
    for stretch in writer._stretches(files.Part(0, 0, range(3))):
        assert len(set(buckets[stretch.plan.indices])) == 1
        for pair, group, step, place in zip(
            stretch.plan.indices, stretch.plan.groups, stretch.steps, stretch.places, strict=True
        ):
            assert plans[step].indices[place] == pair and plans[step].groups[place] == group


def test_the_command_line(one_level_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from fastpref.cli import app
    from fastpref.config import parse_config, save_config
    from fastpref.runs import run_training

    save_config(one_level_config("method=dpo", "reference=ledger", "steps=2"), tmp_path / "recipe.yaml")
    answer = CliRunner().invoke(app, ["prepare", "--reference", str(tmp_path / "recipe.yaml")])
    assert answer.exit_code == 0 and "2 steps, 1 draws of a pair\n  32 rows through the reference" in answer.output
    run_training(one_level_config("method=dpo", "reference=ledger", "steps=2"))
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert (summary["unet_forwards"], summary["unet_backwards"]) == (32, 32)
    with pytest.raises(UserError, match="reference is ledger with method sft"):
        parse_config({"method": "sft", "reference": "ledger"})
