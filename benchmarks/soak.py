"""Runs that are killed with SIGKILL at random moments and resumed: is the result the uninterrupted run's, bit for bit?

    python benchmarks/soak.py [--kills 50] [--seed 0] [--work runs/soak] [--fresh]
        [--ranks 2 --launcher 'deepspeed --num_gpus 2' --settings engine=deepspeed …]

One after another, small DPO, RPO and SPO runs (a random SDXL, 40 pairs) are started with resume=auto, killed up to five
times each, and left to finish. A moment is a phase, how often it was entered since the start, and a time up to its
longest duration and a little more; all come from the seed, and where the process then was says its last mark. With
several ranks one is killed, the launcher has to fail, and nobody may live on. A run is lost if it does not finish, or
if weights, those of the best checkpoint, metrics (but for seconds) or the counted work of UNet, VAE and scorer differ
from the uninterrupted run's.
Encoded prompts are kept in memory, not in checkpoints: how many a resumed run had to encode again is a column.

Every finished run is written down in the work folder, and a soak that is stopped goes on with the next one. The table
is in results/soak.csv and soak.md; exit code 1 if a run was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, markdown, provenance, read_csv, write_csv
from safetensors.numpy import load_file
from soak_child import ELSEWHERE, PHASES, Marks

from fastpref.atomic import write_bytes
from fastpref.train.checkpoint import newest_step

METHODS = ("dpo", "rpo", "spo")
KILLS_OF_A_RUN = 5
SECONDS = 600  # a part of a run may take
_SCORER = '''
"""A scorer for the soak: brightness and contrast."""

def bright(images, prompts, t):
    return 1500 * images.mean(dim=(1, 2, 3)) + 800 * images.std(dim=(1, 2, 3))
'''


@dataclass(frozen=True)
class Machine:
    """How a run is started: a launcher in front of the script, its ranks, and settings for all runs."""

    work: Path
    launcher: tuple[str, ...] = (sys.executable,)
    ranks: int = 1
    settings: tuple[str, ...] = ()

    def start(self, method: str, name: str, log: Path) -> tuple[subprocess.Popen[bytes], list[Marks]]:
        """Start or resume a run; its process and the marks of its ranks."""
        folder = self.work / "marks"
        folder.mkdir(exist_ok=True)
        marks = [Marks(folder / f"rank-{rank}", create=True) for rank in range(self.ranks)]
        child = Path(__file__).with_name("soak_child.py")
        overrides = [f"name={name}", f"output_dir={self.work / 'runs'}", "resume=auto", *self.settings]
        command = [*self.launcher, str(child), str(folder), str(self.work / f"{method}.yaml"), *overrides]
        path = os.pathsep.join([str(self.work), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with log.open("ab") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
        return process, marks


@dataclass(frozen=True)
class Moment:
    """When to kill: up to ``wait`` seconds after ``rank`` entered ``phase`` for the ``entry``-th time."""

    rank: int
    phase: str
    entry: int
    wait: float


def prepare_work(work: Path) -> None:
    """Models, records, store and recipes."""
    import pyarrow.parquet as pq

    from fastpref.config import load_config
    from fastpref.data.prepare import prepare
    from fastpref.emoji import TRAIN_PARQUET
    from fastpref.emoji.random_models import make_random_clip, make_random_sdxl

    work.mkdir(parents=True, exist_ok=True)
    if (work / "spo.yaml").is_file():
        return
    make_random_sdxl(work / "model", vae_factor=2)
    make_random_clip(work / "clip")
    (work / "soak_scorer.py").write_text(_SCORER)
    pq.write_table(pq.read_table(TRAIN_PARQUET).slice(0, 40), work / "records.parquet")
    for method in METHODS:
        write_bytes(work / f"{method}.yaml", yaml.safe_dump(recipe(method, work), sort_keys=False).encode())
        if method == "dpo":
            prepare(load_config(work / "dpo.yaml"), progress=False)


def recipe(method: str, work: Path) -> dict[str, Any]:
    """Small, with every kind of state: EMA, warm-up, dropout, groups over micro-batches, half a round, the best."""
    base = {"method": method, "model": f"{work}/model", "clip": f"{work}/clip", "records": f"{work}/records.parquet"}
    base |= {"store": f"{work}/store", "evaluate": False, "tracker": "none", "shard_size": 10, "threads": 1}
    base |= {"steps": 24, "batch_size": 8, "lora_rank": 4, "warmup_steps": 4, "ema_decay": 0.9, "checkpoint_every": 2}
    base |= {"keep_best": "loss"}
    if method != "spo":
        return base | {"micro_batch_size": 4, "caption_dropout": 0.2, **({"group_size": 8} if method == "rpo" else {})}
    rollout = {"sample_steps": 6, "plain_steps": 2, "candidates": 3, "rollout_prompts": 4, "rollout_batch_size": 2}
    judged = {"scorer": "soak_scorer:bright", "score_threshold": 0.05, "guidance_scale": 3.0, "batch_size": 4}
    return base | rollout | judged | {"resolution": 16, "learning_rate": 1e-3}


def uninterrupted(machine: Machine, method: str) -> dict[str, tuple[int, float]]:
    """Make the run that all others are compared with; entries and longest seconds of its phases."""
    name, facts = f"{method}-whole", machine.work / f"{method}-phases.json"
    if not facts.is_file():
        shutil.rmtree(machine.work / "runs" / name, ignore_errors=True)
        process, marks = machine.start(method, name, machine.work / "log")
        if process.wait(SECONDS):
            raise SystemExit(f"the uninterrupted {method} run failed: see {machine.work / 'log'}")
        found = {phase: (marks[0].entered(phase), marks[0].longest(phase)) for phase in PHASES}
        write_bytes(facts, json.dumps({k: v for k, v in found.items() if v[0]}).encode())
    return json.loads(facts.read_text())


def soak_run(machine: Machine, method: str, number: int, seed: int, kills: int) -> list[dict[str, Any]]:
    """One run, killed up to ``kills`` times and left to finish: a row a kill."""
    rng = random.Random(f"{seed} {method} {number}")
    phases, name = uninterrupted(machine, method), f"{method}-{number}"
    run, rows = machine.work / "runs" / name, list[dict[str, Any]]()
    shutil.rmtree(run, ignore_errors=True)
    shuffled = rng.sample(sorted(phases.keys() - {"export"}), len(phases) - 1)
    fault = ""
    while len(rows) < kills and not fault:
        phase = shuffled[(number + len(rows)) % len(shuffled)] if len(rows) + 1 < kills else "export"
        entries, longest = phases[phase]
        # Within a fifth of the run, so that every part of it gets its turn; and sometimes just behind the phase.
        moment = Moment(rng.randrange(machine.ranks), phase, rng.randint(1, max(1, entries // 5)), 1.3 * longest)
        died, fault = kill_at(machine, method, name, moment, rng.random())
        if died is None:
            break
        row = {"method": method, "run": number, "kill": len(rows) + 1, "rank": moment.rank, "seed": seed}
        row |= {"aimed_at": phase, "entry": moment.entry, "died_in": died.phase, "within": died.parent}
        row["beside"] = died.beside
        rows.append(row | {"checkpoint": newest_step(run / "checkpoints")})
    if not rows:
        raise SystemExit(f"{name}: {fault or 'was over before it could be killed'}: see {machine.work / 'log'}")
    again = 0
    if not fault:
        fault, again = finish(machine, method, name)
    rows = [row | {"encoded_again": again, "identical": not fault, "fault": fault} for row in rows]
    if not fault:
        shutil.rmtree(run)
    return rows


def kill_at(machine: Machine, method: str, name: str, moment: Moment, share: float) -> tuple[Marks | None, str]:
    """Start the run and kill it; (the marks of the rank that died, None if it was over before, what went wrong)."""
    process, marks = machine.start(method, name, machine.work / "log")
    target, until = marks[moment.rank], time.monotonic() + SECONDS
    while process.poll() is None and target.entered(moment.phase) < moment.entry:
        if time.monotonic() > until:
            os.killpg(process.pid, signal.SIGKILL)
            return None, "hangs"
        time.sleep(0.0005)
    if process.poll() is not None:
        return None, "" if process.returncode == 0 else f"exit {process.returncode} without a kill"
    time.sleep(moment.wait * share)
    try:
        os.kill(target.pid, signal.SIGKILL)
    except ProcessLookupError:
        return None, "" if process.wait(SECONDS) == 0 else f"exit {process.returncode} without a kill"
    try:
        code = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return target, "hangs after a rank was killed"
    if code == 0:  # alone, it was over when the signal came
        return (None, "") if machine.ranks == 1 else (target, "a killed run says it succeeded")
    return target, survivors(marks)


def survivors(marks: Sequence[Marks]) -> str:
    """What went wrong if ranks are alive a while after the run ended."""
    until = time.monotonic() + 30
    while alive := [rank for rank, mark in enumerate(marks) if mark.pid and Path(f"/proc/{mark.pid}").exists()]:
        if time.monotonic() > until:
            return f"ranks {alive} live on"
        time.sleep(0.05)
    return ""


def finish(machine: Machine, method: str, name: str) -> tuple[str, int]:
    """Resume a run to its end and compare it with the uninterrupted one; (what is wrong, prompts encoded again)."""
    process, _ = machine.start(method, name, machine.work / "log")
    try:
        if process.wait(SECONDS):
            return f"exit {process.returncode} on the last resume", 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "hangs on the last resume", 0
    (ours, encoded), (whole, needed) = (result(machine.work / "runs" / run) for run in (name, f"{method}-whole"))
    return ", ".join(f"{what} differ" for what in whole if ours[what] != whole[what]), encoded - needed


def result(run: Path) -> tuple[dict[str, Any], int]:
    """What has to be equal of two runs, and the prompts encoded."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    counted = {key: value for key, value in summary.items() if key.startswith(("unet_", "vae_", "scorer_"))}
    equal = {
        "weights": exported(run),
        "best": (summary["best_checkpoint"], exported(run / "best")),
        "metrics": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
        "counts": counted,
    }
    return equal, summary["text_forwards"]


