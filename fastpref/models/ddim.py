"""DDIM on any grid of timesteps."""

from __future__ import annotations

from fractions import Fraction
from functools import wraps
from typing import Any

from diffusers import DDIMScheduler


class ChainedDDIMScheduler(DDIMScheduler):
    """diffusers' DDIM whose every step ends at the timestep where the next one begins, the last one at ᾱ_0.

    diffusers' own step leads from t to ``t - T // steps``. On an evenly spaced grid that is the next timestep and both
    are the same; with linspace, or trailing where ``steps`` does not divide T, it is one that nothing goes on from.
    """

    timesteps: Any
    num_inference_steps: Any
    _grid: tuple[int, ...] = ()  # the timesteps on the host: a step on a GPU must not wait for them

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps)
        grid = self.timesteps[:num_inference_steps]  # trailing, 61 steps: rounding adds a 62nd, at t = -1
        self._grid, self.timesteps = tuple(grid.tolist()), grid.to(device)

    @wraps(DDIMScheduler.step)
    def step(self, model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        later = [t for t in self._grid if t < int(timestep)]
        steps, stride = self.num_inference_steps, int(timestep) - max(later) if later else int(timestep) + 1
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, stride)  # T // it is the stride
        try:
            return super().step(model_output, timestep, *args, **kwargs)
        finally:
            self.num_inference_steps = steps
