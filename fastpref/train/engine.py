"""What runs the backward and the step. One small interface and its plain implementation: every process holds all
weights and optimizer states, and gradients are summed over the processes (one process: nothing to sum).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastpref.config import Config
from fastpref.models.masters import Masters
from fastpref.train.loss_scale import FIRST_SCALE, bearable_scale, searches
from fastpref.train.optim import build_optimizer, load_optimizer_state, optimizer_state, set_learning_rate
from fastpref.train.world import World


class Trainable(Protocol):
    """A model in training; it has ``masters`` where its forward computes with copies of the trained parameters."""

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name, always in the same order."""
        ...

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Piece:
    """Elements ``start, start + 1, …`` of a flattened tensor of ``shape``: what one rank holds of it."""

    tensor: torch.Tensor  # (n,)
    start: int
    shape: tuple[int, ...]


State = Mapping[str, torch.Tensor | Piece]


class Engine(Protocol):
    """All that a training loop asks of the machinery below it."""

    world: World

    @property
    def layout(self) -> str:
        """What a state continues bit for bit on, in words."""
        ...

    def begin(self, step: int, learning_rate: float) -> None:
        """Called before the first backward of 0-based ``step``."""
        ...

    def backward(self, objective: torch.Tensor) -> None:
        """Add the gradient of a scalar that already carries its share of the global mean: ranks are summed.

        With several ranks it is a collective, which every rank has to enter as often as the others.
        """
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

    @property
    def settled(self) -> bool:
        """Whether a backward is recorded and repeated: it does what it did in the step before, and no more."""
        ...

    def record_graphs(self, repeat: Callable[..., Any]) -> str | None:
        """Keep gradients at one place in memory from now on, and record the update if the optimizer allows it.

        Args:
            repeat: runs (name, function, inputs) without gradients, as a CUDA graph.

        Returns:
            Why something is not recorded, in one line, or None.
        """
        ...

    def state(self) -> tuple[State, dict[str, Any]]:
        """What this rank keeps for :meth:`load_state` to go on bit for bit, and JSON values.

        The ranks' tensors together are ``policy.NAME``, ``ema.NAME`` and ``optimizer.INDEX.KEY``, each whole or in
        pieces, whatever the engine: one engine's state is another's.
        """
        ...

    def load_state(self, tensors: Mapping[str, torch.Tensor], values: dict[str, Any]) -> None:
        """Put back what the ranks' :meth:`state` gave, joined."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Inside, every trained parameter is there in full and holds its EMA, if there is one: for export."""
        ...


def open_engine(model: Any, config: Config, world: World | None = None) -> Engine:
    """The engine of a recipe, around a policy or a preference model."""
    world = world or World()
    if config.engine == "deepspeed":
        from fastpref.train.deepspeed_engine import ShardedEngine

        return ShardedEngine(model, config, world)
    if config.step_in_backward:
        from fastpref.train.backward_step import BackwardEngine

        return BackwardEngine(model, config, world)
    return LocalEngine(model, config, world)


