"""Checkpoints: exact bits back, atomic, verified, and the one before a damaged one is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastpref.train.checkpoint import Checkpoint, DamagedCheckpoint, load_checkpoint, newest_intact, save_checkpoint


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "policy.a": torch.randn(3, 5, generator=g),
        "optimizer.0.step": torch.tensor(float(seed)),
        "optimizer.0.exp_avg": torch.randn(7, generator=g, dtype=torch.float64),
    }


def test_round_trip_is_exact(tmp_path: Path) -> None:
    tensors = some_tensors(1)
    path = save_checkpoint(tmp_path, 12, tensors, {"seconds": 0.1 + 0.2}, keep=2)
    loaded = load_checkpoint(path)
    assert path.name == "step-000012" and loaded.step == 12 and loaded.values["seconds"] == 0.1 + 0.2
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded.tensors[name], tensor) and loaded.tensors[name].dtype == tensor.dtype


def test_only_the_newest_are_kept_and_no_draft_is_left(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000000):
        save_checkpoint(tmp_path, step, some_tensors(step), {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000100", "step-1000000"]
    newest = next(iter(newest_intact(tmp_path)))
    assert isinstance(newest, Checkpoint) and newest.step == 1000000


@pytest.mark.parametrize("damage", ["flip a bit", "cut short", "delete", "manifest", "values"])
def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, 10, some_tensors(10), {}, keep=2)
    newest = save_checkpoint(tmp_path, 20, some_tensors(20), {}, keep=2)
    file = newest / {"manifest": "manifest.json", "values": "state.json"}.get(damage, "state.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    elif damage == "flip a bit":
        data[-3] ^= 16
        file.write_bytes(data)
    elif damage == "values":
        file.write_text(json.dumps({"step": 19}))
    else:
        file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(newest)
    fault, intact = list(newest_intact(tmp_path))
    assert isinstance(fault, tuple) and fault[0] == newest and fault[1]
    assert isinstance(intact, Checkpoint) and intact.step == 10
    assert torch.equal(intact.tensors["policy.a"], some_tensors(10)["policy.a"])


def test_a_draft_left_by_a_kill_is_not_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 10, some_tensors(10), {}, keep=2)
    draft = tmp_path / ".step-000020.tmp"
    draft.mkdir()
    (draft / "state.safetensors").write_bytes(b"half")
    (only,) = list(newest_intact(tmp_path))
    assert isinstance(only, Checkpoint) and only.step == 10
    save_checkpoint(tmp_path, 20, some_tensors(20), {}, keep=2)
    assert load_checkpoint(tmp_path / "step-000020").step == 20 and not draft.exists()


def test_a_file_without_its_checksum_is_damage(tmp_path: Path) -> None:
    """A manifest that lists nothing vouches for nothing."""
    path = save_checkpoint(tmp_path, 10, some_tensors(10), {}, keep=2)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": {}}))
    with pytest.raises(DamagedCheckpoint, match=r"state\.safetensors"):
        load_checkpoint(path)


def test_the_step_is_what_name_manifest_and_values_agree_on(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 10, some_tensors(10), {}, keep=3)
    newest = save_checkpoint(tmp_path, 20, some_tensors(20), {}, keep=3)
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").write_text(json.dumps(manifest | {"step": 21}))
    with pytest.raises(DamagedCheckpoint, match="step 21"):
        load_checkpoint(newest)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    load_checkpoint(newest)
    with pytest.raises(DamagedCheckpoint, match="step 20"):
        load_checkpoint(newest.rename(tmp_path / "step-000030"))
    (tmp_path / "step-copy").mkdir()  # no checkpoint's name: never looked at
    fault, intact = list(newest_intact(tmp_path))
    assert isinstance(fault, tuple) and isinstance(intact, Checkpoint) and intact.step == 10
