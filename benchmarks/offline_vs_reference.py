"""Our SFT, DPO and RPO against a literal trainer in the style of the public scripts: same models, data and numerics.

    python benchmarks/offline_vs_reference.py [--model emoji|mid|full|random] [--repeats 5] [--steps 3] [--readme]
    make reference-venv && .venv-reference/bin/python benchmarks/offline_vs_reference.py --methods dpo \\
        --reference-repo CHECKOUT

The sides take turns in one process: literal (literal_offline.py), ours with the reference by LoRA switch, ours with the
ledger, and the bare UNet passes of either. What the literal side spends beside those passes is what there is to gain:
the ceiling is literal over bare, measured in the same run, and a benchmark whose losses differ is void. With --compile,
bare passes that are not compiled take turns too: the eager ceiling, which compiled steps are to pass. Peak memory is
each side's own, in a process of its own. --reference-repo also launches a checkout of diffusers (or, on a GPU, of
DiffusionDPO) as it is on the same model and parquet file, once in every repeat of dpo, behind the others' turns and
with as many threads, under --python: by default the interpreter that ours runs under, so that both have one torch.
``--model full`` is 3 repeats of 1 step, dpo (20 minutes) and rpo (longer); losses agree to the rounding of bf16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, TABLES, provenance, publish, read_csv
from devices import add_device, forget_peak, name_of, open_device, peak_device_bytes, seconds, warm_up_steps
from limit import Bare
from literal_offline import LiteralOffline
from offline_report import METHODS, eager_of, key_of, plot, report
from reference_repo import find_script, run_script
from worlds import MODELS, add_compile, config_of, open_world, trainer_of

from fastpref.config import Config
from fastpref.data.store import Store
from fastpref.errors import UserError
from fastpref.memory import peak_rss_bytes
from fastpref.models.loading import resolve_device
from fastpref.train.offline import OfflineTrainer
from fastpref.train.untrained import MAX_LOGIT_NOISE

OUT = RESULTS / "offline_vs_reference.csv"
# beta / 2 = 50 multiplies four fp32 means of squares of order one, each rounded by 2^-24, and the slope is 1/2: 6e-6
LOSS_TOLERANCE, BF16_TOLERANCE = 1e-5, MAX_LOGIT_NOISE  # the logit's rounding moves a loss by no more than itself
# Methods, repeats, steps of a repeat and overrides; RPO needs a second pair to contrast with.
FULL_SIZE = {"methods": ("dpo", "rpo"), "repeats": 3, "steps": 1}
FULL_SIZE_RPO = ["batch_size=2", "micro_batch_size=2"]
SHORT = {"methods": ("dpo",), "repeats": 3, "steps": 2}
USUAL = {"methods": METHODS, "repeats": 5, "steps": 3}


class Draws:
    """Pairs, noise and timesteps of a trainer's steps, as the literal side wants them."""

    def __init__(self, trainer: OfflineTrainer) -> None:
        self.trainer = trainer

    def of(self, step: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        """(indices (n,), noise (n, C, h, w), timesteps (n,)) of a 0-based step."""
        plan, size = self.trainer.sampler.batch(step), self.trainer.config.batch_size
        batch = self.trainer.batches.build(plan, slice(0, size))
        if self.trainer.batches.schedule.prediction_type != "epsilon":
            raise ValueError("noise is the target of ε-prediction only")
        return plan.indices, batch.target[:size], batch.timesteps[:size]


def literal_of(config: Config) -> LiteralOffline:
    """The literal side of a recipe."""
    return LiteralOffline(config, Store.open(config.store).record)


def losses(trainer: OfflineTrainer, literal: LiteralOffline, steps: int) -> list[tuple[float, float]]:
    """(ours, literal) of each of the first ``steps``, both from where they are."""
    draws = Draws(trainer)
    return [(trainer.step(step)["loss"], literal.step(*draws.of(step))) for step in range(steps)]


def check_same(found: list[tuple[float, float]], tolerance: float = LOSS_TOLERANCE) -> float:
    """The largest difference of the losses.

    Raises:
        UserError: it is larger than rounding explains.
    """
    apart = max(abs(ours - literal) for ours, literal in found)
    if not apart <= tolerance:
        what = f"void: the losses of the two sides differ by {apart:.1e}, more than {tolerance:.0e}"
        raise UserError(what, "offline_vs_reference", "a benchmark of different work says nothing")
    return apart


def sides_of(settings: list[str], method: str) -> dict[str, list[str]]:
    """Overrides of our arms."""
    arms = {"ours": [f"method={method}"]}
    return arms if method == "sft" else arms | {"ours, ledger": [f"method={method}", "reference=ledger"]}


def hold_once(models: list[Any]) -> None:
    """Let UNets from the same files share the weights that nobody trains: three of full size do not fit."""
    weights = {name: p.data for name, p in models[0].named_parameters() if not p.requires_grad}
    for model in models[1:]:
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.data = weights[name]


def measure(
    settings: list[str], method: str, repeats: int, steps: int, public: Callable[[], float] | None = None
) -> list[dict[str, Any]]:
    """Rows ``repeat, side, seconds`` a step, for every side, for the bare passes of ours and for ``public``."""
    ours: dict[str, OfflineTrainer] = {}
    literal = literal_of(config_of(settings, f"method={method}"))
    for side, overrides in sides_of(settings, method).items():
        ours[side] = trainer_of(settings, *overrides)
        hold_once([literal.unet, ours[side].policy.unet])
    first = next(iter(ours.values()))
    half = first.config.precision == "bf16"
    checked = 2 if half else 3
    apart = check_same(losses(first, literal, checked), BF16_TOLERANCE if half else LOSS_TOLERANCE)
    for trainer in ours.values():
        done = checked if trainer is first else 0
        for step in range(done, max(done, warm_up_steps(first.policy.device))):
            trainer.step(step)
    calls: dict[str, Any] = {side: trainer.step for side, trainer in ours.items()}
    bare = {f"bare, {side}": Bare(trainer) for side, trainer in ours.items()}
    for side, overrides in sides_of(settings, method).items() if first.config.compile else ():
        eager = trainer_of(settings, *overrides, "compile=false")
        hold_once([literal.unet, eager.policy.unet])
        bare[eager_of(side)] = Bare(eager)
    draws, rows, names = Draws(first), [], ["literal", *calls, *bare]
    for repeat in range(repeats):
        order = names[repeat % len(names) :] + names[: repeat % len(names)]
        before = dict(literal.seconds)
        spent = dict.fromkeys(names, 0.0)
        for step in range(checked + steps * repeat, checked + steps * (repeat + 1)):
            given = draws.of(step)
            for name in order:
                call = partial(literal.step, *given) if name == "literal" else None
                if call is None:
                    call = bare[name].step if name in bare else partial(calls[name], step)
                spent[name] += seconds(call, first.policy.device)
        for name in names:
            rows.append({"repeat": repeat, "side": name, "seconds": round(spent[name] / steps, 6)})
        parts = {f"literal {part}": value - before.get(part, 0.0) for part, value in literal.seconds.items()}
        rows += [{"repeat": repeat, "side": name, "seconds": round(v / steps, 6)} for name, v in parts.items()]
        if public is not None:
            rows.append({"repeat": repeat, "side": "public script", "seconds": round(public(), 6)})
    return [{"method": method, **row, "loss difference": f"{apart:.1e}"} for row in rows]


def peak(settings: list[str], method: str, side: str, steps: int) -> dict[str, Any]:
    """``peak_rss_bytes`` and, on a GPU, ``peak_device_bytes`` of one side in a process of its own."""
    job = json.dumps({"settings": settings, "method": method, "side": side, "steps": steps})
    command = [sys.executable, __file__, "--worker", job, "--threads", str(torch.get_num_threads())]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"the side '{side}' failed alone", "offline_vs_reference", answer.stderr.strip()[-300:])
    return json.loads(answer.stdout.splitlines()[-1])


