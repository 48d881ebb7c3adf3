"""SFT, DPO and RPO from one base, on the same pairs, over several seeds: `make compare`.

    python benchmarks/compare.py [--seeds 0 1 2] [--arms ARM …] [--short] [--report] [--readme]

The arms are in compare.yaml. A finished (arm, seed) is a row of results/compare.csv and is not run again unless its
settings, the base model or an encoder changed; a killed run goes on from its checkpoint. --report only writes tables
and plots from the CSV.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, ROOT, TABLES, fill, provenance, read_csv, write_csv
from compare_report import plot, report, summary_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastpref.atomic import write_bytes
from fastpref.config import Config, load_config
from fastpref.emoji import CLIP_DIR, MODEL_DIR, STYLE_DIR
from fastpref.errors import UserError

ARMS = Path(__file__).parent / "compare.yaml"
# Settings that say where a run lies and how it is watched, not what it computes.
PLACES = {"name", "output_dir", "resume", "overwrite", "store", "tracker", "checkpoint_every", "keep_checkpoints"}
TAIL = 10  # steps at the end over which the training's figures are averaged


@dataclass(frozen=True)
class Arm:
    """One arm of the comparison with the settings on top of the recipe."""

    name: str
    panel: str
    label: str
    settings: dict[str, Any]

    def config(self, plan: dict[str, Any], seed: int, runs: Path) -> Config:
        """The resolved config of one seed."""
        values = {**plan["common"], **self.settings, "seed": seed, "name": f"{self.name}-seed{seed}"}
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        return load_config(ROOT / plan["recipe"], [*overrides, f"output_dir={runs}", "resume=auto"])


def read_plan(path: Path = ARMS) -> tuple[dict[str, Any], dict[str, Arm]]:
    """compare.yaml and its arms by name."""
    plan = yaml.safe_load(path.read_text())
    arms = {name: Arm(name, arm["panel"], arm["label"], arm["set"]) for name, arm in plan["arms"].items()}
    return plan, arms


@cache
def world_fingerprint() -> str:
    """sha256 over the base model and the encoders that measure it."""
    from fastpref.models.loading import folder_fingerprint

    return "".join(folder_fingerprint(folder) for folder in (MODEL_DIR, CLIP_DIR, STYLE_DIR))


def fingerprint(config: Config) -> str:
    """What a row stands for: every setting that differs from its default, the base and the encoders."""
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude=PLACES)
    text = json.dumps(settings, sort_keys=True) + world_fingerprint()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_arm(config: Config) -> dict[str, Any]:
    """Train (or go on), evaluate, and keep the weights and pictures but not the checkpoints; the row's figures."""
    from fastpref.evaluate.runner import evaluate_policy
    from fastpref.models.lora_file import WEIGHTS_NAME
    from fastpref.train.job import TrainJob
    from fastpref.train.reference import prepare_reference
    from fastpref.train.run_dir import check_run_dir, open_run_dir

    resuming = check_run_dir(config)
    if config.reference == "ledger":
        prepare_reference(config, progress=False)
    job = TrainJob.open(config, Console(stderr=True, quiet=True))
    run_dir = open_run_dir(config, resuming)
    summary = job.run(run_dir)
    del job
    gc.collect()
    began = time.perf_counter()
    found = evaluate_policy(config, lora=run_dir / WEIGHTS_NAME, out_dir=run_dir, tag="after")
    row = measured(found) | {"seconds_evaluate": round(time.perf_counter() - began, 1)} | last_steps(run_dir)
    row |= {"pairs": summary["samples_seen"], "seconds_train": round(summary["seconds_train"], 1)}
    row |= {key: summary[key] for key in ("unet_forwards", "unet_backwards")}
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    return row


def measured(found: dict[str, Any]) -> dict[str, Any]:
    """The evaluation's figures, flat."""
    figures = {"style_share": found["style_share"], "style_distance": found["style_distance"]}
    figures |= found["prompt_retrieval"] | {"distance_floor": found["details"]["floor"]}
    return {key: round(value, 5) for key, value in figures.items()}


