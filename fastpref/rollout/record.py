"""What a run leaves of its rollouts: ``rollouts.jsonl``, an object a round, and the pools of two rounds to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref.atomic import write_tensors
from fastpref.rollout.collect import PoolSample, round_figures
from fastpref.rollout.pool import PoolSampler
from fastpref.rollout.transitions import Selection


class RoundRecord:
    """Appends to ``run_dir/rollouts.jsonl``; of two lines about one round the later one counts.

    The pools of the first prompt of the first and of the newest round are in ``run_dir/pools/round-NNNNN.safetensors``.
    Of several ranks one ``writes``; all know the line.
    """

    def __init__(self, run_dir: Path, *, writes: bool = True) -> None:
        self.writes = writes
        self.lines, self.pools = run_dir / "rollouts.jsonl", run_dir / "pools"
        self.line = _newest(self.lines)

    def open_round(
        self,
        number: int,
        step: int,
        prompts: int,
        transitions: int,
        cost: dict[str, float],
        sampler: PoolSampler,
        theta: Sequence[float],
        selections: Sequence[Selection],
        sample: PoolSample,
        method: str,
    ) -> dict[str, Any]:
        """Write down a round that is scored and not yet trained on; its line.

        Args:
            step: optimizer steps before it.
            cost: ``unet_forwards, seconds_rollout, seconds_scoring``.
        """
        head = {"round": number, "step": step, "prompts": prompts, "transitions": transitions}
        figures = round_figures(sampler, theta, selections)
        self.line = {**head, **figures, **cost, "seconds_training": None}
        if not self.writes:
            return self.line
        self._append()
        tensors = {"latents": sample.latents, "scores": sample.scores, "chosen": sample.chosen}
        about = {"prompt": sample.prompt, "timesteps": json.dumps(sampler.score_timesteps), "method": method}
        path = self.pools / f"round-{number:05d}.safetensors"
        write_tensors(path, tensors | {"kept": sample.kept.byte()}, about)
        for older in sorted(self.pools.glob("round-*.safetensors"))[1:-1]:
            older.unlink()
        return self.line

    def close_round(self, seconds_training: float) -> None:
        """Write the round's line again, with what its training took."""
        self.line = {**self.line, "seconds_training": seconds_training}
        if self.writes:
            self._append()

    def _append(self) -> None:
        with self.lines.open("a") as stream:
            stream.write(json.dumps(self.line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _newest(path: Path) -> dict[str, Any]:
    """The last whole line."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue  # cut by a kill
        if isinstance(found, dict):
            return found
    return {}
