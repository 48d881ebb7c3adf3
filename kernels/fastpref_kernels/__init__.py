"""Fused kernels for preference alignment of diffusion models: Triton on GPUs, chunked torch on CPUs."""

from .common.checks import Weight
from .common.keys import PURPOSES, Purpose, derive_keys, keyed_uniform_u32
from .common.pairwise import PairwiseLoss
from .ddim_pool_step import DDIMPool, ddim_pool_step, predict_x0
from .dpo_loss import dpo_loss
from .geglu import geglu
from .group_norm_silu import group_norm_silu
from .implicit_reward import ImplicitReward, implicit_reward, implicit_reward_parts
from .implicit_reward.targets import KeyedNoise, KeyedVelocity
from .keyed_noise import add_keyed_noise, keyed_noise
from .lora_linear import lora_linear
from .paired_preference_loss import Kind, PairedPreferenceLoss, paired_preference_loss
from .patch import MEMORY_BOUND, PatchCounts, patch_unet, unpatch_unet
from .rpo_loss import rpo_loss
from .transition_loss import TransitionLoss, transition_loss

__version__ = "0.2.0"

# The ops, a folder each: tests, workloads, byte tables, planted faults and the README's table are made of these.
OPERATORS = (
    "implicit_reward",
    "paired_preference_loss",
    "dpo_loss",
    "rpo_loss",
    "keyed_noise",
    "ddim_pool_step",
    "transition_loss",
    "group_norm_silu",
    "geglu",
    "lora_linear",
)

__all__ = [
    "MEMORY_BOUND",
    "OPERATORS",
    "PURPOSES",
    "DDIMPool",
    "ImplicitReward",
    "KeyedNoise",
    "KeyedVelocity",
    "Kind",
    "PairedPreferenceLoss",
    "PairwiseLoss",
    "PatchCounts",
    "Purpose",
    "TransitionLoss",
    "Weight",
    "add_keyed_noise",
    "ddim_pool_step",
    "derive_keys",
    "dpo_loss",
    "geglu",
    "group_norm_silu",
    "implicit_reward",
    "implicit_reward_parts",
    "keyed_noise",
    "keyed_uniform_u32",
    "lora_linear",
    "paired_preference_loss",
    "patch_unet",
    "predict_x0",
    "rpo_loss",
    "transition_loss",
    "unpatch_unet",
]
