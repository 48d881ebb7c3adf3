"""The similarity-weighted contrastive loss of Diffusion-RPO, streamed over the contrast matrix.

    u_ij     = beta/2 * (reward_w_i - reward_l_j)
    omega_ij = softmax over j of cos(emb_w_i, emb_l_j) / temperature
    outside:  loss = -mean_i sum_j omega_ij * log sigmoid(u_ij)
    inside:   loss = -mean_ij log sigmoid(omega_ij * u_ij)
    uniform:  as outside, with omega_ij = 1 / number of losers of the row

Row i is contrasted with the losers of its own contrast group: consecutive blocks of `group_size` rows, or everything.
Shapes: reward_w (M,), reward_l (N,), emb_w (M, D), emb_l (N, D) -> scalar; in fp32 (fp64 if a reward is fp64).
Memory: O(M + N); no contrast matrix is stored. A row kernel takes the softmax online, then the loss and
dL/dreward_w; a column kernel recomputes the weights from the rows' maxima and sums and gives dL/dreward_l, so nothing
needs a float atomic.
Bytes: 2 * BLOCK * D embedding elements per tile of BLOCK x BLOCK contrasts, three times; the backward multiplies the
stored gradients, 12 bytes per row.
Source: Diffusion-RPO, arXiv 2406.06382; "inside" is the form of RPO for language models, arXiv 2402.10958."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_contrasts, check_positive
from ._dispatch import accumulation_dtype, jit, tl, triton, use_triton
from .cpu.rpo_loss import rpo_loss as torch_path
from .dpo_loss import PairwiseLoss, log_sigmoid_and_slope

_BLOCK, _BLOCK_D = 32, 32


@jit
def _inverse_norm_kernel(emb_ptr, out_ptr, dim, BLOCK_D: tl.constexpr):
    """1 / max(norm, 1e-12) of each row: a zero row has cosine 0 with everything."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(emb_ptr + row * dim + d, mask=d < dim, other=0.0).to(tl.float32)
        total += x * x
    tl.store(out_ptr + row, 1.0 / tl.maximum(tl.sqrt(tl.sum(total, axis=0)), 1e-12))


