"""UNet rows and seconds to reach a style_share of 0.8: DPO, RPO, SPO and LPO side by side, over several seeds.

    python benchmarks/reach.py [--seeds 0 1 2] [--arms ARM …] [--report] [--readme]

The arms are in reach.yaml. Each is trained from checkpoint to checkpoint; at each one its pictures of held-out prompts
are judged, on few of them first and on all as soon as these pass the bar. Judging is not counted. The reward models of
SPO and LPO are trained once a seed and counted with their arm. Every checkpoint is a row of results/reach.csv: a run
that is stopped goes on where it was, and what is there is not run again unless its settings, the base or an encoder
changed. --report only writes tables and plot from the CSV.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, ROOT, TABLES, fill, provenance, read_csv, write_csv
from compare import PLACES, world_fingerprint
from reach_report import BASE, passes, plot, report
from rich.console import Console

from fastpref.atomic import write_bytes
from fastpref.config import Config, load_config
from fastpref.errors import UserError
from fastpref.models.lora_file import WEIGHTS_NAME

PLAN = Path(__file__).parent / "reach.yaml"
OUT = RESULTS / "reach.csv"
MARK = "fingerprint"  # file of a run directory
# Beside the places what says where a run ends and how it is judged (in the plan): no checkpoint depends on it.
FREE = PLACES | {"steps", "scorer", "eval_prompts", "eval_seeds", "evaluate"}


@dataclass(frozen=True)
class Arm:
    """One arm, or one reward model: that has no ``every`` and is trained to the end of its recipe in one go."""

    name: str
    label: str
    recipe: str
    every: int | None = None
    steps: int | None = None
    scorer: str | None = None
    until: float | None = None

    def config(self, plan: dict[str, Any], seed: int, runs: Path) -> Config:
        """The resolved config of one seed."""
        values = {**plan["common"], "seed": seed, "name": f"{self.name}-seed{seed}", "output_dir": str(runs)}
        if self.steps is not None:
            values["steps"] = self.steps
        if self.scorer is not None:
            folder = plan["scorers"][self.scorer]["folder"]
            values["scorer"] = str(runs / f"{self.scorer}-seed{seed}" / folder)
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        config = load_config(ROOT / self.recipe, [*overrides, "resume=auto"])
        return config.model_copy(update={"checkpoint_every": config.steps}) if self.every else config

    def bars(self, plan: dict[str, Any]) -> list[float]:
        """The shares that are looked for, ascending; the arm stops at the last."""
        return sorted({float(plan["bar"]), float(self.until or plan["bar"])})


def read_plan(path: Path = PLAN) -> tuple[dict[str, Any], dict[str, Arm], dict[str, Arm]]:
    """reach.yaml, its arms and its reward models by name."""
    plan = yaml.safe_load(path.read_text())
    arms = {name: Arm(name, **about) for name, about in plan["arms"].items()}
    scorers = {name: Arm(name, about["label"], about["recipe"]) for name, about in plan["scorers"].items()}
    return plan, arms, scorers


def fingerprint(config: Config, *more: str) -> str:
    """What a row stands for: every setting that differs from its default, the base, the encoders, and ``more``."""
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude=FREE)
    if config.lr_scheduler != "constant":
        settings["steps"] = config.steps  # every step's learning rate depends on where the run ends
    text = json.dumps(settings, sort_keys=True) + world_fingerprint() + "".join(more)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_bar(curve: Sequence[dict[str, Any]], bars: Sequence[float]) -> float | None:
    """The lowest bar that no checkpoint of the curve has passed; None if all are."""
    return next((bar for bar in bars if not any(passes(row, bar) for row in curve)), None)


def next_step(curve: Sequence[dict[str, Any]], bars: Sequence[float], every: int, budget: int) -> int | None:
    """The checkpoint to train to; None once the last bar is passed or the budget is spent."""
    done = max((int(row["step"]) for row in curve), default=0)
    if open_bar(curve, bars) is None or done >= budget:
        return None
    return min(budget, (done // every + 1) * every)


def open_job(config: Config, mark: str) -> tuple[Any, Path]:
    """A training job and its run directory; what lies there with another fingerprint is deleted."""
    from fastpref.train.job import TrainJob
    from fastpref.train.run_dir import check_run_dir, open_run_dir

    if config.run_dir.exists() and not made_with(config.run_dir, mark):
        shutil.rmtree(config.run_dir)
    resuming = check_run_dir(config)
    job = TrainJob.open(config, Console(stderr=True, quiet=True))
    run_dir = open_run_dir(config, resuming)
    write_bytes(run_dir / MARK, mark.encode())
    return job, run_dir


def made_with(run_dir: Path, mark: str) -> bool:
    """Whether the run directory is one of this fingerprint."""
    return (run_dir / MARK).is_file() and (run_dir / MARK).read_text() == mark


class StagedRun:
    """A training that goes from checkpoint to checkpoint with its models kept in memory."""

    def __init__(self, config: Config, mark: str) -> None:
        self.config, (self.job, self.run_dir) = config, open_job(config, mark)

    def train_to(self, step: int) -> dict[str, Any]:
        """Train to ``step`` optimizer steps and export; what was spent up to there, over all stages."""
        self.job.config = self.config.model_copy(update={"steps": step})
        self.job.run(self.run_dir)
        state = json.loads((self.run_dir / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())
        return spent(self.config, step, state)


def spent(config: Config, step: int, state: dict[str, Any]) -> dict[str, Any]:
    """Seconds and rows after ``step`` optimizer steps, from a checkpoint's ``state.json``.

    Of the UNet's forwards, as many rows were the policy's as went backward; what neither these nor the rollout took
    was the reference's (and, where a batch of RPO is cut into micro-batches, the policy's once more).
    """
    from fastpref.models.work import Work

    work, totals = Work(*state["counts"]), state["trainer"].get("totals", {})
    rollout, backward = int(totals.get("rollout_unet_forwards", 0)), work.unet_backwards
    return {
        "step": step,
        "budget": config.steps,
        "seconds": round(state["seconds"], 3),
        "rollout_rows": rollout,
        "policy_rows": backward,
        "reference_rows": work.unet_forwards - rollout - backward,
        "backward_rows": backward,
        "latent_reward_rows": work.scorer_forwards if config.method == "lpo" else 0,
        "decoded": work.vae_decodes,
        "samples": int(totals.get("transitions", step * config.batch_size)),
    }


def train_scorer(config: Config, mark: str) -> dict[str, Any]:
    """Train a reward model to the end of its recipe; its row."""
    job, run_dir = open_job(config, mark)
    found = job.run(run_dir)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    # A latent reward model is the UNet's own half, and in training every row of it goes backward too.
    latent = found["scorer_forwards"] if config.method == "lrm" else 0
    return {
        "step": found["steps"],
        "seconds": round(found["seconds_train"], 3),
        "frozen_rows": found["unet_forwards"],
        "latent_reward_rows": latent,
        "backward_rows": latent,
        "decoded": found["vae_decodes"],
        "samples": found["samples_seen"],
    }


def judge(config: Config, plan: dict[str, Any], tag: str, bar: float, lora: Path | None = None) -> dict[str, Any]:
    """The figures of the weights on few prompts and, if these pass ``bar``, on all."""
    from fastpref.evaluate.runner import evaluate_policy

    found: dict[str, Any] = {}
    for name, settings in (("look", plan["look"]), ("confirmed", plan["confirm"])):
        wanted = config.model_copy(update=settings)
        figures = evaluate_policy(wanted, lora=lora, out_dir=config.run_dir, tag=f"{tag}-{name}")
        found[f"{name}_share"] = round(figures["style_share"], 5)
        found[f"{name}_top5"] = round(figures["prompt_retrieval"]["top5"], 5)
        if found[f"{name}_share"] < bar:
            break
    return found


class Results:
    """The rows of the CSV, written after every one."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = [dict(row) for row in read_csv(out)]

    def of(self, arm: str, seed: int, mark: str) -> list[dict[str, Any]]:
        """An arm's rows; those made with other settings are dropped."""
        own = [row for row in self.rows if (row["arm"], str(row["seed"])) == (arm, str(seed))]
        stale = [row for row in own if row["fingerprint"] != mark]
        self.rows = [row for row in self.rows if row not in stale]
        return [row for row in own if row not in stale]

    def drop(self, arm: str, seed: int) -> None:
        self.rows = [row for row in self.rows if (row["arm"], str(row["seed"])) != (arm, str(seed))]

    def add(self, arm: str, seed: int, mark: str, figures: dict[str, Any]) -> dict[str, Any]:
        row = {"arm": arm, "seed": seed, **figures, "fingerprint": mark, **provenance()}
        self.rows.append(row)
        write_csv(self.out, self.rows)
        return row


