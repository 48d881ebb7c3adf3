"""Checks of arguments that several ops share; every error is a ValueError of one line."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

WEIGHTS = ("outside", "inside", "uniform")


def check_positive(op: str, name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}")


def check_floating(op: str, name: str, x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"{op}: {name} must be floating point, got {x.dtype}")


def check_like(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Same shape and device as `like`, and floating point."""
    check_floating(op, name, x)
    if x.shape != like.shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, {like_name} has {tuple(like.shape)}")
    check_device(op, name, x, like_name, like)


def check_batch(op: str, x: Tensor, name: str) -> None:
    """A floating batch (N, ...) that is not empty."""
    check_floating(op, name, x)
    if x.dim() < 2:
        raise ValueError(f"{op}: {name} must be (N, ...), got shape {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{op}: {name} is empty, shape {tuple(x.shape)}")


def check_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, {like_name} is on {like.device}")


def check_elements(op: str, elements: int) -> None:
    if not 0 < elements <= 1 << 34:
        raise ValueError(f"{op}: a row must have between 1 and 2^34 elements, got {elements}")


def check_rewards(op: str, reward_w: Tensor, reward_l: Tensor) -> None:
    for name, x in (("reward_w", reward_w), ("reward_l", reward_l)):
        check_floating(op, name, x)
        if x.dim() != 1:
            raise ValueError(f"{op}: {name} must be a vector, got shape {tuple(x.shape)}")
        if x.numel() == 0:
            raise ValueError(f"{op}: {name} is empty")
    check_device(op, "reward_l", reward_l, "reward_w", reward_w)


def check_label_smoothing(op: str, label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"{op}: label_smoothing must be in [0, 0.5), got {label_smoothing}")


def check_contrasts(
    op: str,
    reward_w: Tensor,
    reward_l: Tensor,
    emb_w: Tensor | None,
    emb_l: Tensor | None,
    weight: str,
    group_size: int | None,
) -> None:
    """Rewards, embeddings and groups of a contrast matrix fit together."""
    check_rewards(op, reward_w, reward_l)
    if weight not in WEIGHTS:
        raise ValueError(f"{op}: weight must be one of {', '.join(WEIGHTS)}, got {weight!r}")
    m, n = reward_w.shape[0], reward_l.shape[0]
    if group_size is not None:
        if m != n:
            raise ValueError(f"{op}: group_size needs as many winners as losers, got {m} and {n}")
        if group_size < 1 or m % group_size:
            raise ValueError(f"{op}: group_size must divide the number of pairs, got {group_size} for {m}")
    if weight == "uniform":
        return
    if emb_w is None or emb_l is None:
        raise ValueError(f"{op}: weight={weight!r} needs emb_w and emb_l")
    for name, x, count in (("emb_w", emb_w, m), ("emb_l", emb_l, n)):
        check_floating(op, name, x)
        check_device(op, name, x, "reward_w", reward_w)
        if x.dim() != 2 or x.shape[0] != count or x.shape[1] == 0:
            raise ValueError(f"{op}: {name} must have shape ({count}, D), got {tuple(x.shape)}")
    if emb_w.shape[1] != emb_l.shape[1]:
        raise ValueError(f"{op}: emb_w has {emb_w.shape[1]} dimensions, emb_l has {emb_l.shape[1]}")


def check_rows(op: str, name: str, x: Tensor) -> int:
    """Elements from row to row of x (..., K); refuses rows that are not dense and equally far apart."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{op}: {name} must be dense in its last dimension, got strides {x.stride()}")
    rows = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    for (_, outer), (size, inner) in pairwise(rows):
        if outer != size * inner and x.numel():
            raise ValueError(f"{op}: {name} must have equally spaced rows, got strides {x.stride()}")
    return rows[-1][1] if rows else x.shape[-1]


def check_timesteps(op: str, timesteps: Tensor, alphas_cumprod: Tensor) -> None:
    """Timesteps in [0, T). On a GPU the look would wait for the device: kernels give NaN there instead."""
    if not timesteps.is_cuda:
        low, high = timesteps.min().item(), timesteps.max().item()
        if low < 0 or high >= alphas_cumprod.shape[0]:
            raise ValueError(f"{op}: timesteps must be in [0, {alphas_cumprod.shape[0]}), got {low} to {high}")
