"""Optimizers by name and the learning rate as a function of the step, so that there is no scheduler state to save."""

from __future__ import annotations

import math

import torch

from fastpref.config import Config
from fastpref.errors import UserError


def build_optimizer(config: Config, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimizer over ``parameters``; the learning rate is set at every step."""
    lr, decay = config.learning_rate, config.weight_decay
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=lr, weight_decay=decay)
    if config.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError:
            raise UserError(
                "optimizer adamw8bit needs bitsandbytes", "optimizer", "pip install 'fastpref[bnb]'"
            ) from None
        return bitsandbytes.optim.AdamW8bit(parameters, lr=lr, betas=betas, eps=config.adam_epsilon, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=config.adam_epsilon, weight_decay=decay, fused=True)


def learning_rate_at(config: Config, step: int) -> float:
    """The learning rate of 0-based ``step``: linear warm-up, then constant, linear to zero or cosine to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_scheduler == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    factor = 1.0 - done if config.lr_scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * factor