def run_base(results: Results, plan: dict[str, Any], config: Config) -> None:
    """Measure the base model unless it was."""
    mark = fingerprint(config, json.dumps([plan["look"], plan["confirm"]]))
    if not results.of(BASE, 0, mark):
        results.add(BASE, 0, mark, {"step": 0, "seconds": 0.0} | judge(config, plan, "before", 0.0))


def run_scorer(results: Results, scorer: Arm, config: Config, seed: int) -> str:
    """Train a reward model unless it is there; its fingerprint."""
    mark = fingerprint(config, str(config.steps))
    if not results.of(scorer.name, seed, mark) or not made_with(config.run_dir, mark):
        results.drop(scorer.name, seed)
        results.add(scorer.name, seed, mark, train_scorer(config, mark))
    return mark


def run_arm(results: Results, plan: dict[str, Any], arm: Arm, config: Config, seed: int, scorer_mark: str) -> None:
    """Train from checkpoint to checkpoint until the last bar is passed or the budget is spent."""
    assert arm.every is not None
    mark = fingerprint(config, scorer_mark, json.dumps([plan["look"], plan["confirm"], arm.every]))
    curve, bars, run = results.of(arm.name, seed, mark), arm.bars(plan), None
    while (step := next_step(curve, bars, arm.every, config.steps)) is not None:
        run = run or StagedRun(config, mark)
        figures = run.train_to(step)
        bar = open_bar(curve, bars)
        assert bar is not None
        figures |= judge(config, plan, f"step-{step:06d}", bar, run.run_dir / WEIGHTS_NAME)
        curve.append(results.add(arm.name, seed, mark, figures))
        print(f"{arm.name} seed {seed} step {step}: style_share {figures['look_share']:.2f}", file=sys.stderr)
    if open_bar(curve, bars) is None:
        shutil.rmtree(config.run_dir / "checkpoints", ignore_errors=True)


