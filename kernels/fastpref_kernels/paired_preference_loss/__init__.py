"""From a stacked [winners; losers] prediction to a preference loss and its gradient, fused.

    reward_i = err_ref_i - err_theta_i            `implicit_reward`
    loss     = dpo_loss or rpo_loss of (reward_1 .. reward_N, reward_N+1 .. reward_2N)
    dL/dpred_i = dL/dreward_i * -2/(C*H*W) * (pred_i - target_i)

Launches: DPO 1 forward (the last program of a row adds up its chunks, the last of all takes the loss) and 1 backward.
RPO 3 forward (chunk sums and the embeddings' parts; contrasts, with the rewards they need; their sums) and 1 backward,
so 4; one more for the softmax where a contrast group has more than 128 pairs.
Memory: besides its inputs autograd keeps dL/dreward, 2N numbers; forward scratch is 2N * chunks of a row.
Bytes per element as in `implicit_reward`, which shares the kernels; results are reproducible, without float atomics.
Source: Diffusion-DPO, arXiv 2311.12908, equation 14; Diffusion-RPO, arXiv 2406.06382.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from ..common.checks import (
    Weight,
    check_beta,
    check_choice,
    check_contrasts,
    check_label_smoothing,
    check_positive,
    renewed,
)
from ..common.dispatch import accumulation_dtype, use_triton
from ..common.operator import operator
from ..common.pairwise import without_gradient
from ..dpo_loss import dpo_loss
from ..implicit_reward import check_reference, implicit_reward_backward, implicit_reward_parts
from ..implicit_reward.targets import Source, Target, source_of, with_device_noise
from ..rpo_loss import rpo_loss
from . import torch as torch_path
from .triton import launch

Kind = Literal["dpo", "rpo"]


class PairedPreferenceLoss(NamedTuple):
    """What `paired_preference_loss` returns; only `loss` back-propagates, to pred.

    loss, effective_contrasts, accuracy: scalars as in `PairwiseLoss`; reward: (2N,) implicit rewards.
    """

    loss: Tensor
    effective_contrasts: Tensor
    accuracy: Tensor
    reward: Tensor


@operator(
    "paired_preference_loss",
    "(Tensor pred, Tensor? target, Tensor? keys, Tensor? p, Tensor? q, Tensor? ref_pred,"
    " Tensor? ref_error, Tensor? emb_w, Tensor? emb_l, float beta, float label_smoothing, float temperature,"
    " str weight, int groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _paired_preference_loss(
    pred: Tensor,
    target: Tensor | None,
    keys: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    ref_pred: Tensor | None,
    ref_error: Tensor | None,
    emb_w: Tensor | None,
    emb_l: Tensor | None,
    beta: float,
    label_smoothing: float,
    temperature: float,
    weight: str,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `launch`; weight is "dpo" or one of `rpo_loss`."""
    source = Source(target, keys, p, q)
    settings = torch_path.Settings(beta, label_smoothing, temperature, weight, groups)
    if use_triton(pred):
        return launch(pred, source, ref_pred, ref_error, emb_w, emb_l, settings)
    source = with_device_noise(source, pred)
    return torch_path.forward(pred, source, ref_pred, ref_error, emb_w, emb_l, settings)


@_paired_preference_loss.register_fake
def _(pred, target, keys, p, q, ref_pred, ref_error, emb_w, emb_l, *settings):
    rows = pred.shape[0]
    return tuple(pred.new_empty(size, dtype=accumulation_dtype(pred.dtype)) for size in ((), (), (), rows, rows))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros, a launch each, for the outputs that nobody differentiates
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[4], *inputs[:5])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 14
    slope, *inputs = ctx.saved_tensors
    return implicit_reward_backward(slope, grad_loss, *inputs), *[None] * 13


_paired_preference_loss.register_autograd(_backward, setup_context=_setup_context)


