"""Fused kernels for preference alignment of diffusion models: Triton on GPUs, chunked torch on CPUs."""

from .dpo_loss import PairwiseLoss, dpo_loss
from .implicit_reward import ImplicitReward, implicit_reward, implicit_reward_parts
from .keyed_noise import PURPOSES, add_keyed_noise, derive_keys, keyed_noise, keyed_uniform_u32
from .rpo_loss import rpo_loss

__all__ = [
    "PURPOSES",
    "ImplicitReward",
    "PairwiseLoss",
    "add_keyed_noise",
    "derive_keys",
    "dpo_loss",
    "implicit_reward",
    "implicit_reward_parts",
    "keyed_noise",
    "keyed_uniform_u32",
    "rpo_loss",
]
