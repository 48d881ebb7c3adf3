"""Kernels and launchers of `rpo_loss`, which `paired_preference_loss` shares.

Embeddings are prepared once: a row times a power of two, as one fp16 matrix (half inputs) or two (fp32: the value and
what it leaves, 22 bits), and a scale that makes a product of rows a cosine. Products run on tensor cores, fp16 with
fp32 sums, which every target has. A first walk over the tiles finds the softmax of each row, a second does all the
rest, rows and columns, so that each contrast is computed twice; where a row of contrasts fits a tile, the second walk
is the only one. A program owns a rectangle of tiles, at most 32 x 32 of them a group, and leaves partial sums, which
the last kernel adds in one order.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.dispatch import jit, tl
from ..common.pairwise import Rewards, chunk_block, log_sigmoid_and_slope, rewards_of, won
from .embeddings import Prepared

STRIPS = 32  # partial sums of a row or a column, at most; a constant, so memory stays O(M + N)
LOWEST = tl.constexpr(-3.0e38) if tl else -3.0e38  # below every logit; minus one of them it is still finite
MERGED = 8  # strips that are read at a time
FINISH = 64  # rows of a program of the last kernel
_MULTIPROCESSORS = 132  # fewer programs than this, and the next smaller tile is taken


@jit
def _clamped(group, local, count):
    """Rows of a group, below 2^31; the lanes past its end repeat the last row."""
    return group * count + tl.minimum(local, count - 1)


@jit
def _logits(
    emb,
    i,
    j,
    scale_i,
    mask_j,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """cos(emb_w_i, emb_l_j) * log2(e) / temperature of a tile; the lowest number in the columns beyond the group.

    emb: (parts_ptr, scale_ptr, n_winners, padded). i and j are valid rows throughout (`_clamped`). The small products
    of two parts have a sum of their own, which rounds nothing of the large one's.
    """
    k = tl.arange(0, BLOCK_K)
    w_ptr = emb[0] + i.to(tl.int64)[:, None] * (PARTS * emb[3]) + k[None, :]
    l_ptr = emb[0] + (emb[2] + j.to(tl.int64))[None, :] * (PARTS * emb[3]) + k[:, None]
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    small = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, emb[3], BLOCK_K):
        w = tl.load(w_ptr + start)
        l = tl.load(l_ptr + start)  # noqa: E741
        product = tl.dot(w, l, product)
        if PARTS == 2:
            w_rest = tl.load(w_ptr + emb[3] + start)
            l_rest = tl.load(l_ptr + emb[3] + start)
            small = tl.dot(w, l_rest, small)
            small = tl.dot(w_rest, l, small)
    if PARTS == 2:
        product += small
    scale_j = tl.load(emb[1] + emb[2] + j)
    return tl.where(mask_j[None, :], product * scale_i[:, None] * scale_j[None, :], LOWEST)


@jit
def _entropy(total, moment):
    """exp of the entropy in nats, of sums with powers of two."""
    return tl.exp2(tl.log2(total) - moment / total)


@jit
def _grown(sums, z_max, z_total, z_moment):
    """(maximum, sum of 2^(z - maximum), sum of that times z - maximum) of rows, with those of more columns."""
    maximum, total, moment = sums
    higher = tl.maximum(maximum, z_max)
    shift = tl.where(total > 0.0, maximum - higher, 0.0)
    z_shift = z_max - higher
    factor, z_factor = tl.exp2(shift), tl.exp2(z_shift)
    moment = factor * (moment + shift * total) + z_factor * (z_moment + z_shift * z_total)
    return higher, factor * total + z_factor * z_total, moment


@jit
def _merged(state_ptr, i, n_winners, n_strips, BLOCK_M: tl.constexpr, BLOCK_STRIPS: tl.constexpr):
    """The sums of `_grown` of whole rows, from those of their strips."""
    n = tl.cast(n_winners, tl.int64)
    sums = tl.full((BLOCK_M,), LOWEST, tl.float32), tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, n_strips, BLOCK_STRIPS):
        strip = start + tl.arange(0, BLOCK_STRIPS)
        mask = (strip < n_strips)[:, None]
        place = state_ptr + n * strip[:, None] + i[None, :]
        maxima = tl.load(place, mask=mask, other=LOWEST)
        maximum = tl.max(maxima, axis=0)
        shift = maxima - maximum[None, :]
        factor = tl.exp2(shift)
        totals = tl.load(place + n * n_strips, mask=mask, other=0.0)
        moments = tl.load(place + 2 * n * n_strips, mask=mask, other=0.0)
        moment = tl.sum(factor * (moments + shift * totals), axis=0)
        sums = _grown(sums, maximum, tl.sum(factor * totals, axis=0), moment)
    return sums


@jit
def _rpo_softmax_kernel(
    parts_ptr,
    scale_ptr,
    state_ptr,
    n_winners,
    rows,
    columns,
    padded,
    column_strip,
    n_column_strips,
    logit_scale,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block of winners and a strip of their losers: planes (3, strips, M) of the logits' maximum, of the sum of
    2^(z - maximum), and of that times z - maximum, from which the entropy follows."""
    blocks = tl.cdiv(rows, BLOCK_M)
    strip = tl.program_id(0) % n_column_strips
    block = tl.program_id(0) // n_column_strips % blocks
    group = tl.program_id(0) // (n_column_strips * blocks)
    local_i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = _clamped(group, local_i, rows)
    emb = (parts_ptr, scale_ptr, n_winners, padded)
    scale_i = tl.load(scale_ptr + i) * logit_scale
    sums = tl.full((BLOCK_M,), LOWEST, tl.float32), tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for start in range(strip * column_strip, tl.minimum((strip + 1) * column_strip, columns), BLOCK_N):
        local_j = start + tl.arange(0, BLOCK_N)
        j = _clamped(group, local_j, columns)
        z = _logits(emb, i, j, scale_i, local_j < columns, PARTS, BLOCK_M, BLOCK_N, BLOCK_K)
        z_max = tl.max(z, axis=1)
        z -= z_max[:, None]
        e = tl.exp2(z)
        sums = _grown(sums, z_max, tl.sum(e, axis=1), tl.sum(e * z, axis=1))
    maximum, total, moment = sums
    plane = tl.cast(n_winners, tl.int64) * n_column_strips
    place = state_ptr + tl.cast(n_winners, tl.int64) * strip + i
    mask_i = local_i < rows
    tl.store(place, maximum, mask=mask_i)
    tl.store(place + plane, total, mask=mask_i)
    tl.store(place + 2 * plane, moment, mask=mask_i)


