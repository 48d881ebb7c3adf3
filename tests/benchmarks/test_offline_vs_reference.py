"""Ours and the literal trainer do the same to their weights; the tables and the checkout's refusals."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import limit  # noqa: E402
import offline_report  # noqa: E402
import offline_vs_reference as bench  # noqa: E402
import reference_repo  # noqa: E402
import worlds  # noqa: E402
from gpu_bench_world import OverLimit, limited  # noqa: E402

from fastpref.errors import UserError  # noqa: E402
from fastpref.models import policy  # noqa: E402
from fastpref.train.offline import OfflineTrainer  # noqa: E402

STEPS = 6


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, one_level_unet: Path) -> list[str]:
    folder, small = tmp_path_factory.mktemp("world"), [f"unet={one_level_unet}"]
    return [*worlds.open_world("random", folder, small, pairs=24), "learning_rate=1e-3"]


@pytest.mark.parametrize("method", bench.METHODS)
def test_losses_of_several_steps_are_the_same(settings: list[str], method: str) -> None:
    """fp32, ours with the ledger where there is one: to the tolerance although the weights have moved."""
    arms = bench.sides_of(settings, method)
    trainer = worlds.trainer_of(settings, *arms[list(arms)[-1]])
    found = bench.losses(trainer, bench.literal_of(worlds.config_of(settings, f"method={method}")), STEPS)
    assert bench.check_same(found) < bench.LOSS_TOLERANCE
    assert max(ours for ours, _ in found) - min(ours for ours, _ in found) > 1e-3
    with pytest.raises(UserError, match="void: the losses of the two sides differ"):
        bench.check_same([(ours, literal + 2e-5) for ours, literal in found])


def test_every_side_is_measured_and_the_limit_counts_what_a_method_needs(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[int, list[int]] = {}
    of_the_engine = OfflineTrainer.step

    def step(trainer: OfflineTrainer, number: int) -> Any:
        taken.setdefault(id(trainer), []).append(number)
        return of_the_engine(trainer, number)

    with monkeypatch.context() as patched:
        patched.setattr(OfflineTrainer, "step", step)
        rows = bench.measure(settings, "dpo", repeats=2, steps=1)
    assert [sorted(set(numbers)) for numbers in taken.values()] == list(taken.values())  # none twice, none back
    sides = {row["side"] for row in rows}
    assert {"literal", "ours", "ours, ledger", "bare, ours", "bare, ours, ledger", "literal VAE"} <= sides
    assert all(row["seconds"] > 0 for row in rows) and len(rows) == 2 * len(sides)
    for arm, forwards in (("sft", 8), ("dpo", 32), ("dpo-ledger", 16), ("rpo-2-ledger", 32), ("rpo-2-kept-ledger", 16)):
        trainer = worlds.trainer_of(settings, *limit.ARMS[arm])
        limit.Bare(trainer).step()
        assert trainer.policy.forwards == forwards, arm
        trainer.step(0)
        assert trainer.policy.forwards == 2 * forwards, arm
        assert all(parameter.grad is None for parameter in trainer.policy.trainable.values())


def test_a_compiled_step_takes_turns_with_eager_passes(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(policy, "compile_unet", lambda unet, whole: compiled.append(unet))
    passes: list[limit.Bare] = []
    of_the_limit = limit.Bare.step
    monkeypatch.setattr(limit.Bare, "step", lambda bare: (passes.append(bare), of_the_limit(bare))[1])
    rows = bench.measure([*settings, "compile=true"], "dpo", repeats=1, steps=1)
    assert {row["side"] for row in rows if row["side"].startswith("bare")} == {
        *("bare, ours", "bare, ours, ledger", "bare eager, ours", "bare eager, ours, ledger")
    }
    unets = {id(unet) for unet in compiled}
    found = [(id(bare.policy.unet) in unets, bare.reference) for bare in passes]
    assert sorted(found) == [(False, False), (False, True), (True, False), (True, True)]


def test_the_two_ways_to_compile_are_told_apart() -> None:
    parser = argparse.ArgumentParser()
    worlds.add_compile(parser, "")
    said = [[], ["--compile"], ["--compile", "blocks"], ["--compile", "unet"]]
    found = [parser.parse_args(words).compile for words in said]
    assert found == ["False", "True", "True", "unet"]
    assert [worlds.config_of([], f"compile={value.lower()}").compile for value in found] == [False, True, True, "unet"]
    rows = [{"model": "emoji", "arm": "dpo", "compile": value, "ours_ms": "2", "bare_ms": "1"} for value in found[1:]]
    assert list(limit.by_setting(rows)) == ["emoji, compiled", "emoji, one graph"]


def test_beyond_the_eager_ceiling_by_hand() -> None:
    seconds = {"literal": 4.0, "ours": 2.0, "bare, ours": 1.8, "bare eager, ours": 2.2}
    common = {"model": "emoji", "method": "dpo", "compile": "True", "torch": "2.13.0", "repeat": "0"}
    rows = [common | {"side": side, "seconds": str(value)} for side, value in seconds.items()]
    said = offline_report.report(rows)
    assert "| emoji, compiled | dpo | LoRA off | 2200 | 2000 | 1.10 (1.10 to 1.10) | yes |" in said
    assert "| 4000 | 2000 | 2.00 (2.00 to 2.00) | 2.22 | 90% | yes |" in said
    slower = offline_report.report([*rows[:1], rows[1] | {"seconds": "2.4"}, *rows[2:]])
    assert "| 2200 | 2400 | 0.92 (0.92 to 0.92) | no |" in slower


def test_ratios_and_ceiling_by_hand() -> None:
    seconds = {"literal": 4.0, "ours": 2.2, "bare, ours": 2.0}
    common = {"model": "emoji", "method": "dpo", "compile": "False", "torch": "2.13.0"}
    rows: list[dict[str, Any]] = [
        common | {"repeat": str(n), "side": side, "seconds": str(value * (1 + n))}
        for n in range(3)
        for side, value in seconds.items()
    ]
    memory = {"literal": 2 * 10**9, "ours": 10**9}
    rows += [common | {"side": side, "peak_rss_bytes": str(size)} for side, size in memory.items()]
    assert offline_report.ratios(rows, "literal", "ours") == pytest.approx([4 / 2.2] * 3)
    assert offline_report.ceiling(rows, "ours") == pytest.approx(2.0)
    expected = "| 8000 | 4400 | 1.82 (1.82 to 1.82) | 2.00 | 91% | yes | 2.00 → 1.00 |"
    assert expected in offline_report.report(rows) and "public script" not in offline_report.report(rows)
    setting = {"model": "emoji", "compile": "False", "arm": "dpo", "bare_ms": "10"}
    lines = [setting | {"ours_ms": str(value)} for value in (10.5, 11.5, 10.0)]
    assert limit.last_line(lines) == "ratio dpo 1.0500"
    lines += [line | {"model": "mid", "ours_ms": "20"} for line in lines]
    assert "| emoji | dpo | 10.5 | 10.0 | 1.050 (1.000 to 1.150) | 3 | yes |" in limit.table(lines)
    assert "| mid | dpo | 20.0 | 10.0 | 2.000 (2.000 to 2.000) | 3 | no |" in limit.table(lines)


def test_the_public_script_stands_beside_ours_of_the_same_torch(tmp_path: Path) -> None:
    seconds = {"literal": 4.0, "ours": 2.0, "bare, ours": 2.0, "ours, ledger": 1.0, "bare, ours, ledger": 1.0}
    common = {"model": "emoji", "method": "dpo", "compile": "False", "repeat": "0"}
    rows = [
        common | {"torch": version, "side": side, "seconds": str(value)}
        for version, sides in (("2.13.0", seconds), ("2.14.1", seconds | {"public script": 5.0}))
        for side, value in sides.items()
    ]
    said = offline_report.report(rows)
    line = "| emoji, torch 2.14.1 | dpo | 5000 | 2.50 (2.50 to 2.50) | 5.00 (5.00 to 5.00) | 1.25 (1.25 to 1.25) |"
    assert said.count("| 5000 |") == 1 and line in said
    again = bench.merged(rows, [rows[-1] | {"seconds": "6.0"}])
    assert [row["torch"] for row in again] == ["2.13.0"] * 5 + ["2.14.1"]
    offline_report.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_in_bf16_with_checkpointing_losses_agree_to_rounding(settings: list[str]) -> None:
    """As the full-size model is measured: one pair a step, the frozen weights of both sides held once."""
    half = [
        *settings,
        "learning_rate=1e-4",
        "precision=bf16",
        "gradient_checkpointing=full",
        "batch_size=1",
        "micro_batch_size=1",
    ]
    trainer = worlds.trainer_of(half, "method=dpo", "reference=ledger", "ledger_precision=training")
    literal = bench.literal_of(worlds.config_of(half, "method=dpo"))
    bench.hold_once([literal.unet, trainer.policy.unet])
    weights = [dict(model.named_parameters()) for model in (literal.unet, trainer.policy.unet)]
    shared = {name for name in weights[0] if weights[0][name].data_ptr() == weights[1][name].data_ptr()}
    assert shared == {name for name, parameter in weights[0].items() if not parameter.requires_grad}
    found = bench.losses(trainer, literal, 4)
    assert bench.check_same(found, bench.BF16_TOLERANCE) < bench.BF16_TOLERANCE
    assert bench.check_same(found[:1]) < 1e-6 and found[1][0] != found[0][0]


def test_a_checkout_is_looked_at_before_it_is_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no public script there .*checkout of huggingface/diffusers or"):
        reference_repo.find_script(tmp_path)
    script = reference_repo.SCRIPTS[0]
    file = tmp_path / script.path
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(f'parser.add_argument("{flag}")' for flag in script.flags))
    assert reference_repo.find_script(tmp_path) is script
    file.write_text(file.read_text().replace("--beta_dpo", "--beta"))
    with pytest.raises(UserError, match=r"the script has changed: it has no flag --beta_dpo.*expected are --pre"):
        reference_repo.find_script(tmp_path)


def test_a_script_ends_with_whoever_waits_for_it(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / reference_repo.SCRIPTS[0].path
    file.parent.mkdir(parents=True)
    flags = "".join(f'# "{flag}"\n' for flag in reference_repo.SCRIPTS[0].flags)
    file.write_text(f"{flags}import time\nprint('Steps: 1/9', flush=True)\ntime.sleep(60)\n")
    started, launch = [], subprocess.Popen
    monkeypatch.setattr(
        reference_repo.subprocess, "Popen", lambda *a, **k: started.append(launch(*a, **k)) or started[0]
    )
    config = worlds.config_of(settings, "method=dpo")
    with pytest.raises(OverLimit), limited(2.0):
        reference_repo.run_script(tmp_path, sys.executable, config, 3, tmp_path / "out")
    assert started[0].returncode == -signal.SIGKILL


def test_a_script_is_timed_from_its_progress_line(settings: list[str], tmp_path: Path) -> None:
    script = reference_repo.SCRIPTS[0]
    file = tmp_path / script.path
    file.parent.mkdir(parents=True)
    flags = "\n".join(f'parser.add_argument("{flag}", nargs="?")' for flag in script.flags)
    body = (
        'for step in range(5):\n    time.sleep(0.05)\n    print(f"\\rSteps:  1%| {step + 1}/5 [", end="", flush=True)\n'
    )
    head = "import argparse, sys, time\nparser = argparse.ArgumentParser()\n"
    file.write_text(f"{head}{flags}\nparser.parse_args()\n{body}")
    config = worlds.config_of(settings, "method=dpo")
    began = time.perf_counter()
    found = reference_repo.run_script(tmp_path, sys.executable, config, 3, tmp_path / "out")
    assert 0 <= found <= (time.perf_counter() - began) / 2, (
        "two of the three steps last as long as the median or longer"
    )
    assert reference_repo.step_seconds({0: 0.0, 1: 9.0, 2: 10.0, 3: 10.5, 5: 14.5, 6: 15.5}) == 1.0  # of 0.5, 2, 1
    with pytest.raises(UserError, match=r"diffusers ended with 0 "):  # it has done fewer steps than it was asked for
        reference_repo.run_script(tmp_path, sys.executable, config, 4, tmp_path / "out")
    said = ("ACCELERATE_USE_CPU" in reference_repo.environment(tmp_path, device) for device in ("cpu", "cuda"))
    assert list(said) == [True, False]
    file.write_text(f"{head}{flags}\nsys.exit('no torchvision here')\n")
    with pytest.raises(UserError, match=r"diffusers ended with 1 .*it says: no torchvision here"):
        reference_repo.run_script(tmp_path, sys.executable, config, 3, tmp_path / "out")
