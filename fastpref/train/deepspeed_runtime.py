"""What DeepSpeed needs around it: a quiet import, what it has no setting for, and a loss scale."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist

from fastpref.errors import UserError
from fastpref.train.loss_scale import FIRST_SCALE

_GROWTH_INTERVAL = 2000


class LossScale:
    """The dynamic loss scale of fp16: halved when a gradient is not finite, doubled after 2000 that are. Its state is
    that of :class:`torch.amp.GradScaler`. Off, it is 1."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value, self.good = (FIRST_SCALE, 0) if enabled else (1.0, 0)

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good == _GROWTH_INTERVAL:
            self.value, self.good = self.value * 2, 0

    def state(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        factors = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": _GROWTH_INTERVAL}
        return {"scale": self.value, **factors, "_growth_tracker": self.good}

    def load(self, state: dict[str, Any]) -> None:
        if self.enabled and state:
            self.value, self.good = float(state["scale"]), int(state["_growth_tracker"])


def import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # demanded also of one process, which needs no launcher
    try:
        import deepspeed
    except ImportError:
        raise UserError("engine deepspeed needs deepspeed", "engine", "pip install 'fastpref[deepspeed]'") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at the start, for two minutes
    return deepspeed


@contextmanager
def adapted(timeout: float, *, double: bool) -> Iterator[None]:
    """Inside, ``deepspeed.initialize`` does what it has no setting for.

    A parameter without a dimension, which it cannot view as bytes, is broadcast too; the groups of processes it makes
    give up after ``timeout`` seconds and not after torch's 30 minutes; ``double`` keeps masters and sums gradients in
    float64.
    """
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import Init

    convert = Init._convert_to_deepspeed_param  # notes the shape, after which the broadcast comes

    def convert_as_row(init: Any, parameter: torch.nn.Parameter) -> None:
        convert(init, parameter)
        parameter.data = torch.atleast_1d(parameter.data)

    wait = timedelta(seconds=timeout)
    replaced: list[tuple[Any, str, Any]] = [
        (DeepSpeedEngine, "_broadcast_model", lambda engine: _broadcast(engine.module)),
        (Init, "_convert_to_deepspeed_param", convert_as_row),
        (TorchBackend, "new_group", lambda _, ranks: dist.new_group(ranks, timeout=wait)),
    ]
    if double:
        replaced += [
            (ZeROOptimizer, "_configure_master_weights", lambda *_, **__: torch.float64),
            (DeepSpeedEngine, "get_data_types", lambda _: (torch.float64, torch.float64)),
            (DeepSpeedEngine, "communication_data_type", torch.float64),
            # checked where the processor or GPU has fp16, and never used
            (Init, "_set_dtype", lambda init, *_: setattr(init, "dtype", torch.float32)),
        ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _broadcast(module: torch.nn.Module) -> None:
    """Every rank gets rank 0's parameters, bit for bit."""
    for parameter in module.parameters():
        dist.broadcast(torch.atleast_1d(parameter.data).view(torch.uint8), 0)


@contextmanager
def uncounted(module: torch.nn.Module) -> Iterator[None]:
    """A backward inside does not count as that of the forward before; the next one gathers ZeRO-3's weights again."""
    names = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
    before = [(part, {name: vars(part)[name] for name in names if name in vars(part)}) for part in module.modules()]
    yield
    for part, counts in before:
        vars(part).update(counts)