@jit
def _rpo_contrast_kernel(
    reward_w_ptr,
    reward_l_ptr,
    parts_ptr,
    scale_ptr,
    reward_ptr,
    state_ptr,
    n_winners,
    n_losers,
    rows,
    columns,
    padded,
    n_chunks,
    w_stride,
    l_stride,
    row_strip,
    column_strip,
    n_row_strips,
    n_column_strips,
    reward_scale,
    half_beta,
    logit_scale,
    UNIFORM: tl.constexpr,
    INSIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    SINGLE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_STRIPS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """A rectangle of contrasts of one group: rewards (M + N); behind the three planes of `_rpo_softmax_kernel` in
    state, sums of omega * slope over the rectangle's columns (column strips, M) and rows (row strips, N), and three
    numbers a program: the loss, exp(entropy) and wins. PAIRS: a win is over the loser of the same row, else over any;
    a tie is half a win. SINGLE: one tile has all columns, and the softmax is taken here."""
    strip_j = tl.program_id(0) % n_column_strips
    strip_i = tl.program_id(0) // n_column_strips % n_row_strips
    group = tl.program_id(0) // (n_column_strips * n_row_strips)
    m, n = tl.cast(n_winners, tl.int64), tl.cast(n_losers, tl.int64)
    grad_w_ptr = state_ptr + 3 * n_column_strips * m + strip_j * m
    grad_l_ptr = state_ptr + 4 * n_column_strips * m + strip_i * n
    scalar_ptr = state_ptr + 4 * n_column_strips * m + n_row_strips * n + tl.program_id(0)
    reward_l = (reward_l_ptr, l_stride, n_chunks, reward_scale)
    reward_w = (reward_w_ptr, w_stride, n_chunks, reward_scale)
    emb = (parts_ptr, scale_ptr, n_winners, padded)
    losses = tl.zeros((BLOCK_M,), tl.float32)
    contrasts = tl.zeros((BLOCK_M,), tl.float32)
    wins = tl.zeros((BLOCK_M,), tl.float32)
    first_i = strip_i * row_strip
    for start_i in range(first_i, tl.minimum(first_i + row_strip, rows), BLOCK_M):
        local_i = start_i + tl.arange(0, BLOCK_M)
        mask_i = local_i < rows
        first = mask_i & (strip_j == 0)  # what belongs to a row and not to a contrast
        i = _clamped(group, local_i, rows)
        w = rewards_of(reward_w, i, BLOCK_M, BLOCK_CHUNKS)
        tl.store(reward_ptr + i, w, mask=first)
        if PAIRS:
            own = rewards_of(reward_l, i, BLOCK_M, BLOCK_CHUNKS)
            wins += tl.where(first, won(w, own), 0.0)
        grad = tl.zeros((BLOCK_M,), tl.float32)
        if UNIFORM:
            contrasts += tl.where(first, columns, 0)
        else:
            scale_i = tl.load(scale_ptr + i) * logit_scale
            if not SINGLE:
                maximum, total, moment = _merged(state_ptr, i, n_winners, n_column_strips, BLOCK_M, BLOCK_STRIPS)
                contrasts += tl.where(first, _entropy(total, moment), 0.0)
                # 2^(z - level) are the weights; none for the rows beyond the group
                level = tl.where(mask_i, maximum + tl.log2(total), 3.0e38)
        first_j = strip_j * column_strip
        for start_j in range(first_j, tl.minimum(first_j + column_strip, columns), BLOCK_N):
            local_j = start_j + tl.arange(0, BLOCK_N)
            mask_j = local_j < columns
            j = _clamped(group, local_j, columns)
            if UNIFORM:
                valid = mask_i[:, None] & mask_j[None, :]
                omega = tl.where(valid, 1.0 / columns, 0.0)
            else:
                z = _logits(emb, i, j, scale_i, mask_j, PARTS, BLOCK_M, BLOCK_N, BLOCK_K)
                if SINGLE:
                    z -= tl.max(z, axis=1)[:, None]
                    omega = tl.exp2(z)
                    total = tl.sum(omega, axis=1)
                    contrasts += tl.where(first, _entropy(total, tl.sum(omega * z, axis=1)), 0.0)
                    omega *= tl.where(mask_i, 1.0 / total, 0.0)[:, None]
                else:
                    omega = tl.exp2(z - level[:, None])
            l = rewards_of(reward_l, j, BLOCK_N, BLOCK_CHUNKS)  # noqa: E741
            tl.store(reward_ptr + m + j, l, mask=mask_j & (start_i == 0))
            if not PAIRS:
                valid = mask_i[:, None] & mask_j[None, :]
                wins += tl.sum(tl.where(valid, won(w[:, None], l[None, :]), 0.0), axis=1)
            u = (w[:, None] - l[None, :]) * half_beta
            if INSIDE:
                term, slope = log_sigmoid_and_slope(omega * u)
                valid = mask_i[:, None] & mask_j[None, :]
                losses -= tl.sum(tl.where(valid, term, 0.0), axis=1)
            else:
                term, slope = log_sigmoid_and_slope(u)
                losses -= tl.sum(omega * term, axis=1)
            slope *= omega
            grad += tl.sum(slope, axis=1)
            column = tl.sum(slope, axis=0)
            earlier = tl.load(grad_l_ptr + j, mask=mask_j & (start_i > first_i), other=0.0)
            tl.debug_barrier()  # a column's sum may be read by another thread than the one that wrote it
            tl.store(grad_l_ptr + j, earlier + column, mask=mask_j)
            tl.debug_barrier()
        tl.store(grad_w_ptr + i, grad, mask=mask_i)
    programs = tl.num_programs(0)
    tl.store(scalar_ptr, tl.sum(losses, axis=0))
    tl.store(scalar_ptr + programs, tl.sum(contrasts, axis=0))
    tl.store(scalar_ptr + 2 * programs, tl.sum(wins, axis=0))


@jit
def _sum(x_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + k, mask=k < count, other=0.0)
    return tl.sum(total, axis=0)


@jit
def _strips_sum(x_ptr, k, mask, count, n_strips, STRIPS: tl.constexpr):
    strip = tl.arange(0, STRIPS)
    mask = (strip < n_strips)[:, None] & mask[None, :]
    return tl.sum(tl.load(x_ptr + strip[:, None] * tl.cast(count, tl.int64) + k[None, :], mask=mask, other=0.0), axis=0)


@jit
def _rpo_finish_kernel(
    state_ptr,
    grad_w_ptr,
    grad_l_ptr,
    loss_ptr,
    effective_ptr,
    accuracy_ptr,
    n_winners,
    n_losers,
    columns,
    n_row_strips,
    n_column_strips,
    programs,
    grad_scale,
    INSIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_STRIPS: tl.constexpr,
):
    """Adds what the programs of `_rpo_contrast_kernel` left: dL/dreward_w, dL/dreward_l, and by the first the means."""
    m = tl.cast(n_winners, tl.int64)
    rows_ptr = state_ptr + 3 * n_column_strips * m
    columns_ptr = rows_ptr + n_column_strips * m
    blocks = tl.cdiv(n_winners, BLOCK)
    if tl.program_id(0) < blocks:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = i < n_winners
        grad = _strips_sum(rows_ptr, i, mask, n_winners, n_column_strips, BLOCK_STRIPS)
        tl.store(grad_w_ptr + i, -grad * grad_scale, mask=mask)
    else:
        j = (tl.program_id(0) - blocks) * BLOCK + tl.arange(0, BLOCK)
        mask = j < n_losers
        grad = _strips_sum(columns_ptr, j, mask, n_losers, n_row_strips, BLOCK_STRIPS)
        tl.store(grad_l_ptr + j, grad * grad_scale, mask=mask)
    if tl.program_id(0) == 0:
        scalar_ptr = columns_ptr + n_row_strips * tl.cast(n_losers, tl.int64)
        loss = _sum(scalar_ptr, programs, 1024) / n_winners
        wins = _sum(scalar_ptr + 2 * programs, programs, 1024) / n_winners
        tl.store(loss_ptr, loss / columns if INSIDE else loss)
        tl.store(effective_ptr, _sum(scalar_ptr + programs, programs, 1024) / n_winners)
        tl.store(accuracy_ptr, wins if PAIRS else wins / columns)


# BLOCK_M, BLOCK_N, BLOCK_K of one part and of two, warps, stages. The contrasts need more registers than the softmax.
_TILES = {
    "softmax, large": (128, 64, 64, 32, 8, 3),
    "softmax, middle": (64, 64, 64, 32, 8, 3),
    "softmax, small": (16, 16, 64, 64, 2, 2),
    "middle": (32, 64, 64, 32, 4, 3),
    "small": (16, 16, 64, 64, 2, 2),
    "single": (16, 128, 64, 64, 4, 2),  # all columns of a group in one tile
    "single, narrow": (16, 32, 64, 64, 2, 2),
}
# ptxas would rather spill a few registers than lose a step of occupancy, which these kernels do not need
MAX_REGISTERS = 255


@lru_cache
def blocks(tile: str, n_parts: int) -> dict[str, int]:
    block_m, block_n, *block_k, warps, stages = _TILES[tile]
    tiles = {"PARTS": n_parts, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k[n_parts - 1]}
    options = {"maxnreg": MAX_REGISTERS} if torch.version.cuda and torch.cuda.is_available() else {}
    return tiles | {"num_warps": warps, "num_stages": stages} | options


class Plan(NamedTuple):
    """Tiles of the two walks (no first one where a tile has all columns), and how a group is cut: winners and losers of
    a strip, and how many strips."""

    softmax: str | None
    contrast: str
    row_strip: int
    column_strip: int
    n_row_strips: int
    n_column_strips: int


def _strips(count: int, block: int) -> tuple[int, int]:
    """Length of a strip, whole blocks, and the number of strips, at most STRIPS and none of them empty."""
    blocks = -(-count // block)
    length = -(-blocks // STRIPS)
    return length * block, -(-blocks // length)


@lru_cache
def plan(rows: int, columns: int, groups: int) -> Plan:
    """The largest tiles with a program for every multiprocessor; all columns in one tile where they fit."""
    if columns <= _TILES["single"][1]:
        softmax, contrast = None, "single, narrow" if columns <= _TILES["single, narrow"][1] else "single"
    else:
        softmax = _largest(["softmax, small", "softmax, middle", "softmax, large"], rows, columns, groups)
        contrast = _largest(["small", "middle"], rows, columns, groups)
    # a strip of columns serves both walks
    block_n = max(_TILES[tile][1] for tile in (softmax, contrast) if tile)
    return Plan(softmax, contrast, *_cut(rows, columns, _TILES[contrast][0], block_n))


def _largest(tiles: list[str], rows: int, columns: int, groups: int) -> str:
    fill = [t for t in tiles if groups * -(-rows // _TILES[t][0]) * -(-columns // _TILES[t][1]) >= _MULTIPROCESSORS]
    return fill[-1] if fill else tiles[0]


def _cut(rows: int, columns: int, block_m: int, block_n: int) -> tuple[int, int, int, int]:
    (row_strip, n_row_strips), (column_strip, n_column_strips) = _strips(rows, block_m), _strips(columns, block_n)
    return row_strip, column_strip, n_row_strips, n_column_strips


class Similarity(NamedTuple):
    """How contrasts are weighted; no embeddings for weight="uniform"."""

    prepared: Prepared | None
    temperature: float
    weight: str
    groups: int


def launch(
    reward_w: Rewards, reward_l: Rewards, similarity: Similarity, grad_w: Tensor, grad_l: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, effective contrasts, accuracy, rewards (M + N,)); fills grad_w (M,) and grad_l (N,).

    Two launches for weight="uniform" and where a tile has all columns, else three.
    """
    prepared, temperature, weight, groups = similarity
    m, n, device = grad_w.shape[0], grad_l.shape[0], grad_w.device
    rows, columns = m // groups, n // groups
    softmax, contrast, row_strip, column_strip, n_row_strips, n_column_strips = plan(rows, columns, groups)
    programs = groups * n_row_strips * n_column_strips
    loss, effective, accuracy = (torch.empty((), dtype=torch.float32, device=device) for _ in range(3))
    rewards = torch.empty(m + n, dtype=torch.float32, device=device)
    state = torch.empty(4 * n_column_strips * m + n_row_strips * n + 3 * programs, dtype=torch.float32, device=device)
    parts, scale, n_parts, padded = (rewards, rewards, 1, 0) if prepared is None else prepared  # the first never read
    logit_scale = math.log2(math.e) / temperature
    if prepared is not None and softmax is not None:
        flags = blocks(softmax, n_parts)
        _rpo_softmax_kernel[(groups * -(-rows // flags["BLOCK_M"]) * n_column_strips,)](
            *(parts, scale, state, m, rows, columns, padded, column_strip, n_column_strips, logit_scale), **flags
        )
    inside, pairs = weight == "inside", m == n
    n_chunks = reward_w.values.shape[1]
    _rpo_contrast_kernel[(programs,)](
        *(reward_w.values, reward_l.values, parts, scale, rewards, state, m, n, rows, columns, padded, n_chunks),
        *(reward_w.values.stride(0), reward_l.values.stride(0)),
        *(row_strip, column_strip, n_row_strips, n_column_strips, reward_w.scale, 0.5 * beta, logit_scale),
        UNIFORM=prepared is None,
        INSIDE=inside,
        PAIRS=pairs,
        SINGLE=softmax is None,
        BLOCK_STRIPS=MERGED,
        BLOCK_CHUNKS=chunk_block(n_chunks),
        **blocks(contrast, n_parts),
    )
    grad_scale = 0.5 * beta / (m * columns if inside else m)
    _rpo_finish_kernel[(-(-m // FINISH) + -(-n // FINISH),)](
        *(state, grad_w, grad_l, loss, effective, accuracy, m, n, columns, n_row_strips, n_column_strips, programs),
        grad_scale,
        INSIDE=inside,
        PAIRS=pairs,
        BLOCK=FINISH,
        BLOCK_STRIPS=STRIPS,
    )
    return loss, effective, accuracy, rewards
