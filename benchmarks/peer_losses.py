"""The offline losses of public DPO scripts beside ours, on the same tensors.

A case is a batch of n pairs: predictions of policy and reference and their target, stacked [winners; losers]. Every
script's own statements run on it, ours too, and both are held against the formula in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from peer_code import Checkout
from torch import Tensor
from torch.nn import functional as F

from fastpref.objectives import PairRewards
from fastpref.objectives.dpo import solve_dpo
from fastpref.objectives.safeguard import safeguard_losers
from fastpref.train.figures import won
from fastpref_kernels import implicit_reward_parts

MU = 0.9  # of Diffusion-SDPO's launcher for SD1.5


class Case(NamedTuple):
    """n pairs, winners first; ``beta`` is Diffusion-DPO's, which the loss halves."""

    pred: Tensor  # (2n, C, H, W)
    ref: Tensor
    target: Tensor
    beta: float

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(value.to(dtype) for value in self[:3]), self.beta)


class Outcome(NamedTuple):
    """What one side makes of a case."""

    loss: Tensor  # ()
    gradient: Tensor  # (2n, C, H, W), of the prediction
    accuracy: Tensor | None = None


Side = Callable[[Case], Outcome]


def cases(count: int, pairs: int | None = None) -> Iterator[Case]:
    """``count`` cases in fp32 with errors near 0.1 and policies 1e-4 to 1e-2 away from their references.

    Winner and loser share noise and timestep, so their errors are alike: a share of 0.64 of either is common.
    """
    for seed in range(count):
        random = torch.Generator().manual_seed(seed)
        n = pairs or 1 + seed % 4
        target, delta, change = (torch.randn(2 * n, 4, 16, 16, generator=random) for _ in range(3))
        common = delta[:n].roll(1, dims=1).repeat(2, 1, 1, 1)
        ref = target + 0.3 * (0.8 * common + 0.6 * delta)
        distance = 10.0 ** (-4 + seed % 3)
        yield Case(ref + distance * change, ref, target, (500.0, 2000.0, 5000.0)[seed // 3 % 3])


def script(code: CodeType, helpers: dict[str, Any], *, halved: bool = True, safeguard: bool = False) -> Side:
    """The loss statements of a training script as a :data:`Side`.

    Args:
        helpers: functions of the script that its statements call.
        halved: the script halves β itself; where it does not, it is given half.
    """

    def run(case: Case) -> Outcome:
        pred = case.pred.clone().requires_grad_()
        network = _Network(case.ref)
        beta = case.beta if halved else case.beta / 2
        args = SimpleNamespace(beta_dpo=beta, loss_type="sigmoid", train_method="diffusion-dpo", sdxl=True)
        args.use_winner_preserving, args.winner_preserving_mu = safeguard, MU
        space = {"torch": torch, "F": F, "model_pred": pred, "target": case.target, "args": args, **helpers}
        space |= {"unet": network, "ref_unet": network, "accelerator": SimpleNamespace(unwrap_model=lambda m: m)}
        unused = ("noisy_model_input", "timesteps", "prompt_embeds", "add_time_ids", "pooled_prompt_embeds")
        space |= dict.fromkeys((*unused, "encoder_hidden_states", "added_cond_kwargs")) | {"model_batch_args": ()}
        exec(code, space)
        return Outcome(space["loss"].detach(), torch.autograd.grad(space["loss"], pred)[0], space["implicit_acc"])

    return run


class _Network:
    """Stands for the script's UNet while it asks for the reference's prediction."""

    def __init__(self, prediction: Tensor) -> None:
        self.prediction = prediction

    def __call__(self, *inputs: Any, **conditions: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=self.prediction)

    def disable_adapters(self) -> None:
        """Where the script switches its LoRA off; this is the reference already."""

    def enable_adapters(self) -> None:
        """Where it switches it on again."""


def ours(case: Case, safeguard: bool = False) -> Outcome:
    """Our DPO step: rewards by the kernel, solved by the objective, sent back as weights of the rewards."""
    pred, n = case.pred.clone().requires_grad_(), len(case.pred) // 2
    error = -implicit_reward_parts(case.ref, case.target).reward
    parts = implicit_reward_parts(pred, case.target, ref_error=error, cross=safeguard)
    reward = parts.reward.detach()
    rewards = PairRewards(reward[:n], reward[n:], parts.error[:n], parts.error[n:], parts.cross)
    solution = solve_dpo(rewards, beta=case.beta)
    if safeguard:
        solution = safeguard_losers(solution, rewards, MU)
    assert solution.grad_l is not None
    (parts.reward * torch.cat([solution.grad_w, solution.grad_l])).sum().backward()
    assert pred.grad is not None
    return Outcome(solution.loss, pred.grad, won(reward[:n], reward[n:]).mean())


def exact(case: Case, safeguard: bool = False) -> Outcome:
    """Diffusion-DPO, equation 14, in float64; with the safeguard one λ a pair."""
    case = case.to(torch.float64)
    pred = case.pred.clone().requires_grad_()
    policy, reference = ((x - case.target).square().mean(dim=(1, 2, 3)).chunk(2) for x in (pred, case.ref))
    margin = (reference[0] - policy[0]) - (reference[1] - policy[1])
    loss = -F.logsigmoid(case.beta / 2 * margin).mean()
    (gradient,) = torch.autograd.grad(loss, pred)
    if safeguard:
        won, lost = (case.pred - case.target).flatten(1).chunk(2)
        product = (won * lost).sum(dim=1)
        scale = torch.where(product > 0, (1 - MU) * won.square().sum(dim=1) / product, 1.0).clamp(max=1.0)
        gradient = gradient * torch.cat([torch.ones_like(scale), scale]).view(-1, 1, 1, 1)
    return Outcome(loss.detach(), gradient)


def dpo_side(checkout: Checkout, path: str, **options: Any) -> Side:
    """The loss of the script ``path``, from its first error to its loss and accuracy; ``options`` of :func:`script`."""
    helpers: dict[str, Any] = {}
    if options.get("safeguard"):
        helpers = checkout.definitions(path, "get_adaptive_lose_l_scale", given={"torch": torch})
    return script(checkout.statements(path, "model_losses", "loss", "implicit_acc"), helpers, **options)
