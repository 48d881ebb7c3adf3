"""The optimizer step inside the backward: a gradient lives from its accumulation to its update, then is freed.

For full fine-tuning in one process and one forward per step. What this changes:

* gradients are clipped tensor by tensor, since the global norm is known only after the last update;
* an objective that is not finite updates nothing; a tensor whose gradient is not finite keeps its weights and its
  optimizer state while the others are updated, ``skipped_tensors`` counts it and the step counts as skipped;
* the device decides all of that, so the host need not wait for it: with fused AdamW it never does;
* with ``pure_bf16`` the weights have no fp32 copy, but for the few that the pass uses in fp32. Each tensor is widened
  for its update and rounded stochastically (Connolly, Higham, Mary 2021): up with the probability that makes the mean
  exact, so that updates far below half a unit in the last place add up instead of being lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.train.engine import LocalEngine, State, Trainable
from fastpref.train.optim import set_learning_rate
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
        self.seed = config.seed
        self.device = model.device
        self._number = 0
        self._sound = torch.ones((), dtype=torch.bool, device=self.device)  # this step's objectives
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self._norms: list[torch.Tensor] = []
        for index, copy in enumerate(self.masters.copies.values()):
            copy.register_post_accumulate_grad_hook(partial(self._update_tensor, index))

    @property
    def skipped_tensors(self) -> int:
        """Updates that were left out because a tensor's gradient was not finite; waits for the device."""
        return int(self._skipped)

    def begin(self, step: int, learning_rate: float) -> None:
        self._number, self._norms = step, []
        self._sound = torch.ones((), dtype=torch.bool, device=self.device)
        set_learning_rate(self._groups, learning_rate)

    def backward(self, objective: torch.Tensor) -> None:
        self._sound = self._sound & torch.isfinite(objective.detach())
        objective.backward()

    def launch(self, learning_rate: float, loss: torch.Tensor) -> torch.Tensor:
        if self.ema:
            self._update_ema(self._sound)
        if not self._norms:
            return torch.where(self._sound, 0.0, torch.nan).double()
        norms = torch.stack(self._norms).double()
        whole = self._sound & torch.isfinite(norms).all()
        return torch.where(whole, torch.linalg.vector_norm(norms), torch.nan)

    settled = False  # its backward is the update, whose random bits and 8-bit steps differ from step to step

    def record_graphs(self, repeat: Callable[..., Any]) -> str | None:
        return "CUDA graphs of the reference alone: step_in_backward updates in the backward"

    def state(self) -> tuple[State, dict[str, Any]]:
        tensors, values = super().state()
        return tensors, values | {"skipped_tensors": self.skipped_tensors}

    def load_state(self, tensors: Mapping[str, torch.Tensor], values: dict[str, Any]) -> None:
        super().load_state(tensors, values)
        self._skipped.fill_(values["skipped_tensors"])

    @torch.no_grad()
    def _update_tensor(self, index: int, copy: torch.Tensor) -> None:
        assert copy.grad is not None
        parameter, wide = self.parameters[index], torch.promote_types(copy.dtype, torch.float32)
        gradient, copy.grad = copy.grad.to(wide), None
        norm = torch.linalg.vector_norm(gradient)
        bad = ~torch.isfinite(norm)
        self._norms.append(norm)
        self._skipped += bad & self._sound
        if self.max_grad_norm is not None:
            gradient.mul_((self.max_grad_norm / norm.double()).clamp(max=1.0).to(wide))
        narrow = parameter.data
        parameter.data = narrow.to(wide)
        parameter.grad = gradient
        self._step_unless(bad | ~self._sound, index)
        exact, parameter.grad = parameter.data, None
        if narrow.dtype == torch.bfloat16:  # pure_bf16: no master
            parameter.data = narrow
            narrow.copy_(round_to_bf16(exact, self._key(index)))
        elif copy is not parameter:
            copy.data.copy_(exact)

    def _step_unless(self, bad: torch.Tensor, index: int) -> None:
        """Update one tensor, or leave it and its state as they are."""
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = bad.to(torch.float32)
        elif bool(bad):  # Adafactor and bitsandbytes, which wait for the device at every tensor themselves
            return
        self._step_alone(index)

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