def reach(names: Sequence[str], seeds: Sequence[int], runs: Path, out: Path, plan_path: Path = PLAN) -> None:
    """Run what is missing, seed by seed, writing the CSV after every checkpoint."""
    plan, arms, scorers = read_plan(plan_path)
    results = Results(out)
    first = next(iter(arms.values())).config(plan, 0, runs)
    run_base(results, plan, first.model_copy(update={"name": BASE}))
    for seed in seeds:
        marks: dict[str, str] = {}
        for name in dict.fromkeys(arms[arm].scorer for arm in names):
            if name is not None:
                print(f"{name} seed {seed}", file=sys.stderr)
                marks[name] = run_scorer(results, scorers[name], scorers[name].config(plan, seed, runs), seed)
        for name in names:
            arm = arms[name]
            run_arm(results, plan, arm, arm.config(plan, seed, runs), seed, marks.get(arm.scorer or "", ""))
            gc.collect()


def parse(arms: dict[str, Arm]) -> argparse.Namespace:
    """The command line; unknown arms are refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=sorted(arms), default=list(arms))
    parser.add_argument("--report", action="store_true", help="run nothing: tables and plot from the CSV")
    parser.add_argument("--readme", action="store_true", help="also put the table into benchmarks/README.md")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "reach")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV; table and plot go beside it")
    return parser.parse_args()


def main() -> None:
    """Prepare the store if need be, run, report."""
    from fastpref.data.prepare import prepare
    from fastpref.train.job import Stopped

    plan, arms, _ = read_plan()
    options = parse(arms)
    try:
        if not options.report:
            prepare(load_config(ROOT / arms["dpo"].recipe))
            reach(options.arms, options.seeds, options.runs, options.out)
        rows = read_csv(options.out)
        if not rows:
            raise UserError("no rows to report", str(options.out), "run it without --report first")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    text = report(plan, rows)
    print(text)
    write_bytes(options.out.with_suffix(".md"), f"# {plan['title']}\n\n{text}\n".encode())
    plot(plan, rows, options.out.with_suffix(".png"))
    if options.readme:
        fill(TABLES, "table: reach", text)


if __name__ == "__main__":
    main()
