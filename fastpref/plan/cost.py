"""Work, traffic and disk: how a global batch falls onto ranks, operations and bytes of a step, bytes of a store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fastpref.config import Config
from fastpref.data.manifest import MANIFEST, read_manifest
from fastpref.plan.count import StepCount


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
    """Bytes that one rank sends in a step, collectives as rings (Rajbhandari et al., arXiv 1910.02054, section 7).

    Stage 0 all-reduces gradients once; 1 reduce-scatters them and gathers weights; 2 reduces after every forward; 3
    gathers all weights, frozen ones too, for every forward and every backward.
    """
    part = (gpus - 1) / gpus
    gradients, trained = count.gradients * part, count.trained * part
    if stage == 0:
        return round(2 * gradients)
    if stage == 1:
        return round(gradients + trained)
    if stage == 2:
        return round(batch.rounds * gradients + trained)
    with_reference = config.method != "sft" and config.reference != "ledger"
    passes = 2 + with_reference  # forward, backward, the reference's forward
    passes += config.method == "rpo" and batch.rounds > 1  # rewards come first
    return round(batch.rounds * (gradients + passes * (count.frozen + count.trained) * part))


def flops(count: StepCount, batch: Batch, gpus: int) -> int:
    """Operations of a step over all ranks, a multiplication and an addition being two."""
    return count.flops * batch.rounds * gpus


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
