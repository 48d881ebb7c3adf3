"""One recipe's trainer in the arithmetics that are compared, with the same trained weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from worlds import BATCH, trainer_of

from fastpref.train.engine import LocalEngine
from fastpref.train.offline import OfflineTrainer
from fastpref_kernels import implicit_reward

ISLANDS = {
    "embeddings": ("time_embedding", "add_embedding"),
    "conv_in": ("conv_in",),
    "last norm and conv_out": ("conv_norm_out", "conv_out"),
}
ROUNDED, AUTOCAST, ONE_DTYPE = "fp32, weights rounded to bf16", "autocast", "one dtype"
Weights = dict[str, Tensor]


class Found(NamedTuple):
    """What a batch of n pairs came to; the reference's errors and the prediction are detached."""

    prediction: Tensor  # (2n, C, H, W), fp64
    errors: Tensor  # (2, n) of the policy, winners first, with their graph
    reference: Tensor  # (2, n) of the reference, fp64


def opened(settings: Sequence[str], arm: str, weights: Weights | None = None) -> OfflineTrainer:
    """A trainer that computes as ``arm`` says, with ``weights`` in place of its LoRA's.

    ``arm``: a precision; :data:`ROUNDED`, fp32 on the frozen weights of a half-precision pass; :data:`AUTOCAST`, bf16
    by autocast over fp32 LoRA weights; :data:`ONE_DTYPE`, bf16 with the fp32 islands; ``no fp32 islands``; a key of
    :data:`ISLANDS`: that one alone.
    """
    precision = {ROUNDED: "fp32", "fp64": "fp64", "fp32": "fp32"}.get(arm, "bf16")
    engine = "deepspeed" if arm == AUTOCAST else "local"
    with mock.patch("fastpref.train.offline.open_engine", LocalEngine):
        trainer = trainer_of([*settings, f"precision={precision}", f"engine={engine}"])
    unet = trainer.policy.unet
    if arm == ROUNDED:
        _round_frozen(unet)
    elif precision == "bf16" and arm not in (AUTOCAST, ONE_DTYPE):
        _narrow(unet, [part for name, parts in ISLANDS.items() if name != arm for part in parts])
    if weights is not None:
        load(trainer, weights)
    return trainer


@torch.no_grad()
def _round_frozen(unet: Any) -> None:
    """Give frozen weights and the prompts the values that they have in a bf16 pass."""
    for parameter in unet.parameters():
        if not parameter.requires_grad:
            parameter.copy_(parameter.to(torch.bfloat16))

    def rounded(_: Any, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        prompts = named["encoder_hidden_states"]
        return inputs, named | {"encoder_hidden_states": prompts.to(torch.bfloat16).to(prompts.dtype)}

    unet.register_forward_pre_hook(rounded, with_kwargs=True)


def _narrow(unet: Any, parts: Sequence[str]) -> None:
    """Have these modules of a half-precision pass compute in bf16."""
    for part in parts:
        module = getattr(unet, part).to(torch.bfloat16)
        module.register_forward_pre_hook(lambda _, inputs: tuple(None if x is None else x.bfloat16() for x in inputs))


def weights_of(trainer: OfflineTrainer) -> Weights:
    """A copy of what is trained."""
    return {name: weight.detach().clone() for name, weight in trainer.policy.trainable.items()}


@torch.no_grad()
def load(trainer: OfflineTrainer, weights: Weights) -> None:
    """Put ``weights`` into the trained ones."""
    for name, weight in trainer.policy.trainable.items():
        weight.copy_(weights[name])
    trainer.policy.masters.refresh()


def compute(trainer: OfflineTrainer, step: int) -> Found:
    """The batch of a step through policy and reference."""
    batch = trainer.batches.build(trainer.sampler.batch(step), slice(0, BATCH))
    inputs = batch.noisy, batch.timesteps, batch.conditioning
    reference = errors_of(trainer.policy.predict_reference(*inputs), batch.target).double()
    prediction = trainer.policy.predict(*inputs)
    return Found(prediction.detach().double(), errors_of(prediction, batch.target), reference)


def errors_of(prediction: Tensor, target: Tensor) -> Tensor:
    """(2, n), winners first."""
    return -implicit_reward(prediction, target).view(2, -1)


def gradient(trainer: OfflineTrainer, errors: Tensor, reference: Tensor, beta: float) -> Tensor:
    """DPO's gradient of the trained weights, one fp64 vector; the graph of ``errors`` stays."""
    slope = torch.sigmoid(-logit(errors.detach(), reference, beta)) * beta / 2 / errors.shape[1]
    weights = torch.stack([slope, -slope]).to(errors.dtype)
    trained = list(trainer.policy.masters.copies.values())
    found = torch.autograd.grad(errors, trained, weights, retain_graph=True)
    return torch.cat([part.double().flatten() for part in found])


def logit(errors: Tensor, reference: Tensor, beta: float) -> Tensor:
    """(n,) β/2·Δreward."""
    rewards = reference - errors.detach().double()
    return (rewards[0] - rewards[1]) * (beta / 2)


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())


def angle(found: Tensor, exact: Tensor) -> float:
    """1 - cosine of two vectors."""
    return 1 - float(torch.nn.functional.cosine_similarity(found, exact, dim=0))
