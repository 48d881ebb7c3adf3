"""Ours and the literal trainer do the same to their weights; the tables and the checkout's refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import limit  # noqa: E402
import offline_report  # noqa: E402
import offline_vs_reference as bench  # noqa: E402
import reference_repo  # noqa: E402
import worlds  # noqa: E402

from fastpref.errors import UserError  # noqa: E402

STEPS = 20


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*worlds.open_world("random", tmp_path_factory.mktemp("world"), pairs=24), "learning_rate=1e-3"]


@pytest.mark.parametrize("method", bench.METHODS)
def test_losses_of_twenty_steps_are_the_same(settings: list[str], method: str) -> None:
    """fp32, ours with the ledger where there is one: to 1e-5 although the weights have moved."""
    arms = bench.sides_of(settings, method)
    trainer = worlds.trainer_of(settings, *arms[list(arms)[-1]])
    found = bench.losses(trainer, bench.literal_of(worlds.config_of(settings, f"method={method}")), STEPS)
    assert bench.check_same(found) < bench.LOSS_TOLERANCE
    assert max(ours for ours, _ in found) - min(ours for ours, _ in found) > 1e-3
    with pytest.raises(UserError, match="void: the losses of the two sides differ"):
        bench.check_same([(ours, literal + 2e-5) for ours, literal in found])


def test_every_side_is_measured_and_the_limit_counts_what_a_method_needs(settings: list[str]) -> None:
    rows = bench.measure(settings, "dpo", repeats=2, steps=1)
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


def test_ratios_and_ceiling_by_hand() -> None:
    seconds = {"literal": 4.0, "ours": 2.2, "bare, ours": 2.0}
    common = {"model": "emoji", "method": "dpo", "compile": "False"}
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
    assert expected in offline_report.report(rows)
    lines = [{"arm": "dpo", "ours_ms": str(value), "bare_ms": "10"} for value in (10.5, 11.5, 10.0)]
    assert limit.last_line(lines) == "ratio dpo 1.0500"
    assert "| dpo | 10.5 | 10.0 | 1.050 (1.000 to 1.150) | yes |" in limit.table(lines)


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
    found = reference_repo.run_script(tmp_path, sys.executable, config, 5, tmp_path / "out")
    assert found == pytest.approx(0.05, rel=0.5)
    file.write_text(f"{head}{flags}\nsys.exit('no torchvision here')\n")
    with pytest.raises(UserError, match=r"diffusers ended with 1 .*it says: no torchvision here"):
        reference_repo.run_script(tmp_path, sys.executable, config, 5, tmp_path / "out")
