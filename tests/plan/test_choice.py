"""What ``gradient_checkpointing: auto`` takes, and where a run says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpref.config import Config, load_config, save_config
from fastpref.errors import UserError
from fastpref.models.recompute import MODES
from fastpref.plan import recompute, report
from fastpref.plan.count import Shapes
from fastpref.plan.models import models_of
from fastpref.plan.recompute import bytes_at_most, choose, resolve_recomputation
from fastpref.plan.render import render
from fastpref.plan.report import make_plan, rank_bytes, with_mode
from fastpref.runs import run_training
from fastpref.train.world import World

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture
def small(sdxl_config: MakeConfig) -> MakeConfig:
    return lambda *more: sdxl_config("method=dpo", "batch_size=4", *more)


def test_the_first_that_fits_is_taken(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth kept free; to the byte."""
    needs = {mode: rank_bytes(with_mode(small(), mode), 1) for mode in MODES}
    assert needs["none"] > needs["selective"] > needs["full"]
    total = 10 * needs["none"]
    for mode, other in zip(MODES, (*MODES[1:], "full"), strict=True):
        line = f"gradient_checkpointing: {mode} (predicted {needs[mode] / 1e9:.3g} of "
        fits, lacks = (choose(small(), 1, needs[mode] + needs["none"] - byte, total) for byte in (0, 1))
        assert fits.mode == mode and fits.line.startswith(line) and "too much" not in fits.line
        assert (lacks.mode == other and f"{mode} needs" in lacks.line) or "too much" in lacks.line
    for mode in MODES:
        monkeypatch.setattr(report, "device_bytes", lambda _, mode=mode: needs[mode] / 0.9 + 1)
        plan = make_plan(small(), 1, "h100")
        assert plan.mode == mode and plan.nearest == "" and plan.best.total == needs[mode]
        assert plan.by_mode == needs
        assert f"auto takes {mode}" in str(render(plan).renderables)
    monkeypatch.setattr(report, "device_bytes", lambda _: needs["full"] / 0.9 - 1)
    plan = make_plan(small(), 1, "h100")
    assert plan.mode == "full" and "micro_batch_size=1" in plan.nearest and "gradient_check" not in plan.nearest


@pytest.mark.parametrize(
    "extra",
    [
        ["train=full", "precision=bf16"],
        ["precision=fp64", "batch_size=4"],
        ["method=spo", "train=full", "rollout_batch_size=2", "candidates=2", "rollout_prompts=2", "plain_steps=4"],
        ["method=spo", "resolution=32", "decode_batch_size=256", "rollout_batch_size=1", "micro_batch_size=1"],
    ],
)
def test_the_quick_bound_is_above_the_count(
    sdxl_config: MakeConfig, few_records: Path, clip: Path, extra: list[str]
) -> None:
    config = sdxl_config("method=rpo", f"records={few_records}", f"clip={clip}", *extra)
    assert bytes_at_most(config, 1) > rank_bytes(with_mode(config, "none"), 1)


def test_where_memory_is_plenty_nothing_is_counted(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "rank_bytes", lambda *_: pytest.fail("counted"))
    mode, line = choose(small(), 1, 2 * 10**12, 10**12)
    assert mode == "none" and re.fullmatch(r"gradient_checkpointing: none \(at most 0\.\d+ of 2000 GB free\)", line)
    for explicit in MODES:
        assert resolve_recomputation(small(f"gradient_checkpointing={explicit}"), CPU, World()) == (explicit, "")
    assert resolve_recomputation(load_config("", ["method=spm", "train=full"]), CPU, World()).mode == "none"


def test_ranks_of_a_machine_share_its_memory(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def free(config: Config, ranks: int, free: int, total: int, device: str) -> recompute.Choice:
        seen.append(free)
        return recompute.Choice("none")

    monkeypatch.setattr(recompute, "choose", free)
    monkeypatch.setattr(recompute, "free_bytes", lambda _: 1200)
    for local, expected in (("4", 300), (None, 1200)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local) if local else monkeypatch.delenv("LOCAL_WORLD_SIZE")
        resolve_recomputation(small(), CPU, World())
        assert seen.pop() == expected


def test_a_run_says_what_it_takes_and_keeps_what_was_asked(
    small: MakeConfig, one_level_unet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed where there is less memory it goes on with another mode, to the same weights."""
    common = [f"unet={one_level_unet}", "checkpoint_every=1", "resume=auto"]
    needs = {mode: rank_bytes(with_mode(small(*common), mode), 1) for mode in MODES}
    monkeypatch.setattr(recompute, "total_bytes", lambda _: 0)
    weights = {}
    for name, parts in {"whole": [("none", 2)], "parts": [("none", 1), ("selective", 2)]}.items():
        for mode, steps in parts:
            monkeypatch.setattr(recompute, "free_bytes", lambda _, mode=mode: needs[mode])
            config = small(*common, f"name={name}", f"steps={steps}")
            run_training(config)
            assert f"gradient_checkpointing: {mode} (predicted" in capsys.readouterr().err
            assert json.loads((config.run_dir / "summary.json").read_text())["gradient_checkpointing"] == mode
            assert load_config(config.run_dir / "config.yaml").gradient_checkpointing == "auto"
        weights[name] = load_file(config.run_dir / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(weights["parts"][key], value) for key, value in weights["whole"].items())


def test_what_cannot_be_counted_runs_without_and_says_so(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    found = choose(small("lora_targets=[to_w]"), 1, 0, 0)
    assert found.mode == "none" and "not predicted: no layer of the UNet is named 'to_w'" in found.line
    broken = replace(models_of(small()), shapes=Shapes({"block_out_channels": 7}, (4, 8, 8), 77))
    monkeypatch.setattr(recompute, "models_of", lambda _: broken)
    assert "not predicted: cannot load the model" in choose(small(), 1, 0, 0).line


def test_yes_and_no_of_older_recipes(small: MakeConfig, tmp_path: Path) -> None:
    for written, mode in (("true", "full"), ("false", "none"), ("auto", "auto"), ("selective", "selective")):
        config = small(f"gradient_checkpointing={written}")
        assert config.gradient_checkpointing == mode
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config
    for bad in ("some", "1", "null"):
        with pytest.raises(UserError, match="gradient_checkpointing is"):
            small(f"gradient_checkpointing={bad}")
