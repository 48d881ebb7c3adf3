"""What a batch of implicit rewards is worth: rewards in, loss and its gradient out; no model, no device, no I/O."""

from __future__ import annotations

from fastpref.objectives.build import Objective, build_objective
from fastpref.objectives.types import PairRewards, Solution

__all__ = ["Objective", "PairRewards", "Solution", "build_objective"]