class LocalEngine:
    """All weights on this process' device."""

    def __init__(self, model: Trainable, config: Config, world: World | None = None) -> None:
        self.world = world or World()
        self.masters: Masters = getattr(model, "masters", None) or Masters(model.trainable)
        self.parameters = list(self.masters.named.values())
        self.names = list(self.masters.named)
        self.optimizer = build_optimizer(config, self.parameters)
        self.max_grad_norm = config.max_grad_norm
        self.scaler = torch.amp.GradScaler(
            model.device.type, init_scale=FIRST_SCALE, enabled=config.precision == "fp16"
        )
        self._searching = searches(config)  # for a loss scale, until the first update
        self.repeat: Callable[..., Any] | None = None
        self._keeps_gradients = False
        self.ema_decay = config.ema_decay
        self.ema = [p.detach().clone() for p in self.parameters] if config.ema_decay else []
        if not config.step_in_backward:
            self.masters.watch()

    @property
    def layout(self) -> str:
        return f"{self.world.size} rank{'s' if self.world.size > 1 else ''}"

    def begin(self, step: int, learning_rate: float) -> None:
        pass

    def backward(self, objective: torch.Tensor) -> None:
        if self._searching:
            self._lower_scale(objective)
        self.scaler.scale(objective).backward()
        self.masters.collect()

    def _lower_scale(self, objective: torch.Tensor) -> None:
        """Lower the scale to what the objective bears, and with it the gradients added up so far."""
        before = self.scaler.get_scale()
        scale = bearable_scale(objective, list(self.masters.copies.values()), before, self.world)
        if scale != before:
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale})
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale / before)  # a power of two

    def step(self, learning_rate: float) -> float | None:
        norm = float(self.launch(learning_rate, torch.zeros((), device=self.parameters[0].device)))
        return norm if math.isfinite(norm) else None

    def launch(self, learning_rate: float, loss: torch.Tensor) -> torch.Tensor:
        set_learning_rate(self.optimizer.param_groups, learning_rate)
        if self.world.size > 1:
            self.world.sum_([p.grad for p in self.parameters if p.grad is not None])
        if self._searching:
            norm, finite = self._apply(loss)
            self._searching = not bool(finite)
            return norm
        return self._apply(loss)[0] if self.repeat is None else self.repeat("optimizer", self._apply, [loss])[0]

    @property
    def settled(self) -> bool:
        return not self._searching

    def record_graphs(self, repeat: Callable[..., Any]) -> str | None:
        self._keeps_gradients = True
        if not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            return f"CUDA graphs without the update: {type(self.optimizer).__name__} waits for the device"
        self.repeat = repeat
        return None

    def _apply(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, update, clear gradients: (norm, whether anything was updated)."""
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self._update(finite)
        self.masters.refresh()
        self.scaler.update()
        self.discard()
        if self.ema:
            self._update_ema(finite)
        return norm, finite

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
        self.optimizer.zero_grad(set_to_none=not self._keeps_gradients)

    def state(self) -> tuple[State, dict[str, Any]]:
        """Every rank has all of it and keeps a part, by name."""
        tensors: dict[str, torch.Tensor] = {}
        values: dict[str, Any] = {"optimizer": {}, "scaler": self.scaler.state_dict(), "searching": self._searching}
        for index, key, value in optimizer_state(self.optimizer):
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                values["optimizer"][f"{index}.{key}"] = value
        for name, parameter in zip(self.names, self.parameters, strict=True):
            tensors[f"policy.{name}"] = parameter.detach()
        for name, average in zip(self.names, self.ema, strict=False):
            tensors[f"ema.{name}"] = average
        own = list(tensors)[self.world.rank :: self.world.size]
        return {name: tensors[name] for name in own}, values

    def load_state(self, tensors: Mapping[str, torch.Tensor], values: dict[str, Any]) -> None:
        if "sharded" in values:
            raise ValueError(f"its optimizer states belong to {values['sharded']}: resume on that")
        state: dict[int, dict[str, Any]] = {}
        for index, field, value in optimizer_entries(tensors, values):
            state.setdefault(index, {})[field] = value
        load_optimizer_state(self.optimizer, state)
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(tensors[f"policy.{name}"])
            for name, average in zip(self.names, self.ema, strict=False):
                average.copy_(tensors[f"ema.{name}"])
        self.masters.refresh()
        if values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        self._searching = self._searching and bool(values.get("searching"))

    @contextmanager
    def whole(self) -> Iterator[None]:
        before = [p.detach().clone() for p in self.parameters] if self.ema else []
        _copy(self.ema, self.parameters)
        with self.masters.in_place():
            yield
        _copy(before, self.parameters)

    @torch.no_grad()
    def _update_ema(self, finite: torch.Tensor) -> None:
        assert self.ema_decay is not None
        weight = finite.to(self.ema[0].dtype) * (1.0 - self.ema_decay)
        for average, parameter in zip(self.ema, self.parameters, strict=True):
            average.lerp_(parameter, weight)


def optimizer_entries(tensors: Mapping[str, torch.Tensor], values: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """(index of the parameter, key, value) of every optimizer state in a checkpoint; tensors are read one by one."""
    for name in tensors:
        part, _, rest = name.partition(".")
        if part == "optimizer":
            index, _, field = rest.partition(".")
            yield int(index), field, tensors[name]
    for name, value in values["optimizer"].items():
        index, _, field = name.partition(".")
        yield int(index), field, value


@torch.no_grad()
def _copy(sources: list[torch.Tensor], targets: list[torch.nn.Parameter]) -> None:
    for source, target in zip(sources, targets, strict=False):
        target.copy_(source)
