from __future__ import annotations

from torch import Tensor


def error(pred: Tensor, target: Tensor) -> Tensor:
    return (pred.double() - target.double()).square().flatten(1).mean(1)


def implicit_reward(
    pred: Tensor, target: Tensor, ref_pred: Tensor | None = None, ref_error: Tensor | None = None
) -> Tensor:
    err_theta = error(pred, target)
    if ref_pred is not None:
        return error(ref_pred, target) - err_theta
    return -err_theta if ref_error is None else ref_error.double() - err_theta


def cross(pred: Tensor, target: Tensor) -> Tensor:
    delta_w, delta_l = (pred.double() - target.double()).flatten(1).chunk(2)
    return (delta_w * delta_l).mean(1)
