"""Checks of arguments that several ops share; every error is a ValueError of one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, float32, float64

Weight = Literal["outside", "inside", "uniform"]
WEIGHTS: tuple[str, ...] = get_args(Weight)

F = TypeVar("F", bound=Callable[..., Any])


def renewed(call: str, positional: int, *gone: str) -> Callable[[F], F]:
    """Let calls of version 0.1, which have more positional arguments or names that are gone, raise one line that shows
    the new call."""

    def renew(function: F) -> F:
        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if len(args) > positional or (gone and any(name in kwargs for name in gone)):
                raise TypeError(f"{call.split('(')[0]}: since version 0.2 the call is {call}")
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return renew


def is_number(value: object) -> bool:
    """One number, which may be symbolic: no string, and no array."""
    return isinstance(value, (int, float, Real)) or (isinstance(value, Tensor) and value.dim() == 0)


def check_between(op: str, name: str, value: float, low: float, high: float, what: str) -> None:
    """low < value < high; `what` says so in words. As comparisons alone, so that torch.compile may make value vary."""
    if not (is_number(value) and low < value < high):
        raise ValueError(f"{op}: {name} must be {what}, got {value!r}")


def check_positive(op: str, name: str, value: float) -> None:
    check_between(op, name, value, 0.0, math.inf, "positive and finite")


def check_beta(op: str, beta: float | Tensor) -> None:
    """A positive number, or a scalar tensor, whose value is not looked at: on a GPU that would wait for the device."""
    if isinstance(beta, Tensor):
        if beta.dim() or not beta.dtype.is_floating_point:
            raise ValueError(
                f"{op}: a beta in a tensor must be a floating scalar, got {beta.dtype} {tuple(beta.shape)}"
            )
    else:
        check_positive(op, "beta", beta)


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {type(x).__name__}")


def check_floating(op: str, name: str, x: Tensor) -> None:
    check_tensor(op, name, x)
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
    if not (is_number(label_smoothing) and 0.0 <= label_smoothing < 0.5):
        raise ValueError(f"{op}: label_smoothing must be in [0, 0.5), got {label_smoothing!r}")


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
    check_choice(op, "weight", weight, WEIGHTS)
    m, n = reward_w.shape[0], reward_l.shape[0]
    if group_size is not None:
        if m != n:
            raise ValueError(f"{op}: group_size needs as many winners as losers, got {m} and {n}")
        if not isinstance(group_size, (int, Integral)) or group_size < 1 or m % group_size:
            raise ValueError(f"{op}: group_size must divide the number of pairs, got {group_size!r} for {m}")
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
    return row_distance(op, name, x.shape, x.stride())


def row_distance(op: str, name: str, shape: Sequence[int], strides: Sequence[int]) -> int:
    """`check_rows` of a tensor's shape and strides."""
    if strides[-1] != 1 and shape[-1] > 1:
        raise ValueError(f"{op}: {name} must be dense in its last dimension, got strides {strides}")
    rows = [(size, stride) for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size != 1]
    for (_, outer), (size, inner) in pairwise(rows):
        if outer != size * inner and 0 not in shape:
            raise ValueError(f"{op}: {name} must have equally spaced rows, got strides {strides}")
    return rows[-1][1] if rows else shape[-1]


def check_coefficients(op: str, call: str, n_rows: int, like_name: str, like: Tensor, **coefficients: Tensor) -> None:
    """A number a row each, in fp32 or fp64; `call` shows how the op is called."""
    for name, x in coefficients.items():
        check_tensor(op, name, x)
        if x.dtype not in (float32, float64) or x.shape != (n_rows,):
            found = f"{x.dtype} of shape {tuple(x.shape)}"
            raise ValueError(f"{op}: {name} must be fp32 or fp64 of shape ({n_rows},) in {call}, got {found}")
        check_device(op, name, x, like_name, like)
