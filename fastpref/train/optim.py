"""Optimizers by name, their state, and the learning rate as a function of the step: there is no scheduler to save."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fastpref.config import Config
from fastpref.errors import UserError

_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit", "lion8bit": "Lion8bit"}


def build_optimizer(config: Config, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimizer over ``parameters``; the learning rate is set at every step.

    Raises:
        UserError: an 8-bit optimizer without bitsandbytes.
    """
    lr, decay = config.learning_rate, config.weight_decay
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=lr, weight_decay=decay)
    if config.optimizer == "adamw":
        device = parameters[0].device
        on_gpu = device.type == "cuda"  # where a recorded step reads its rate from memory
        rate = torch.tensor(lr, device=device) if on_gpu else lr
        settings: dict[str, Any] = {"eps": config.adam_epsilon, "weight_decay": decay, "fused": True}
        return torch.optim.AdamW(parameters, lr=rate, betas=betas, capturable=on_gpu, **settings)
    library, name = _bitsandbytes(config.optimizer), config.optimizer
    if name == "paged_adamw8bit" and parameters[0].device.type == "cpu":
        name = "adamw8bit"  # what bitsandbytes falls back to, without its warning
    kind = getattr(library.optim, _BITSANDBYTES[name])
    more = {} if name == "lion8bit" else {"eps": config.adam_epsilon}
    return kind(parameters, lr=lr, betas=betas, weight_decay=decay, **more)


def set_learning_rate(groups: Iterable[dict[str, Any]], rate: float) -> None:
    """Of an optimizer's groups, whatever they keep it in, alone or together."""
    shared: dict[int, torch.Tensor] = {}
    for group in groups:
        if isinstance(group["lr"], torch.Tensor):
            shared[id(group["lr"])] = group["lr"]
        else:
            group["lr"] = rate
    for tensor in shared.values():
        tensor.fill_(rate)


def optimizer_state(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, str, Any]]:
    """(position of the parameter, name, tensor or number) of everything the optimizer remembers, in its own dtypes."""
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            # bitsandbytes lets all parameters share one table, which a safetensors file cannot
            yield index, key, value.clone() if key.startswith("qmap") else value


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """Put back what :func:`optimizer_state` gave.

    ``Optimizer.load_state_dict`` would cast the moments to the dtype of the parameter, which rounds those of bf16
    weights, and bitsandbytes' nests the tensors.
    """
    optimizer.state.clear()
    paged = getattr(optimizer, "is_paged", False)
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in state.get(index, {}).items():
            if paged and key in ("state1", "state2"):
                value = optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
            elif isinstance(value, torch.Tensor) and (key != "step" or optimizer.defaults.get("fused")):
                value = value.to(parameter.device)
            optimizer.state[parameter][key] = value


def learning_rate_at(config: Config, step: int) -> float:
    """The learning rate of 0-based ``step``: linear warm-up, then constant, linear to zero or cosine to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    factor = 1.0 - done if config.lr_scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * factor


def rate_jump(config: Config, step: int, planned: int | None) -> str:
    """What other ``steps`` than were ``planned`` at a checkpoint do to the next step's learning rate, if anything."""
    if planned is None or planned == config.steps or not 0 < step < config.steps:
        return ""
    before = config.model_copy(update={"steps": planned})
    last, unchanged, now = (learning_rate_at(c, s) for c, s in ((before, step - 1), (before, step), (config, step)))
    if now == unchanged:
        return ""
    why = f"steps is {config.steps}, was {planned}, and lr_scheduler {config.lr_scheduler} ends with them"
    return f"the learning rate jumps from {last:.3g} to {now:.3g}: {why}"


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _bitsandbytes(optimizer: str) -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            f"optimizer {optimizer} needs bitsandbytes", "optimizer", "pip install 'fastpref[bnb]'"
        ) from None
    return bitsandbytes