def _check_kind(
    kind: str, rewards: Tensor, emb_w: Tensor | None, emb_l: Tensor | None, temperature: float | None, weight: str,
    group_size: int | None, label_smoothing: float,
) -> None:  # fmt: skip
    op = "paired_preference_loss"
    check_choice(op, "kind", kind, get_args(Kind))
    if kind == "dpo":
        check_label_smoothing(op, label_smoothing)
        given = {"emb_w": emb_w, "emb_l": emb_l, "temperature": temperature, "group_size": group_size}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{op}: {name} needs kind='rpo'")
    else:
        check_contrasts(op, rewards, rewards, emb_w, emb_l, weight, group_size)
        if label_smoothing:
            raise ValueError(f"{op}: label_smoothing needs kind='dpo'")
        if temperature is None and weight != "uniform":
            raise ValueError(f"{op}: kind='rpo' needs a temperature")
        check_positive(op, "temperature", 1.0 if temperature is None else temperature)


@renewed("paired_preference_loss(pred, target, *, beta, ref_pred=None, ref_error=None, kind='dpo', ...)", 2)
def paired_preference_loss(
    pred: Tensor,
    target: Target,
    *,
    beta: float | Tensor,
    ref_pred: Tensor | None = None,
    ref_error: Tensor | None = None,
    kind: Kind = "dpo",
    label_smoothing: float = 0.0,
    emb_w: Tensor | None = None,
    emb_l: Tensor | None = None,
    temperature: float | None = None,
    weight: Weight = "outside",
    group_size: int | None = None,
) -> PairedPreferenceLoss:
    """DPO or RPO of a stacked prediction [N winners; N losers], in at most five kernel launches with the backward,
    four but for RPO in contrast groups of more than 128 pairs.

    pred, target, ref_pred, ref_error: as in `implicit_reward`, 2N rows; row i and row N + i are a pair.
    beta: > 0, for rewards that are means over C*H*W; as a scalar tensor (`dpo_loss`) it costs three launches more.
    kind: "dpo" (label_smoothing in [0, 0.5)) or "rpo".
    emb_w, emb_l (N, D), temperature, weight, group_size: of "rpo" only, as in `rpo_loss`; weight="uniform" needs
        neither embeddings nor a temperature.

    Returns `PairedPreferenceLoss(loss, effective_contrasts, accuracy, reward)`, fp32 (fp64 if pred is), of which the
    loss back-propagates to pred only, in pred's dtype and memory order. NaN in a row gives a NaN loss.
    Raises ValueError for an empty batch, an odd number of rows, shapes, dtypes or devices that do not fit, and settings
    that are out of bounds or belong to the other kind.
    Source: Diffusion-DPO, arXiv 2311.12908, equation 14; Diffusion-RPO, arXiv 2406.06382.
    """
    op = "paired_preference_loss"
    check_reference(op, pred, ref_pred, ref_error)
    if pred.shape[0] % 2:
        raise ValueError(f"{op}: pred must be [winners; losers], an even number of rows, got {pred.shape[0]}")
    source = source_of(op, pred, target)
    check_beta(op, beta)
    n_pairs = pred.shape[0] // 2
    rewards = pred[(slice(n_pairs), *[0] * (pred.dim() - 1))]  # one number a pair: only its shape and device are read
    _check_kind(kind, rewards, emb_w, emb_l, temperature, weight, group_size, label_smoothing)
    if weight == "uniform" and kind == "rpo":
        emb_w = emb_l = None
    if isinstance(beta, Tensor):
        reward = implicit_reward_parts(pred, target, ref_pred=ref_pred, ref_error=ref_error).reward
        pairs = reward[:n_pairs], reward[n_pairs:]
        if kind == "dpo":
            found = dpo_loss(*pairs, beta=beta, label_smoothing=label_smoothing)
        else:
            found = rpo_loss(
                *pairs,
                emb_w,
                emb_l,
                beta=beta,
                temperature=1.0 if temperature is None else temperature,
                weight=weight,
                group_size=group_size,
            )
        return PairedPreferenceLoss(*found, reward.detach())
    detached = [None if x is None else without_gradient(x) for x in (ref_pred, ref_error, emb_w, emb_l)]
    loss, effective, accuracy, reward, _ = _paired_preference_loss(
        pred,
        *source,
        *detached,
        float(beta),
        float(label_smoothing),
        1.0 if temperature is None else float(temperature),
        "dpo" if kind == "dpo" else weight,
        1 if group_size is None else n_pairs // group_size,
    )
    return PairedPreferenceLoss(loss, *map(without_gradient, (effective, accuracy, reward)))
