"""Kernels and launchers of `rpo_loss`, which `paired_preference_loss` shares.

A row program owns BLOCK winners and walks the losers of their group; a column program owns BLOCK losers and walks the
winners with the softmax that the row programs found.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.dispatch import jit, tl
from ..common.pairwise import Rewards, chunk_block, log_sigmoid_and_slope, rewards_of, won


@jit
def inverse_norm(emb_ptr, row, stride, stride_d, dim, BLOCK_D: tl.constexpr):
    """1 / max(norm, 1e-12) of a row: a zero row has cosine 0 with everything."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        x = tl.load(emb_ptr + row * stride + d * stride_d, mask=d < dim, other=0.0).to(tl.float32)
        total += x * x
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(total, axis=0)), 1e-12)


@jit
def _inverse_norm_kernel(emb_w_ptr, emb_l_ptr, norm_ptr, n_winners, w_row, w_d, l_row, l_d, dim, BLOCK_D: tl.constexpr):
    """Norms of the winners' embeddings, then of the losers'; a program each."""
    row = tl.program_id(0).to(tl.int64)
    if row < n_winners:
        norm = inverse_norm(emb_w_ptr, row, w_row, w_d, dim, BLOCK_D)
    else:
        norm = inverse_norm(emb_l_ptr, row - n_winners, l_row, l_d, dim, BLOCK_D)
    tl.store(norm_ptr + row, norm)


@jit
def _clamped(group, local, count):
    """Rows of a group, below 2^31; the lanes past its end repeat the last row."""
    return group * count + tl.minimum(local, count - 1)


