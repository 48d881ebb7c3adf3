"""Parts of the workloads that several ops share: inputs, and eager torch in the inputs' dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases.case import Inputs
from coefficients import ddim
from torch import Tensor

import fastpref_kernels as fp

ALPHAS = torch.linspace(0.85**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
GUIDANCE, BETA, TEMPERATURE, T, T_PREV, CANDIDATES = 5.0, 5000.0, 0.1, 501, 481, 4
MILD_BETA = 5.0  # for rewards of order one


def latents(*names: str, **more: Callable[[tuple[int, ...], str], Tensor]) -> Callable[..., Inputs]:
    def make(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
        base = torch.randn(shape, device=device)
        inputs: Inputs = {name: (base + 0.3 * torch.randn(shape, device=device)).to(dtype) for name in names}
        return inputs | {name: build(shape, device) for name, build in more.items()}

    return make


def keys(shape: tuple[int, ...], device: str) -> Tensor:
    return fp.derive_keys(0, 0, torch.arange(shape[0], device=device), 0, "noise")


def pool_keys(shape: tuple[int, ...], device: str) -> Tensor:
    ids = torch.arange(shape[0] * CANDIDATES, device=device)
    return fp.derive_keys(0, 0, ids, 0, "sample").view(shape[0], CANDIDATES)


def timesteps(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.linspace(1, 998, shape[0], device=device).long()


def signal(shape: tuple[int, ...], device: str) -> Tensor:
    """sqrt(abar) of the rows' timesteps."""
    return ALPHAS.to(device)[timesteps(shape, device)].sqrt().float()


def sigma(shape: tuple[int, ...], device: str) -> Tensor:
    """sqrt(1 - abar) of the rows' timesteps."""
    return (1 - ALPHAS.to(device)[timesteps(shape, device)]).sqrt().float()


def minus_sigma(shape: tuple[int, ...], device: str) -> Tensor:
    return -sigma(shape, device)


def step(shape: tuple[int, ...], device: str) -> Tensor:
    """Coefficients of the DDIM step T -> T_PREV with eta = 1, of every row."""
    row = ddim(ALPHAS, torch.tensor([T]), torch.tensor([T_PREV]))
    return row.float().to(device).expand(shape[0], -1).contiguous()


def errors(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.rand(shape[0], device=device)


def rows(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def noise(i: Inputs, like: Tensor) -> Tensor:
    return fp.keyed_noise(i["keys"], like.shape[1:], torch.float32).to(like.dtype)


def noised(x0: Tensor, noise: Tensor, i: Inputs) -> Tensor:
    return rows(i["a"], x0) * x0 + rows(i["s"], x0) * noise


def velocity(x0: Tensor, noise: Tensor, i: Inputs) -> Tensor:
    return rows(i["p"], x0) * noise + rows(i["q"], x0) * x0


def error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def reward(i: Inputs, target: Tensor) -> tuple[Tensor, ...]:
    reference = i["ref_error"] if "ref_error" in i else error(i["ref_pred"], target)
    return (reference - error(i["pred"], target),)


def contrasts(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    rewards = {name: 1e-4 * torch.randn(shape[0], device=device) for name in ("reward_w", "reward_l")}
    return rewards | {name: torch.randn(shape, device=device).to(dtype) for name in ("emb_w", "emb_l")}
