"""What runs the backward and the step. One small interface; this process alone implements it trivially."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch

from fastpref.config import Config
from fastpref.train.optim import build_optimizer, load_optimizer_state, optimizer_state


class Trainable(Protocol):
    """A model in training."""

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name, always in the same order."""
        ...

    @property
    def device(self) -> torch.device: ...


class Engine(Protocol):
    """All that a training loop asks of the machinery below it."""

    rank: int
    world_size: int

    def share(self, pairs: int) -> slice:
        """This rank's part of a global batch."""
        ...

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """``(F, n)`` of every rank, joined along the second dimension in rank order."""
        ...

    def begin(self, step: int, learning_rate: float) -> None:
        """Called before the first backward of 0-based ``step``."""
        ...

    def backward(self, objective: torch.Tensor) -> None:
        """Add the gradient of a scalar that already carries its share of the global mean."""
        ...

    def step(self, learning_rate: float) -> float | None:
        """Clip, update, clear gradients. Returns the gradient norm before clipping, or None if it was not finite
        and nothing was updated."""
        ...

    def launch(self, learning_rate: float, loss: torch.Tensor) -> torch.Tensor:
        """As :meth:`step`, without waiting for the device: the norm as a scalar tensor. If it or ``loss`` is not finite
        nothing is updated."""
        ...

    def discard(self) -> None:
        """Clear gradients without an update."""
        ...

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and JSON values that :meth:`load_state` needs to go on bit for bit."""
        ...

    def load_state(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Put back what :meth:`state` gave."""
        ...

    def ema_weights(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name; empty without ``ema_decay``."""
        ...


class LocalEngine:
    """One process, one device."""

    rank = 0
    world_size = 1

    def __init__(self, model: Trainable, config: Config) -> None:
        self.parameters = list(model.trainable.values())
        self.names = list(model.trainable)
        self.optimizer = build_optimizer(config, self.parameters)
        self.max_grad_norm = config.max_grad_norm
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=config.precision == "fp16")
        self.ema_decay = config.ema_decay
        self.ema = [p.detach().clone() for p in self.parameters] if config.ema_decay else []

    def share(self, pairs: int) -> slice:
        return slice(0, pairs)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def begin(self, step: int, learning_rate: float) -> None:
        pass

    def backward(self, objective: torch.Tensor) -> None:
        self.scaler.scale(objective).backward()

    def step(self, learning_rate: float) -> float | None:
        norm = float(self.launch(learning_rate, torch.zeros((), device=self.parameters[0].device)))
        return norm if math.isfinite(norm) else None

    def launch(self, learning_rate: float, loss: torch.Tensor) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self._update(finite)
        self.scaler.update()
        self.discard()
        if self.ema:
            self._update_ema(finite)
        return norm

    def _update(self, finite: torch.Tensor) -> None:
        """The optimizer's step where ``finite`` says so; fused optimizers read that on the device."""
        if self.scaler.is_enabled():  # skips by itself and must see the gradients, to lower its scale
            self.scaler.step(self.optimizer)
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.found_inf = (~finite).to(torch.float32)
            self.optimizer.step()
        elif bool(finite):
            self.optimizer.step()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors: dict[str, torch.Tensor] = {}
        values: dict[str, Any] = {"optimizer": {}, "scaler": self.scaler.state_dict()}
        for index, key, value in optimizer_state(self.optimizer):
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                values["optimizer"][f"{index}.{key}"] = value
        for name, parameter in zip(self.names, self.parameters, strict=True):
            tensors[f"policy.{name}"] = parameter.detach()
        for name, average in zip(self.names, self.ema, strict=False):
            tensors[f"ema.{name}"] = average
        return tensors, values

    def load_state(self, tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
        state: dict[int, dict[str, Any]] = {}
        for key, value in [*tensors.items(), *((f"optimizer.{k}", v) for k, v in values["optimizer"].items())]:
            part, _, rest = key.partition(".")
            if part == "optimizer":
                index, _, field = rest.partition(".")
                state.setdefault(int(index), {})[field] = value
        load_optimizer_state(self.optimizer, state)
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(tensors[f"policy.{name}"])
            for name, average in zip(self.names, self.ema, strict=False):
                average.copy_(tensors[f"ema.{name}"])
        if values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])

    def ema_weights(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.ema, strict=False))

    @torch.no_grad()
    def _update_ema(self, finite: torch.Tensor) -> None:
        assert self.ema_decay is not None
        weight = finite.to(self.ema[0].dtype) * (1.0 - self.ema_decay)
        for average, parameter in zip(self.ema, self.parameters, strict=True):
            average.lerp_(parameter, weight)


def open_engine(model: Trainable, config: Config) -> LocalEngine:
    """The engine a recipe asks for."""
    if config.step_in_backward:
        from fastpref.train.backward_step import BackwardEngine

        return BackwardEngine(model, config)
    return LocalEngine(model, config)
