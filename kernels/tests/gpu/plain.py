"""Inputs of the workloads, and what their ops compute, in eager torch in the inputs' dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastpref_kernels as fp

Inputs = dict[str, Any]
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


def alphas(shape: tuple[int, ...], device: str) -> Tensor:
    return ALPHAS.float().to(device)


def errors(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.rand(shape[0], device=device)


def rows(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def noise(i: Inputs, like: Tensor) -> Tensor:
    return fp.keyed_noise(i["keys"], like.shape[1:], torch.float32).to(like.dtype)


def noised(x0: Tensor, noise: Tensor, i: Inputs) -> Tensor:
    abar = i["alphas"].double()[i["timesteps"]]
    return rows(abar.sqrt(), x0) * x0 + rows((1 - abar).sqrt(), x0) * noise


def velocity(x0: Tensor, noise: Tensor, i: Inputs) -> Tensor:
    abar = i["alphas"].double()[i["timesteps"]]
    return rows(abar.sqrt(), x0) * noise - rows((1 - abar).sqrt(), x0) * x0


def error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def reward(i: Inputs, target: Tensor) -> tuple[Tensor, ...]:
    reference = i["ref_error"] if "ref_error" in i else error(i["ref_pred"], target)
    return (reference - error(i["pred"], target),)


def pairwise(weight: str, i: Inputs) -> tuple[Tensor, ...]:
    u = BETA / 2 * (i["reward_w"][:, None] - i["reward_l"][None])
    similarity = F.normalize(i["emb_w"], dim=1, eps=1e-12) @ F.normalize(i["emb_l"], dim=1, eps=1e-12).T
    omega = torch.softmax(similarity / TEMPERATURE, 1)
    return (-(omega * F.logsigmoid(u)).sum(1).mean() if weight == "outside" else -F.logsigmoid(omega * u).mean(),)


def contrasts(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    rewards = {name: 1e-4 * torch.randn(shape[0], device=device) for name in ("reward_w", "reward_l")}
    return rewards | {name: torch.randn(shape, device=device).to(dtype) for name in ("emb_w", "emb_l")}


def paired(i: Inputs) -> tuple[Tensor, ...]:
    reward_w, reward_l = reward(i, noise(i, i["pred"]))[0].chunk(2)
    return (-F.logsigmoid(MILD_BETA / 2 * (reward_w - reward_l)).mean(),)


def guided_step(i: Inputs) -> tuple[Tensor, float, float, float]:
    """Guided prediction, and abar_t, abar_prev, sigma of the step T -> T_PREV with eta = 1."""
    abar, prev = ALPHAS[T].item(), ALPHAS[T_PREV].item()
    sigma = ((1 - prev) / (1 - abar) * (1 - abar / prev)) ** 0.5
    return i["eps_uncond"] + GUIDANCE * (i["eps_cond"] - i["eps_uncond"]), abar, prev, sigma


def pool(i: Inputs) -> tuple[Tensor, ...]:
    pred, abar, prev, sigma = guided_step(i)
    x0 = (i["x_t"] - (1 - abar) ** 0.5 * pred) / abar**0.5
    mean = prev**0.5 * x0 + (1 - prev - sigma**2) ** 0.5 * pred
    noise = fp.keyed_noise(i["keys"].flatten(), x0.shape[1:], torch.float32).to(x0.dtype)
    return mean.unsqueeze(1) + sigma * noise.view(x0.shape[0], CANDIDATES, *x0.shape[1:]), x0


def transition(i: Inputs) -> tuple[Tensor, ...]:
    logs = []
    for x in ("x_w", "x_l"):
        terms = []
        for prefix in ("", "ref_"):
            pred, abar, prev, sigma = guided_step({k: i[prefix + k] for k in ("eps_cond", "eps_uncond")})
            x0 = (i["x_t"] - (1 - abar) ** 0.5 * pred) / abar**0.5
            mean = prev**0.5 * x0 + (1 - prev - sigma**2) ** 0.5 * pred
            terms.append(((i[x] - mean) ** 2).flatten(1).mean(1) / (2 * sigma**2))
        logs.append(terms[1] - terms[0])
    return (-F.logsigmoid(BETA / 500 * (logs[0] - logs[1])).mean(),)


def activation(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    channels = shape[1]
    affine = {name: torch.rand(channels, device=device).to(dtype) for name in ("weight", "bias")}
    return {"x": torch.randn(shape, device=device).to(dtype), **affine}


def lora(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    rows, inner, columns, rank = shape
    sizes = {"x": (rows, inner), "weight": (columns, inner), "lora_a": (rank, inner), "lora_b": (columns, rank)}
    return {name: (torch.randn(size, device=device) / inner**0.5).to(dtype) for name, size in sizes.items()}