def exported(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """A LoRA's tensors; the file's bytes vary, because its metadata has no order."""
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    return {key: (str(value.dtype), value.shape, value.tobytes()) for key, value in weights.items()}


def report(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """soak.md: kills by phase and method."""
    table = []
    for phase in PHASES:
        mine = [row for row in rows if phase in (row["died_in"], row["within"], row.get("beside"))]
        table.append([phase, *(str(sum(row["method"] == method for row in mine)) for method in METHODS)])
    for name, mine in ((ELSEWHERE, [row for row in rows if row["died_in"] == ELSEWHERE]), ("all", rows)):
        table.append([name, *(str(sum(row["method"] == method for row in mine)) for method in METHODS)])
    runs = {(row["method"], row["run"]): row for row in rows}
    lost = [f"{method} run {run}: {row['fault']}" for (method, run), row in runs.items() if row["fault"]]
    again = [int(row["encoded_again"]) for row in runs.values()]
    about = (
        f"{len(rows)} kill -9 in {len(runs)} runs on {rows[0]['ranks']} rank(s), engine {rows[0]['engine']}; each run "
        f"resumed to its end: {len(runs) - len(lost)} are the uninterrupted one in weights (bit for bit), metrics and "
        f"work of UNet, VAE and scorer; lost: {', '.join(lost) or 'none'}. {sum(n > 0 for n in again)} of them encoded "
        f"prompts again (at most {max(again)}), as these are not in checkpoints. A forward in a rollout or in training "
        f"step counts in both rows, and so does a phase beside which a checkpoint was written.\n\n"
    )
    write_bytes(path, f"{about}{markdown(['died in', *METHODS], table)}\n".encode())


def main() -> int:
    """The soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/soak"))
    parser.add_argument("--fresh", action="store_true", help="forget what the work folder holds")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--launcher", default=sys.executable, help="what stands before the script")
    parser.add_argument("--settings", nargs="*", default=[], help="KEY=VALUE for all runs")
    options = parser.parse_args()
    work = options.work.absolute()
    if options.fresh:
        shutil.rmtree(work, ignore_errors=True)
    prepare_work(work)
    machine = Machine(work, tuple(shlex.split(options.launcher)), options.ranks, tuple(options.settings))
    engine = next((s.partition("=")[2] for s in options.settings if s.startswith("engine=")), "local")
    rows: list[dict[str, Any]] = list(read_csv(work / "kills.csv"))
    for place, method in enumerate(METHODS):
        quota = options.kills // len(METHODS) + (place < options.kills % len(METHODS))
        while (done := sum(row["method"] == method for row in rows)) < quota:
            number = max((int(row["run"]) for row in rows if row["method"] == method), default=-1) + 1
            found = soak_run(machine, method, number, options.seed, min(KILLS_OF_A_RUN, quota - done))
            rows += [row | {"engine": engine, "ranks": options.ranks} | provenance() for row in found]
            write_csv(work / "kills.csv", rows)
            print(f"{method} run {number}: {len(found)} kills: {found[0]['fault'] or 'identical'}", flush=True)
    suffix = "" if engine == "local" else f"_{engine}"
    write_csv(RESULTS / f"soak{suffix}.csv", rows)
    report(rows, RESULTS / f"soak{suffix}.md")
    return int(any(row["fault"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