@jit
def _similarity(emb, i, j, mask_j, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """cos(emb_w_i, emb_l_j) / temperature of a tile; -inf in the columns beyond the group.

    emb: (emb_w_ptr, emb_l_ptr, norm_w_ptr, norm_l_ptr, w_row, w_d, l_row, l_d, dim, temperature). i and j are valid
    rows throughout (`_clamped`): a mask for each would cost a pair of scalar registers an element on AMD.
    """
    cosine = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, emb[8], BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = d < emb[8]
        w_ptr = emb[0] + i.to(tl.int64)[:, None] * emb[4] + d[None, :] * emb[5]
        l_ptr = emb[1] + j.to(tl.int64)[None, :] * emb[6] + d[:, None] * emb[7]
        w = tl.load(w_ptr, mask=mask_d[None, :], other=0.0).to(tl.float32)
        l = tl.load(l_ptr, mask=mask_d[:, None], other=0.0).to(tl.float32)  # noqa: E741
        cosine = tl.dot(w, l, cosine, input_precision="ieee")
    norm_w = tl.load(emb[2] + i)
    norm_l = tl.load(emb[3] + j) / emb[9]
    return tl.where(mask_j[None, :], cosine * norm_w[:, None] * norm_l[None, :], float("-inf"))


@jit
def _softmax_step(z, maximum, total, moment):
    """One tile of an online softmax: (exp(z - new maximum), new maximum, total, moment, factor of older sums).

    moment = sum of exp(z - maximum) * (z - maximum), from which the entropy follows.
    """
    higher = tl.maximum(maximum, tl.max(z, axis=1))
    shift = tl.where(total > 0.0, maximum - higher, 0.0)
    factor = tl.exp(shift)
    valid = z != float("-inf")  # NaN is valid, and stays
    z = tl.where(valid, z - higher[:, None], 0.0)
    e = tl.where(valid, tl.exp(z), 0.0)
    moment = factor * (moment + shift * total) + tl.sum(e * z, axis=1)
    return e, higher, factor * total + tl.sum(e, axis=1), moment, factor


@jit
def _rpo_row_kernel(
    reward_w_ptr,
    reward_l_ptr,
    emb_w_ptr,
    emb_l_ptr,
    norm_ptr,
    reward_ptr,
    state_ptr,
    grad_w_ptr,
    n_winners,
    rows,
    columns,
    dim,
    n_chunks,
    w_stride,
    l_stride,
    emb_w_row,
    emb_w_d,
    emb_l_row,
    emb_l_d,
    reward_scale,
    beta,
    grad_scale,
    temperature,
    UNIFORM: tl.constexpr,
    INSIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of winners of one group: their rewards, dL/dreward_w, and the planes of state (5, M): softmax maximum
    and sum, row sum of the loss, exp(entropy), wins. PAIRS: a win is over the loser of the same row, else a share of
    all; a tie is half a win. INSIDE needs the softmax before the loss and walks the losers twice."""
    group = tl.program_id(0)
    local_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_i = local_i < rows
    i = _clamped(group, local_i, rows)
    reward_l = (reward_l_ptr, l_stride, n_chunks, reward_scale)
    reward_w = (reward_w_ptr, w_stride, n_chunks, reward_scale)
    norm_l_ptr = norm_ptr + n_winners
    emb = (emb_w_ptr, emb_l_ptr, norm_ptr, norm_l_ptr, emb_w_row, emb_w_d, emb_l_row, emb_l_d, dim, temperature)
    w = rewards_of(reward_w, i, BLOCK, BLOCK_CHUNKS)
    tl.store(reward_ptr + i, w, mask=mask_i)
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    loss = tl.zeros((BLOCK,), tl.float32)
    grad = tl.zeros((BLOCK,), tl.float32)
    wins = tl.zeros((BLOCK,), tl.float32)
    if PAIRS:
        own = rewards_of(reward_l, i, BLOCK, BLOCK_CHUNKS)
        tl.store(state_ptr + 4 * tl.cast(n_winners, tl.int64) + i, won(w, own), mask=mask_i)
    if INSIDE:
        for start in range(0, columns, BLOCK):
            local_j = start + tl.arange(0, BLOCK)
            z = _similarity(emb, i, _clamped(group, local_j, columns), local_j < columns, BLOCK, BLOCK_D)
            _, maximum, total, moment, _ = _softmax_step(z, maximum, total, moment)
    for start in range(0, columns, BLOCK):
        local_j = start + tl.arange(0, BLOCK)
        mask_j = local_j < columns
        j = _clamped(group, local_j, columns)
        l = rewards_of(reward_l, j, BLOCK, BLOCK_CHUNKS)  # noqa: E741
        difference = w[:, None] - l[None, :]
        if not PAIRS:
            wins += tl.sum(tl.where(mask_j[None, :], won(w[:, None], l[None, :]) / columns, 0.0), axis=1)
        u = difference * (0.5 * beta)
        if INSIDE:
            z = _similarity(emb, i, j, mask_j, BLOCK, BLOCK_D)
            omega = tl.exp(z - maximum[:, None]) / total[:, None]
            term, slope = log_sigmoid_and_slope(omega * u)
            loss -= tl.sum(tl.where(mask_j[None, :], term, 0.0), axis=1)
            grad -= tl.sum(omega * slope, axis=1)
        else:
            term, slope = log_sigmoid_and_slope(u)
            if UNIFORM:
                e = tl.where(mask_j[None, :], 1.0 / columns, 0.0) + tl.zeros_like(u)
            else:
                z = _similarity(emb, i, j, mask_j, BLOCK, BLOCK_D)
                e, maximum, total, moment, factor = _softmax_step(z, maximum, total, moment)
                loss = factor * loss
                grad = factor * grad
            loss -= tl.sum(e * term, axis=1)
            grad -= tl.sum(e * slope, axis=1)
    if UNIFORM:
        effective = tl.zeros((BLOCK,), tl.float32) + columns
    else:
        effective = tl.exp(tl.log(total) - moment / total)
        if not INSIDE:
            loss = loss / total
            grad = grad / total
    state = state_ptr + i
    plane = tl.cast(n_winners, tl.int64)
    tl.store(state, maximum, mask=mask_i)
    tl.store(state + plane, total, mask=mask_i)
    tl.store(state + 2 * plane, loss, mask=mask_i)
    tl.store(state + 3 * plane, effective, mask=mask_i)
    if not PAIRS:
        tl.store(state + 4 * plane, wins, mask=mask_i)
    tl.store(grad_w_ptr + i, grad * grad_scale, mask=mask_i)


@jit
def _mean(x_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + k, mask=k < count, other=0.0)
    return tl.sum(total, axis=0) / count


@jit
def _rpo_column_kernel(
    reward_l_ptr,
    emb_w_ptr,
    emb_l_ptr,
    norm_ptr,
    reward_ptr,
    state_ptr,
    grad_l_ptr,
    loss_ptr,
    effective_ptr,
    accuracy_ptr,
    n_winners,
    rows,
    columns,
    dim,
    n_chunks,
    l_stride,
    emb_w_row,
    emb_w_d,
    emb_l_row,
    emb_l_d,
    reward_scale,
    beta,
    grad_scale,
    temperature,
    UNIFORM: tl.constexpr,
    INSIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of losers of one group: their rewards and dL/dreward_l. The first program also takes the rows' means."""
    group = tl.program_id(0)
    local_j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_j = local_j < columns
    j = _clamped(group, local_j, columns)
    reward_l = (reward_l_ptr, l_stride, n_chunks, reward_scale)
    norm_l_ptr = norm_ptr + n_winners
    emb = (emb_w_ptr, emb_l_ptr, norm_ptr, norm_l_ptr, emb_w_row, emb_w_d, emb_l_row, emb_l_d, dim, temperature)
    plane = tl.cast(n_winners, tl.int64)
    l = rewards_of(reward_l, j, BLOCK, BLOCK_CHUNKS)  # noqa: E741
    tl.store(reward_ptr + plane + j, l, mask=mask_j)
    grad = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        local_i = start + tl.arange(0, BLOCK)
        mask_i = local_i < rows
        i = _clamped(group, local_i, rows)
        w = tl.load(reward_ptr + i)
        u = (w[:, None] - l[None, :]) * (0.5 * beta)
        if UNIFORM:
            omega = tl.where(mask_i[:, None], 1.0 / columns, 0.0) + tl.zeros_like(u)
        else:
            z = _similarity(emb, i, j, mask_j, BLOCK, BLOCK_D)
            maximum = tl.load(state_ptr + i, mask=mask_i, other=float("inf"))
            total = tl.load(state_ptr + plane + i, mask=mask_i, other=1.0)
            omega = tl.exp(z - maximum[:, None]) / total[:, None]
        if INSIDE:
            u = omega * u
        _, slope = log_sigmoid_and_slope(u)
        grad += tl.sum(omega * slope, axis=0)
    tl.store(grad_l_ptr + j, grad * grad_scale, mask=mask_j)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        loss = _mean(state_ptr + 2 * plane, n_winners, 1024)
        if INSIDE:
            loss = loss / columns
        tl.store(loss_ptr, loss)
        tl.store(effective_ptr, _mean(state_ptr + 3 * plane, n_winners, 1024))
        tl.store(accuracy_ptr, _mean(state_ptr + 4 * plane, n_winners, 1024))


def row_blocks(weight: str, n_chunks: int) -> dict[str, int]:
    """Tile sizes, warps and stages of the row kernel; these compile without spills where others do not."""
    warps, stages = (4, 2) if weight == "inside" else (8, 1)
    return {
        "BLOCK": 32,
        "BLOCK_D": 32,
        "BLOCK_CHUNKS": chunk_block(n_chunks),
        "num_warps": warps,
        "num_stages": stages,
    }


def column_blocks(n_chunks: int) -> dict[str, int]:
    """The same of the column kernel."""
    return {"BLOCK": 32, "BLOCK_D": 16, "BLOCK_CHUNKS": chunk_block(n_chunks), "num_warps": 8, "num_stages": 2}


def norm_block(dim: int) -> int:
    return 256 if dim <= 256 else 1024


class Similarity(NamedTuple):
    """How contrasts are weighted: embeddings and their inverse norms (M + N,), or None for weight="uniform"."""

    emb_w: Tensor | None
    emb_l: Tensor | None
    norm: Tensor | None
    temperature: float
    weight: str
    groups: int


def launch_norms(emb_w: Tensor, emb_l: Tensor) -> Tensor:
    """1/norm of the winners' and then the losers' embeddings, (M + N,) fp32."""
    dim, count = emb_w.shape[1], emb_w.shape[0] + emb_l.shape[0]
    norm = torch.empty(count, dtype=torch.float32, device=emb_w.device)
    strides = (*emb_w.stride(), *emb_l.stride())
    _inverse_norm_kernel[(count,)](emb_w, emb_l, norm, emb_w.shape[0], *strides, dim, BLOCK_D=norm_block(dim))
    return norm


def launch(
    reward_w: Rewards, reward_l: Rewards, similarity: Similarity, grad_w: Tensor, grad_l: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, effective contrasts, accuracy, rewards (M + N,)) in two launches; fills grad_w (M,) and grad_l (N,)."""
    emb_w, emb_l, norm, temperature, weight, groups = similarity
    m, n = grad_w.shape[0], grad_l.shape[0]
    rows, columns = m // groups, n // groups
    loss, effective, accuracy = (torch.empty((), dtype=torch.float32, device=grad_w.device) for _ in range(3))
    rewards = torch.empty(m + n, dtype=torch.float32, device=grad_w.device)
    state = torch.empty(5, m, dtype=torch.float32, device=grad_w.device)
    n_chunks = reward_w.values.shape[1]
    embeddings, strides, dim = (rewards, rewards, rewards), (0, 0, 0, 0), 0  # never read
    if emb_w is not None and emb_l is not None and norm is not None:
        embeddings, strides, dim = (emb_w, emb_l, norm), (*emb_w.stride(), *emb_l.stride()), emb_w.shape[1]
    sizes = (m, rows, columns, dim, n_chunks)
    scales = (reward_w.scale, beta, 0.5 * beta / (m * columns if weight == "inside" else m), temperature)
    flags: dict[str, Any] = {"UNIFORM": norm is None, "INSIDE": weight == "inside"}
    row_flags, column_flags = flags | row_blocks(weight, n_chunks), flags | column_blocks(n_chunks)
    shared = (*embeddings, rewards, state)
    w_stride, l_stride = reward_w.values.stride(0), reward_l.values.stride(0)
    _rpo_row_kernel[(groups, -(-rows // row_flags["BLOCK"]))](
        reward_w.values,
        reward_l.values,
        *shared,
        grad_w,
        *sizes,
        w_stride,
        l_stride,
        *strides,
        *scales,
        PAIRS=m == n,
        **row_flags,
    )
    _rpo_column_kernel[(groups, -(-columns // column_flags["BLOCK"]))](
        reward_l.values,
        *shared,
        grad_l,
        loss,
        effective,
        accuracy,
        *sizes,
        l_stride,
        *strides,
        *scales,
        **column_flags,
    )
    return loss, effective, accuracy, rewards