def last_steps(run_dir: Path) -> dict[str, Any]:
    """Mean of the training's figures over its last steps."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][-TAIL:]
    row: dict[str, Any] = {}
    for key in ("reward_winner", "reward_loser", "accuracy", "effective_contrasts"):
        values = [line[key] for line in lines if line.get(key) is not None]
        row[f"last_{key}"] = round(sum(values) / len(values), 6) if values else ""
    return row


def base_row(config: Config, runs: Path) -> dict[str, Any]:
    """The base model under the same evaluation."""
    from fastpref.evaluate.runner import evaluate_policy

    return measured(evaluate_policy(config, out_dir=runs / "base", tag="before"))


def compare(plan: dict[str, Any], arms: list[Arm], seeds: list[int], runs: Path, out: Path) -> list[dict[str, Any]]:
    """Run what is missing, writing the CSV after each run; all rows of these settings."""
    # Panel by panel, so that a comparison that is stopped has whole panels over all seeds.
    panels = [[arm for arm in arms if arm.panel == panel] for panel in plan["panels"]]
    jobs = [(arm, seed, arm.config(plan, seed, runs)) for panel in panels for seed in seeds for arm in panel]
    rows: list[dict[str, Any]] = [dict(row) for row in read_csv(out)]
    done = {(row["arm"], str(row["seed"])): row["fingerprint"] for row in rows}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("compare", total=len(jobs) + 1)
        base = dataclasses.replace(arms[0], name="base", settings={}).config(plan, 0, runs)
        for arm, seed, config in [(None, 0, base), *jobs]:
            name = arm.name if arm else "base"
            bar.update(task, description=f"{name} seed {seed}")
            mark = fingerprint(config)
            if done.get((name, str(seed))) != mark:
                if config.run_dir.exists() and (name, str(seed)) in done:
                    shutil.rmtree(config.run_dir)  # made with other settings or on another base
                figures = run_arm(config) if arm else base_row(config, runs)
                rows = [row for row in rows if (row["arm"], str(row["seed"])) != (name, str(seed))]
                panel = arm.panel if arm else "base"
                rows.append({"arm": name, "panel": panel, "seed": seed, **figures, "fingerprint": mark, **provenance()})
                write_csv(out, rows)
            bar.advance(task)
    return rows


def parse(plan: dict[str, Any], arms: dict[str, Arm]) -> argparse.Namespace:
    """The command line; unknown arms are refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=sorted(arms), default=list(arms))
    parser.add_argument("--short", action="store_true", help="compare.yaml's short form, into runs/bench")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and plots from the CSV")
    parser.add_argument("--readme", action="store_true", help="also put the table into benchmarks/README.md")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "compare")
    options = parser.parse_args()
    if options.short:
        options.seeds, options.arms = plan["short"]["seeds"], plan["short"]["arms"]
    return options


def main() -> None:
    """Prepare the store if need be, run, report."""
    plan, arms = read_plan()
    options = parse(plan, arms)
    out = (ROOT / "runs" / "bench" if options.short else RESULTS) / "compare.csv"
    try:
        if not options.report:
            from fastpref.data.prepare import prepare

            chosen = [arms[name] for name in options.arms]
            prepare(load_config(ROOT / plan["recipe"]))
            compare(plan, chosen, options.seeds, options.runs, out)
        rows = read_csv(out)
        if not rows:
            raise UserError("no rows to report", str(out), "run the comparison first")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    text = report(plan, rows)
    print(text)
    write_bytes(out.with_suffix(".md"), f"# {plan['title']}\n\n{text}\n".encode())
    plot(plan, rows, out.with_suffix(".png"))
    if options.readme:
        fill(TABLES, "table: make compare", summary_table(plan, rows))


if __name__ == "__main__":
    main()
