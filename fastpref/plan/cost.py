"""Work, traffic and disk: how a global batch falls onto ranks, operations and bytes of a step, bytes of a store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fastpref.config import Config
from fastpref.data.manifest import MANIFEST, read_manifest
from fastpref.plan.count import StepCount
from fastpref.train.deepspeed_config import read_settings


@dataclass(frozen=True)
class Batch:
    """The arithmetic of a global batch."""

    pairs: int
    share: int  # pairs of the rank that has most
    micro: int  # pairs of a forward
    rounds: int  # forwards and backwards of a rank per step

    @staticmethod
    def of(config: Config, gpus: int) -> Batch:
        share = math.ceil(config.batch_size / gpus)
        micro = min(config.micro_batch, share)
        if config.accumulation == "keep_graphs" and config.method == "rpo":
            micro = share  # in memory at once
        return Batch(config.batch_size, share, micro, math.ceil(share / micro))


def traffic_bytes(config: Config, count: StepCount, batch: Batch, stage: int, gpus: int) -> int:
    """Bytes that one rank sends in a step of training, collectives as rings (Rajbhandari et al., arXiv 1910.02054,
    section 7), as DeepSpeed does them (benchmarks/scaling_ranks.py counts).

    Stage 0 all-reduces gradients once. DeepSpeed's stages 1 and 2 all-reduce them too, unless its
    ``use_multi_rank_bucket_allreduce`` is false, 1 once and 2 after every backward, and gather what was updated. 3
    reduce-scatters gradients and gathers weights, frozen ones too, for every forward and every backward: the most, for
    weights that are soon needed again may stay (``stage3_max_reuse_distance``) and prefetching may gather in vain.
    """
    part = (gpus - 1) / gpus
    gradients, trained, frozen = count.gradients * part, count.trained * part, count.frozen * part
    if stage == 0:
        return round(2 * gradients)
    if stage < 3:
        zero = read_settings(config).get("zero_optimization", {})
        reduced = gradients * (2 if zero.get("use_multi_rank_bucket_allreduce", True) else 1)
        return round(reduced * (1 if stage == 1 else batch.rounds) + trained)
    base, copy = (frozen, 0.0) if config.train == "lora" else (0.0, frozen)
    with_reference = config.method != "sft" and config.reference != "ledger"
    passes = 2 + _rewards_first(config, batch)  # forward, backward
    return round(batch.rounds * (gradients + passes * (base + trained) + with_reference * (base + copy)))


def flops(config: Config, count: StepCount, batch: Batch, gpus: int) -> int:
    """Operations of a step over all ranks, a multiplication and an addition being two."""
    again = count.forward_flops if _rewards_first(config, batch) else 0
    return (count.flops + again) * batch.rounds * gpus


def _rewards_first(config: Config, batch: Batch) -> bool:
    """Whether the policy's forward is done twice, first for the rewards that couple the pairs."""
    return config.method == "rpo" and batch.rounds > 1


def store_line(config: Config, values_per_picture: int, values_per_caption: int) -> str:
    """What the store is, or will be at most, on disk."""
    store = Path(config.store)
    if (store / MANIFEST).is_file():
        manifest = read_manifest(store)
        return f"{manifest.total_bytes / 1e9:.2f} GB for the {manifest.pairs} pairs of {store}"
    item = 4 if config.precision in ("fp32", "fp64") else 2
    pictures = 2 * values_per_picture * item * (1 + config.posterior) * (1 + config.flips)
    per_pair = pictures + values_per_caption * item
    return f"at most {per_pair / 1e3:.0f} kB a pair, {per_pair * 1e6 / 1e9:.0f} GB a million (prepare --dry-run counts)"
