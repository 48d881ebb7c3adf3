"""ZeRO through DeepSpeed: optimizer states (1), gradients (2) and weights (3) are split over the ranks.

Only what is trained enters ``deepspeed.initialize``. The state it leaves is not DeepSpeed's own: a rank saves the
elements it owns of each parameter and of its moments, so that any layout, and the local engine, can go on from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastpref.config import Config
from fastpref.train.deepspeed_config import derive, read_settings
from fastpref.train.deepspeed_runtime import LossScale, adapted, import_deepspeed, uncounted
from fastpref.train.engine import Piece, State, optimizer_entries
from fastpref.train.loss_scale import bearable_scale, searches
from fastpref.train.optim import build_optimizer
from fastpref.train.world import World


@dataclass(frozen=True)
class Fragment:
    """What this rank owns of one parameter: elements from ``start``, which lie at ``offset`` of the flat ``group``."""

    index: int  # of the parameter
    name: str
    shape: tuple[int, ...]
    start: int
    group: int
    offset: int
    count: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Its elements in a tensor laid out as the group."""
        return flat.detach().narrow(0, self.offset, self.count)

    def piece(self, flat: torch.Tensor) -> Piece:
        return Piece(self.of(flat), self.start, self.shape)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Its elements in the whole parameter."""
        return whole.reshape(-1).narrow(0, self.start, self.count)


class ShardedEngine:
    """A model trained under ZeRO.

    Weights in training are fp32 and the forward runs under our autocast, exactly as in one process; gradients are
    summed in their own precision. ``model`` has ``module``, what is trained, and ``trainable``, its parameters.
    """

    def __init__(self, model: Any, config: Config, world: World) -> None:
        self.world, self.trainable = world, model.trainable
        deepspeed = import_deepspeed(model.device)
        settings = derive(config, read_settings(config), world.size)
        self.stage = settings["zero_optimization"]["stage"]
        optimizer = build_optimizer(config, list(self.trainable.values()))
        module = model if isinstance(model, torch.nn.Module) else model.unet
        with adapted(config.rank_timeout, double=config.precision == "fp64"):
            found = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
            if self.stage == 3 and getattr(model, "reference_unet", None) is not None:
                frozen = {key: value for key, value in settings.items() if key != "optimizer"}
                self.reference = deepspeed.initialize(
                    model=model.reference_unet, config=frozen, dist_init_required=False
                )
        self.runtime: Any = found[0]
        self.zero: Any = self.runtime.optimizer
        self._replace_norm()
        if self.stage == 3:
            self._keep_whole(getattr(model, "read_from_outside", ()))
        self.fragments = list(self._fragments())
        self.scale = LossScale(config.precision == "fp16")
        self._searching = searches(config)  # for a loss scale, until the first update
        self._mixed = False  # gradients of two scales were added up
        self.pending = self.dropping = False
        self.ema_decay = config.ema_decay
        self.ema = [f.of(self._flat(f)).clone() for f in self.fragments] if config.ema_decay else []

    @property
    def layout(self) -> str:
        return f"{self.world.size} rank{'s' if self.world.size > 1 else ''} under ZeRO-{self.stage}"

    def begin(self, step: int, learning_rate: float) -> None:
        pass

    settled = False  # DeepSpeed runs Python in every backward

    def record_graphs(self, repeat: Callable[..., Any]) -> str | None:
        return None  # never asked: see capture_fault

    def backward(self, objective: torch.Tensor) -> None:
        if self._searching:
            self._lower_scale(objective)
        self.pending = True
        self.zero.clear_backward_seen_flag()  # counts the backward, which DeepSpeed does in the next forward
        self.zero.loss_scaler.cur_scale = self.scale.value
        self.runtime.backward(objective * self.world.size, scale_wrt_gas=False)  # DeepSpeed averages over ranks

    def _lower_scale(self, objective: torch.Tensor) -> None:
        """Lower the scale to what the objective bears; what ZeRO has summed cannot, so that step is skipped."""
        before = self.scale.value
        parameters, around = list(self.trainable.values()), partial(uncounted, self.runtime.module)
        scale = bearable_scale(objective * self.world.size, parameters, before, self.world, around)
        if scale != before:
            self.scale.value, self._mixed = scale, self.pending

    def step(self, learning_rate: float) -> float | None:
        if self._mixed:
            self.discard()
            return None
        for group in self.zero.param_groups:
            group["lr"] = learning_rate
        self.pending = False
        self.runtime.step()
        applied = bool(self.runtime.was_step_applied())
        self.scale.update(applied)
        if not applied:
            return None
        self._searching = False
        self._update_ema()
        return float(self.runtime.get_global_grad_norm())

    def launch(self, learning_rate: float, loss: torch.Tensor) -> torch.Tensor:
        norm = self.step(learning_rate) if bool(torch.isfinite(loss)) else None
        self.discard()
        return torch.tensor(math.nan if norm is None else norm, dtype=torch.float64, device=loss.device)

    def discard(self) -> None:
        self._mixed = False
        if not self.pending:
            return
        self.dropping, self.pending = True, False
        self.runtime.step()
        self.dropping = False

    def state(self) -> tuple[State, dict[str, Any]]:
        tensors: dict[str, torch.Tensor | Piece] = {}
        values: dict[str, Any] = {"optimizer": {}, "scaler": self.scale.state(), "searching": self._searching}
        for fragment, average in zip(self.fragments, self.ema or [None] * len(self.fragments), strict=True):
            flat = self._flat(fragment)
            tensors[f"policy.{fragment.name}"] = fragment.piece(flat)
            if average is not None:
                tensors[f"ema.{fragment.name}"] = Piece(average, fragment.start, fragment.shape)
        fixed = self.world.objects(any(not _movable(state, flat) for flat, state in self._states()))
        if any(fixed):
            values["sharded"] = self.layout
            tensors |= self._fixed_state()
        else:
            tensors |= self._movable_state()
        return tensors, values

    def load_state(self, tensors: Mapping[str, torch.Tensor], values: dict[str, Any]) -> None:
        saved = values.get("sharded")
        if saved is not None and saved != self.layout:
            raise ValueError(f"its optimizer states belong to {saved}, which this run is not: {self.layout}")
        with torch.no_grad():
            for number, fragment in enumerate(self.fragments):
                fragment.of(self._flat(fragment)).copy_(fragment.cut(tensors[f"policy.{fragment.name}"]))
                if self.ema:
                    self.ema[number].copy_(fragment.cut(tensors[f"ema.{fragment.name}"]))
        if saved is None:
            self._load_movable(tensors, values)
        else:
            self._load_fixed(tensors)
        self.scale.load(values["scaler"])
        self._searching = self._searching and bool(values.get("searching"))
        self._publish()

    @contextmanager
    def whole(self) -> Iterator[None]:
        with self._gathered(), torch.no_grad():
            before = {}
            if self.ema:
                before = {name: p.detach().clone() for name, p in self.trainable.items()}
                self._spread_averages()
            yield
            for name, weight in before.items():
                self.trainable[name].data.copy_(weight)

    def _gathered(self) -> AbstractContextManager[Any]:
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.trainable.values()))

    def _spread_averages(self) -> None:
        for parameter in self.trainable.values():
            parameter.data.zero_()
        for fragment, average in zip(self.fragments, self.ema, strict=True):
            fragment.cut(self.trainable[fragment.name].data).copy_(average)
        self.world.sum_([parameter.data for parameter in self.trainable.values()])

    def _fragments(self) -> Iterator[Fragment]:
        for index, (name, parameter) in enumerate(self.trainable.items()):
            if self.stage == 3:
                group, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start = self.world.rank * size
                count = min(size, parameter.ds_numel - start)
                if count > 0:
                    yield Fragment(index, name, tuple(parameter.ds_shape), start, group, offset, count)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                start, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
                group = mapping.param_group_index
                yield Fragment(index, name, tuple(parameter.shape), start, group, place.start, place.numel)

    def _groups(self) -> list[torch.Tensor]:
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _flat(self, fragment: Fragment) -> torch.Tensor:
        return self._groups()[fragment.group]

    def _states(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """The optimizer's state of each flat group; none before the first step."""
        for flat in self._groups():
            yield flat, self.zero.optimizer.state.get(flat, {})

    def _movable_state(self) -> State:
        tensors: dict[str, torch.Tensor | Piece] = {}
        for fragment in self.fragments:
            flat = self._flat(fragment)
            for key, value in self.zero.optimizer.state.get(flat, {}).items():
                name = f"optimizer.{fragment.index}.{key}"
                if value.ndim:
                    tensors[name] = fragment.piece(value)
                elif fragment.start == 0:
                    tensors[name] = value.clone()  # of the whole group; safetensors refuses what shares memory
        return tensors

    def _load_movable(self, tensors: Mapping[str, torch.Tensor], values: dict[str, Any]) -> None:
        own = {fragment.index: fragment for fragment in self.fragments}
        for index, key, value in optimizer_entries(tensors, values):
            if index not in own:
                continue
            fragment, value = own[index], torch.as_tensor(value)
            flat = self._flat(fragment)
            state = self.zero.optimizer.state[flat]
            if value.shape == fragment.shape and key != "step":
                target = state.setdefault(key, torch.zeros_like(flat, dtype=value.dtype, requires_grad=False))
                fragment.of(target).copy_(fragment.cut(value))
            else:
                state[key] = value.to(flat.device)

    def _fixed_state(self) -> State:
        return {
            f"optimizer.rank{self.world.rank}.{number}.{key}": torch.as_tensor(value)
            for number, (_, state) in enumerate(self._states())
            for key, value in state.items()
        }

    def _load_fixed(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for number, (flat, _) in enumerate(self._states()):
            start = f"optimizer.rank{self.world.rank}.{number}."
            for name in (name for name in tensors if name.startswith(start)):
                value = tensors[name]
                key = name.removeprefix(start)
                self.zero.optimizer.state[flat][key] = value.to(flat.device) if value.ndim else value.item()

    def _publish(self) -> None:
        """After the masters were written: let every rank's weights be them."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for number, (low, flat) in enumerate(zip(self.zero.fp16_partitioned_groups_flat, self._groups(), strict=True)):
            low.data.copy_(flat.data)
            self.zero._unflatten_partitioned_parameters(number)
        kept = self.zero.persistent_parameters
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def _keep_whole(self, names: tuple[str, ...]) -> None:
        """Under ZeRO-3 a module's own weights are gathered for its forward only; these are never let go."""
        for parameter in (self.trainable[name] for name in names):
            if not parameter.ds_persist:
                parameter.ds_persist = True
                self.zero.persistent_parameters.append(parameter)
            parameter.all_gather()

    def _replace_norm(self) -> None:
        """Have the norm, on which DeepSpeed clips, be infinite while gradients are to be dropped, and be summed in
        float64 where DeepSpeed would round it."""
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        own = self.stage < 3 and not self.zero.cpu_offload
        compute = self._norm if own else getattr(self.zero, name)

        def norm() -> Any:
            if not self.dropping:
                return compute()
            dropped = torch.tensor(math.inf, device=self._groups()[0].device)
            return [dropped] if self.stage == 3 else dropped

        setattr(self.zero, name, norm)

    def _norm(self) -> torch.Tensor:
        square = torch.zeros(1, dtype=torch.float64, device=self._groups()[0].device)
        for parts in self.zero.averaged_gradients.values():
            for part in parts or []:
                square += torch.linalg.vector_norm(part, dtype=torch.float64) ** 2
        self.world.sum_([square])
        return square.sqrt()[0]

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self.ema_decay is not None:
            masters = [fragment.of(self._flat(fragment)) for fragment in self.fragments]
            torch._foreach_lerp_(self.ema, masters, 1.0 - self.ema_decay)


def _movable(state: Mapping[str, Any], flat: torch.Tensor) -> bool:
    """Whether a flat group's state is a number an element: 8-bit states are blocks, which cross parameters."""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    return len(tensors) == len(state) and all(
        not value.ndim or (value.shape == flat.shape and value.is_floating_point()) for value in tensors
    )
