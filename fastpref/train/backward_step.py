"""The optimizer step inside the backward: a gradient lives from its accumulation to its update, then is freed.

For full fine-tuning in one process and one forward per step. What this changes:

* gradients are clipped tensor by tensor, since the global norm is known only after the last update;
* a backward whose objective is not finite is not run; a tensor whose gradient is not finite keeps its weights while
  the others are updated, ``skipped_tensors`` counts it and the step counts as skipped;
* with ``pure_bf16`` the weights have no fp32 copy. Each tensor is widened for its update and rounded stochastically
  (Connolly, Higham, Mary 2021): up with the probability that makes the mean exact, so that updates far below
  half a unit in the last place add up instead of being lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.train.engine import LocalEngine, State, Trainable
from fastpref.train.world import World
from fastpref_kernels import derive_keys


class BackwardEngine(LocalEngine):
    """One process, one device, every parameter updated as soon as its gradient is whole."""

    def __init__(self, model: Trainable, config: Config, world: World | None = None) -> None:
        super().__init__(model, config, world)
        if self.world.size > 1:
            what = f"step_in_backward is for one process, and here are {self.world.size} ranks"
            raise UserError(what, "step_in_backward", "use engine=deepspeed without it, or start one process")
        (whole,) = self.optimizer.param_groups
        self._groups: list[dict[str, Any]] = [{**whole, "params": [p]} for p in self.parameters]
        self.seed, self.pure_bf16 = config.seed, config.pure_bf16
        self.skipped_tensors = 0
        self._number, self._squares, self._whole = 0, 0.0, True
        for index, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._update_tensor, index))

    def begin(self, step: int, learning_rate: float) -> None:
        self._number, self._squares, self._whole = step, 0.0, True
        for group in self._groups:
            group["lr"] = learning_rate

    def backward(self, objective: torch.Tensor) -> None:
        if bool(torch.isfinite(objective)):
            objective.backward()
        else:
            self._whole = False

    def launch(self, learning_rate: float, loss: torch.Tensor) -> torch.Tensor:
        if self.ema:
            self._update_ema(torch.ones((), dtype=torch.bool, device=self.ema[0].device))
        return torch.tensor(math.sqrt(self._squares) if self._whole else math.nan, dtype=torch.float64)

    def state(self) -> tuple[State, dict[str, Any]]:
        tensors, values = super().state()
        return tensors, values | {"skipped_tensors": self.skipped_tensors}

    def load_state(self, tensors: Mapping[str, torch.Tensor], values: dict[str, Any]) -> None:
        super().load_state(tensors, values)
        self.skipped_tensors = values["skipped_tensors"]

    @torch.no_grad()
    def _update_tensor(self, index: int, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        wide = torch.promote_types(parameter.dtype, torch.float32)
        norm = float(torch.linalg.vector_norm(parameter.grad, dtype=wide))
        if not math.isfinite(norm):
            self._whole, parameter.grad = False, None
            self.skipped_tensors += 1
            return
        self._squares += norm * norm
        if self.max_grad_norm is not None and norm > self.max_grad_norm:
            parameter.grad.mul_(self.max_grad_norm / norm)
        if self.pure_bf16:
            self._step_widened(index, parameter)
        else:
            self._step_alone(index)
        parameter.grad = None

    def _step_widened(self, index: int, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        narrow, gradient = parameter.data, parameter.grad.float()
        parameter.grad = None
        parameter.data = narrow.float()
        parameter.grad = gradient
        self._step_alone(index)
        exact, parameter.grad = parameter.data, None
        parameter.data = narrow
        narrow.copy_(round_to_bf16(exact, self._key(index)))

    def _step_alone(self, index: int) -> None:
        whole, self.optimizer.param_groups = self.optimizer.param_groups, [self._groups[index]]
        self.optimizer.step()
        self.optimizer.param_groups = whole

    def _key(self, index: int) -> int:
        return int(derive_keys(self.seed, self._number, torch.tensor([index]), 0, "rounding"))


def round_to_bf16(values: torch.Tensor, key: int) -> torch.Tensor:
    """fp32 ``values``, finite, of any shape, to one of their two bf16 neighbours, such that the mean is the value.

    Args:
        key: seeds the random bits; the same key gives the same bits on the same kind of device.
    """
    random = torch.Generator(values.device).manual_seed(key)
    noise = torch.empty(values.shape, dtype=torch.int32, device=values.device).random_(0, 1 << 16, generator=random)
    # the lower 16 bits are the distance to the neighbour nearer to zero: carry into the upper ones in that proportion
    return noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()