def work(job: dict[str, Any]) -> dict[str, Any]:
    """A few steps of one side, nothing else loaded; what they needed at most."""
    settings, method, steps = job["settings"], job["method"], job["steps"]
    config = config_of(settings, f"method={method}")
    device = resolve_device(config.device)
    if job["side"] != "literal":
        trainer = trainer_of(settings, *sides_of(settings, method)[job["side"]])
        forget_peak(device)  # that of making the ledger
        for step in range(steps):
            trainer.step(step)
        return {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": peak_device_bytes(device)}
    literal, generator = literal_of(config), torch.Generator().manual_seed(0)
    shape = Store.open(config.store).batch([0]).latents_w.shape[1:]
    for step in range(steps):
        indices = np.arange(step * config.batch_size, (step + 1) * config.batch_size)
        noise = torch.randn(config.batch_size, *shape, generator=generator)
        literal.step(indices, noise, torch.randint(1000, (config.batch_size,), generator=generator))
    return {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": peak_device_bytes(device)}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="emoji")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all")
    parser.add_argument("--repeats", type=int, help="default: 5")
    parser.add_argument("--steps", type=int, help="of every side in a repeat; default: 3")
    parser.add_argument("--short", action="store_true", help="dpo, 3 repeats of 2 steps, no CSV")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    add_device(parser)
    add_compile(parser, "ours with compile=true (blocks, the default) or unet; bare passes with and without")
    parser.add_argument("--reference-repo", type=Path, help="checkout of diffusers or DiffusionDPO: time it too")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the checkout's script")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="run nothing: table and plot from the CSV")
    parser.add_argument("--readme", action="store_true", help="also put the table into benchmarks/README.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, value in (SHORT if options.short else FULL_SIZE if options.model == "full" else USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All rows of the settings asked for."""
    if options.reference_repo is not None:
        find_script(options.reference_repo)  # before anything is measured
    device = [f"device={options.device}"]
    world = [*open_world(options.model, folder, device), f"compile={options.compile.lower()}"]
    about = {"model": options.model, "compile": options.compile, "device": name_of(open_device(options))}
    about |= {"threads": torch.get_num_threads()}
    rows: list[dict[str, Any]] = []
    for method in options.methods:
        print(method, file=sys.stderr)
        settings = [*world, *(FULL_SIZE_RPO if (options.model, method) == ("full", "rpo") else [])]
        public = None
        if options.reference_repo is not None and method == "dpo":
            config = config_of(settings, "method=dpo")
            public = partial(
                run_script, options.reference_repo, options.python, config, options.steps, folder / "public"
            )
        rows += measure(settings, method, options.repeats, options.steps, public)
        for side in ("literal", *sides_of(settings, method)):
            found = peak(settings, method, side, options.steps)
            rows.append({"method": method, "side": side, **found})
    return [about | row | provenance() for row in rows]


def merged(stored: list[dict[str, str]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` in place of those of the same model, method, device and torch."""
    found = {key_of(row) for row in rows}
    return [*(row for row in stored if key_of(row) not in found), *rows]


def main() -> None:
    """Measure, report."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.worker:
            print(json.dumps(work(json.loads(options.worker))))
            return
        stored: list[dict[str, Any]] = [] if options.short else list(read_csv(options.out))
        if not options.report:
            with tempfile.TemporaryDirectory() as folder:
                stored = merged(stored, run(options, Path(folder)))
        if not stored:
            raise UserError("no rows to report", str(options.out), "run the benchmark first")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    text = report(stored)
    print(text)
    if options.short:
        return
    readme = TABLES if options.readme else None
    publish(options.out, stored, "Offline training against the literal trainer", text, plot, readme)


if __name__ == "__main__":
    main()