@jit
def _scaled_cosine_tile(
    emb_w_ptr,
    emb_l_ptr,
    norm_w_ptr,
    norm_l_ptr,
    i,
    j,
    mask_i,
    mask_j,
    dim,
    temperature,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """cos(emb_w_i, emb_l_j) / temperature of a tile; -inf in the columns beyond the group."""
    cosine = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask_d = d < dim
        w_ptr = emb_w_ptr + i[:, None] * dim + d[None, :]
        l_ptr = emb_l_ptr + j[None, :] * dim + d[:, None]
        w = tl.load(w_ptr, mask=mask_i[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        l = tl.load(l_ptr, mask=mask_d[:, None] & mask_j[None, :], other=0.0).to(tl.float32)  # noqa: E741
        cosine = tl.dot(w, l, cosine, input_precision="ieee")
    norm_w = tl.load(norm_w_ptr + i, mask=mask_i, other=0.0)
    norm_l = tl.load(norm_l_ptr + j, mask=mask_j, other=0.0) / temperature
    return tl.where(mask_j[None, :], cosine * norm_w[:, None] * norm_l[None, :], float("-inf"))


@jit
def _rpo_row_kernel(
    reward_w_ptr,
    reward_l_ptr,
    emb_w_ptr,
    emb_l_ptr,
    norm_w_ptr,
    norm_l_ptr,
    max_ptr,
    sum_ptr,
    loss_ptr,
    effective_ptr,
    grad_w_ptr,
    rows,
    columns,
    dim,
    beta,
    temperature,
    UNIFORM: tl.constexpr,
    INSIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of winners of one group: softmax maximum and sum, exp(entropy), row sums of the loss, dL/dreward_w."""
    group = tl.program_id(0).to(tl.int64)
    local_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_i = local_i < rows
    i = group * rows + local_i
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)  # sum of exp(z - maximum) * (z - maximum)
    if not UNIFORM:
        for start in range(0, columns, BLOCK):
            local_j = start + tl.arange(0, BLOCK)
            mask_j = local_j < columns
            j = group * columns + local_j
            z = _scaled_cosine_tile(
                emb_w_ptr, emb_l_ptr, norm_w_ptr, norm_l_ptr, i, j, mask_i, mask_j, dim, temperature, BLOCK, BLOCK_D
            )
            higher = tl.maximum(maximum, tl.max(z, axis=1))
            shift = tl.where(total > 0.0, maximum - higher, 0.0)
            z = tl.where(mask_j[None, :], z - higher[:, None], 0.0)
            e = tl.where(mask_j[None, :], tl.exp(z), 0.0)
            moment = tl.exp(shift) * (moment + shift * total) + tl.sum(e * z, axis=1)
            total = tl.exp(shift) * total + tl.sum(e, axis=1)
            maximum = higher
        tl.store(max_ptr + i, maximum, mask=mask_i)
        tl.store(sum_ptr + i, total, mask=mask_i)
        tl.store(effective_ptr + i, tl.exp(tl.log(total) - moment / total), mask=mask_i)
    reward_w = tl.load(reward_w_ptr + i, mask=mask_i, other=0.0)
    loss = tl.zeros((BLOCK,), tl.float32)
    grad_w = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        local_j = start + tl.arange(0, BLOCK)
        mask_j = local_j < columns
        j = group * columns + local_j
        reward_l = tl.load(reward_l_ptr + j, mask=mask_j, other=0.0)
        u = (reward_w[:, None] - reward_l[None, :]) * (0.5 * beta)
        if UNIFORM:
            omega = tl.where(mask_j[None, :], 1.0 / columns, 0.0) + tl.zeros_like(u)
        else:
            z = _scaled_cosine_tile(
                emb_w_ptr, emb_l_ptr, norm_w_ptr, norm_l_ptr, i, j, mask_i, mask_j, dim, temperature, BLOCK, BLOCK_D
            )
            omega = tl.exp(z - maximum[:, None]) / total[:, None]
        if INSIDE:
            term, slope = log_sigmoid_and_slope(omega * u)
            term = tl.where(mask_j[None, :], term, 0.0)
        else:
            term, slope = log_sigmoid_and_slope(u)
            term = omega * term
        loss -= tl.sum(term, axis=1)
        grad_w -= tl.sum(omega * slope, axis=1)
    tl.store(loss_ptr + i, loss, mask=mask_i)
    tl.store(grad_w_ptr + i, grad_w * (0.5 * beta), mask=mask_i)


@jit
def _rpo_column_kernel(
    reward_w_ptr,
    reward_l_ptr,
    emb_w_ptr,
    emb_l_ptr,
    norm_w_ptr,
    norm_l_ptr,
    max_ptr,
    sum_ptr,
    grad_l_ptr,
    rows,
    columns,
    dim,
    beta,
    temperature,
    UNIFORM: tl.constexpr,
    INSIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of losers of one group: dL/dreward_l, summed over the group's winners."""
    group = tl.program_id(0).to(tl.int64)
    local_j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_j = local_j < columns
    j = group * columns + local_j
    reward_l = tl.load(reward_l_ptr + j, mask=mask_j, other=0.0)
    grad_l = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        local_i = start + tl.arange(0, BLOCK)
        mask_i = local_i < rows
        i = group * rows + local_i
        reward_w = tl.load(reward_w_ptr + i, mask=mask_i, other=0.0)
        u = (reward_w[:, None] - reward_l[None, :]) * (0.5 * beta)
        if UNIFORM:
            omega = tl.where(mask_i[:, None], 1.0 / columns, 0.0) + tl.zeros_like(u)
        else:
            z = _scaled_cosine_tile(
                emb_w_ptr, emb_l_ptr, norm_w_ptr, norm_l_ptr, i, j, mask_i, mask_j, dim, temperature, BLOCK, BLOCK_D
            )
            maximum = tl.load(max_ptr + i, mask=mask_i, other=float("inf"))
            total = tl.load(sum_ptr + i, mask=mask_i, other=1.0)
            omega = tl.exp(z - maximum[:, None]) / total[:, None]
        if INSIDE:
            u = omega * u
        _, slope = log_sigmoid_and_slope(u)
        grad_l += tl.sum(omega * slope, axis=0)
    tl.store(grad_l_ptr + j, grad_l * (0.5 * beta), mask=mask_j)


def _launch(
    reward_w: Tensor,
    reward_l: Tensor,
    emb_w: Tensor | None,
    emb_l: Tensor | None,
    beta: float,
    temperature: float,
    weight: str,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row losses (M,), exp(entropy) (M,), and the derivatives of the sum of the row losses: (M,) and (N,)."""
    reward_w, reward_l = reward_w.contiguous(), reward_l.contiguous()
    rows, columns = reward_w.shape[0] // groups, reward_l.shape[0] // groups
    uniform = weight == "uniform"
    loss, grad_w, maximum, total = (torch.empty_like(reward_w) for _ in range(4))
    effective = torch.full_like(reward_w, columns)
    grad_l = torch.empty_like(reward_l)
    if uniform or emb_w is None or emb_l is None:
        embeddings = (reward_w, reward_l, reward_w, reward_l)  # never read
        dim = 0
    else:
        emb_w, emb_l, dim = emb_w.contiguous(), emb_l.contiguous(), emb_w.shape[1]
        embeddings = (emb_w, emb_l, torch.empty_like(reward_w), torch.empty_like(reward_l))
        for emb, norm in (embeddings[0::2], embeddings[1::2]):
            _inverse_norm_kernel[(emb.shape[0],)](emb, norm, dim, BLOCK_D=min(1024, triton.next_power_of_2(dim)))
    sizes = (rows, columns, dim, beta, temperature)
    options = {"UNIFORM": uniform, "INSIDE": weight == "inside", "BLOCK": _BLOCK, "BLOCK_D": _BLOCK_D}
    _rpo_row_kernel[(groups, -(-rows // _BLOCK))](
        reward_w, reward_l, *embeddings, maximum, total, loss, effective, grad_w, *sizes, **options
    )
    _rpo_column_kernel[(groups, -(-columns // _BLOCK))](
        reward_w, reward_l, *embeddings, maximum, total, grad_l, *sizes, **options
    )
    return loss, effective, grad_w, grad_l


def _accuracy(reward_w: Tensor, reward_l: Tensor) -> Tensor:
    """Share of pairs with reward_w > reward_l; of all contrasts if M != N, counted by sorting."""
    if reward_w.shape == reward_l.shape:
        return (reward_w > reward_l).to(reward_w.dtype).mean()
    below = torch.searchsorted(reward_l.sort().values, reward_w.contiguous())
    return torch.where(reward_w.isnan(), 0, below).to(reward_w.dtype).mean() / reward_l.shape[0]


@torch.library.custom_op(
    "fastpref_kernels::rpo_loss",
    mutates_args=(),
    schema=(
        "(Tensor reward_w, Tensor reward_l, Tensor? emb_w, Tensor? emb_l, float beta, float temperature, str weight,"
        " int groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _rpo_loss(
    reward_w: Tensor,
    reward_l: Tensor,
    emb_w: Tensor | None,
    emb_l: Tensor | None,
    beta: float,
    temperature: float,
    weight: str,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, effective contrasts, accuracy, dL/dreward_w (M,), dL/dreward_l (N,))."""
    path = _launch if use_triton(reward_w) else torch_path
    loss, effective, grad_w, grad_l = path(reward_w, reward_l, emb_w, emb_l, beta, temperature, weight, groups)
    inside = reward_l.shape[0] // groups if weight == "inside" else 1
    count = reward_w.shape[0] * inside
    return loss.mean() / inside, effective.mean(), _accuracy(reward_w, reward_l), grad_w / count, grad_l / count


@_rpo_loss.register_fake
def _(reward_w, reward_l, emb_w, emb_l, beta, temperature, weight, groups):
    scalars = [reward_w.new_empty(()) for _ in range(3)]
    return *scalars, reward_w.new_empty(reward_w.shape), reward_l.new_empty(reward_l.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3], output[4])


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_w, grad_l = ctx.saved_tensors
    return grad_loss * grad_w, grad_loss * grad_l, None, None, None, None, None, None


_rpo_loss.register_autograd(_backward, setup_context=_setup_context)


def rpo_loss(
    reward_w: Tensor,
    reward_l: Tensor,
    emb_w: Tensor | None,
    emb_l: Tensor | None,
    *,
    beta: float,
    temperature: float,
    weight: str = "outside",
    group_size: int | None = None,
) -> PairwiseLoss:
    """Every winner against every loser of its contrast group, weighted by the similarity of their embeddings.

    reward_w (M,), reward_l (N,): implicit rewards; half precision is upcast.
    emb_w (M, D), emb_l (N, D): any floating dtype and any length, normalised here; a zero row has cosine 0 with
        everything. They are data and get no gradient; weight="uniform" does not read them, they may be None.
    beta: > 0, as in `dpo_loss`.
    temperature: > 0, divides the cosine.
    weight: "outside", "inside" or "uniform", see the module. The gradients of "inside" are smaller than those of
        "outside" by about the group size: equal beta is not equal strength.
    group_size: pairs in a contrast group, consecutive rows; it divides M = N. 1 is DPO. None: one group of
        everything, M != N allowed.

    Returns `PairwiseLoss(loss, effective_contrasts, accuracy)`, fp32 (fp64 if a reward is fp64). The loss is a mean
    over all rows (outside, uniform) or over all contrasts of the groups (inside); the accuracy is over the M = N
    pairs, or over all contrasts if M != N. NaN in a reward gives a NaN loss.
    Raises ValueError for empty inputs, shapes, dtypes or devices that do not fit, and settings out of bounds.
    Source: Diffusion-RPO, arXiv 2406.06382.
    """
    check_contrasts("rpo_loss", reward_w, reward_l, emb_w, emb_l, weight, group_size)
    check_positive("rpo_loss", "beta", beta)
    check_positive("rpo_loss", "temperature", temperature)
    dtype = accumulation_dtype(torch.promote_types(reward_w.dtype, reward_l.dtype))
    groups = 1 if group_size is None else reward_w.shape[0] // group_size
    embeddings = (None, None) if emb_w is None or emb_l is None else (emb_w.detach(), emb_l.detach())
    loss, effective, accuracy, _, _ = _rpo_loss(
        reward_w.to(dtype), reward_l.to(dtype), *embeddings, float(beta), float(temperature), weight, groups
    )
    return PairwiseLoss(loss, effective.detach(), accuracy.detach())
