"""A step on several ranks: its time, its memory, and the bytes it sends beside the formula of ``fastpref plan``.

scaling.py starts one process a rank through torchrun, each running this file with one arm. What is sent is counted
where torch hands a collective to its process group, and weighed as a ring sends it, like the formula.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import config_of

from fastpref.atomic import write_bytes
from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.memory import peak_rss_bytes
from fastpref.models.loading import model_dir_of
from fastpref.plan.cost import traffic_bytes
from fastpref.plan.report import make_plan
from fastpref.train.offline import open_trainer
from fastpref.train.world import close_world, open_world

UNKEPT = "ZeRO-3-unkept"  # every weight is gathered where it is used and let go: what the formula counts
ENGINES = {"local": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3": 3, UNKEPT: 3}
KEEP_NOTHING = dict.fromkeys(
    (f"stage3_{name}" for name in ("max_reuse_distance", "max_live_parameters", "param_persistence_threshold")), 0
) | {"stage3_prefetch_bucket_size": 0}
WEIGHTS = ("lora", "full")
SHORT = ("lora local", "full ZeRO-2")
COUNTED = 2  # steps
# Of a collective: the argument whose bytes count, and how often a ring of n ranks sends them, times (n - 1)/n.
_SENT = {
    **dict.fromkeys(("allreduce_", "allreduce_coalesced_"), (0, 2)),
    **dict.fromkeys(("reduce_", "broadcast_"), (0, 1)),
    **dict.fromkeys(("allgather_", "_allgather_base_", "allgather_coalesced_"), (0, 1)),
    **dict.fromkeys(("allgather_into_tensor_coalesced_",), (0, 1)),
    **dict.fromkeys(("reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"), (1, 1)),
    **dict.fromkeys(("barrier", "monitored_barrier_", "check_for_nan"), (0, 0)),
}


class Traffic(TorchDispatchMode):
    """Inside, bytes that this rank sends, by collective; all its groups are taken to be of all ranks."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func.name().partition("::")
        if space == "c10d":
            name = name.partition(".")[0]
            if name not in _SENT:
                raise ValueError(f"no rule for what {name} sends")
            place, times = _SENT[name]
            tensors = [leaf for leaf in tree_leaves(args[place]) if isinstance(leaf, torch.Tensor)] if times else []
            share = times * (self.ranks - 1) / self.ranks
            self.sent[name] += round(share * sum(tensor.nbytes for tensor in tensors))
        return func(*args, **(kwargs or {}))


def arms(ranks: int, *, short: bool = False) -> list[str]:
    """What is measured with so many ranks; one rank shards nothing."""
    found = [f"{weights} {engine}" for weights in WEIGHTS for engine in (ENGINES if ranks > 1 else ("local",))]
    return [arm for arm in found if arm in SHORT or not short]


def recipe(settings: list[str], arm: str) -> Config:
    """DPO with the reference in the step, two micro-batches for each of two ranks."""
    weights, engine = arm.split()
    overrides = ["method=dpo", f"train={weights}", "micro_batch_size=2", "learning_rate=1e-5"]
    if stage := ENGINES[engine]:
        overrides += ["engine=deepspeed", f"zero_stage={stage}"]
    if engine == UNKEPT:
        file = Path(config_of(settings).store).parent / "unkept.json"
        write_bytes(file, json.dumps({"zero_optimization": KEEP_NOTHING}).encode())  # by every rank, the same
        overrides.append(f"deepspeed={file}")
    return config_of(settings, *overrides)


def formula(config: Config, arm: str, ranks: int) -> int:
    """Bytes that ``fastpref plan`` says a rank sends in a step."""
    plan = make_plan(config, ranks, "cpu")
    return traffic_bytes(config, plan.count, plan.batch, ENGINES[arm.split()[1]], ranks)


def measure(config: Config, arm: str, repeats: int) -> dict[str, Any]:
    """Seconds, peak memory of the largest rank and bytes of a step, as one of the launcher's processes."""
    world = open_world(config, torch.device("cpu"))
    expected = formula(config, arm, world.size) if world.size > 1 else 0
    trainer, found = open_trainer(config, model_dir_of(config), torch.device("cpu"), world), []
    for step in range(repeats + 2):
        world.most(0)  # begin together
        began = time.perf_counter()
        trainer.step(step)
        found.append(time.perf_counter() - began)
    with Traffic(world.size) as traffic:
        for step in range(repeats + 2, repeats + 2 + COUNTED):
            trainer.step(step)
    slowest = [max(times) for times in zip(*world.objects(found[2:]), strict=True)]
    return {
        "arm": arm,
        "seconds": median(slowest),
        "spread": max(slowest) - min(slowest),
        "peak_rss_bytes": max(world.objects(peak_rss_bytes())),
        "sent_bytes": sum(traffic.sent.values()) // COUNTED,
        "formula_bytes": expected,
    } | {f"sent_{name.strip('_')}": size // COUNTED for name, size in sorted(traffic.sent.items()) if size}


def launch(settings: list[str], arm: str, ranks: int, repeats: int) -> dict[str, Any]:
    """The row of one arm, from processes of their own on this machine."""
    job = json.dumps([settings, arm, repeats])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    threads = max(1, torch.get_num_threads() // ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    answer = subprocess.run([*command, __file__, job], capture_output=True, text=True, env=environment)
    lines = [line for line in answer.stdout.splitlines() if line.startswith('{"arm"')]
    if answer.returncode or not lines:
        raise UserError(f"{ranks} ranks with {arm} failed", "scaling", answer.stderr.strip()[-600:])
    return json.loads(lines[-1]) | {"threads": threads}


def note(row: dict[str, Any]) -> str:
    """What a row says beside its time."""
    sent, expected = (float(row[f"{name}_bytes"]) for name in ("sent", "formula"))
    weights, engine = row["arm"].split()
    said = f"{'LoRA' if weights == 'lora' else 'all weights'}, {engine.replace('-unkept', ', nothing kept')}"
    return said if not expected else f"{said}: a rank sends {sent / 1e6:.2f} MB, {sent / expected:.3f} of the formula"


def main(arguments: Sequence[str]) -> None:
    """What one rank does."""
    settings, arm, repeats = json.loads(arguments[0])
    row = measure(recipe(settings, arm), arm, repeats)
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(row), flush=True)
    close_world()


if __name__ == "__main__":
    main(sys.argv[1:])
