"""The first kernel of the RPO form of `paired_preference_loss` and the launches of its forward; the others are those of
`rpo_loss`. The DPO form is beside it (dpo.py)."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import jit, tl
from ..common.pairwise import Rewards
from ..implicit_reward.targets import Source
from ..implicit_reward.triton import arguments, chunk_sums
from ..rpo_loss.embeddings import block, empty, prepare
from ..rpo_loss.triton import Similarity
from ..rpo_loss.triton import launch as launch_rpo
from .dpo import launch as launch_dpo
from .torch import Settings


@jit
def _paired_chunk_kernel(
    pred_ptr,
    target_ptr,
    ref_ptr,
    keys_ptr,
    p_ptr,
    q_ptr,
    ref_error_ptr,
    partial_ptr,
    emb_w_ptr,
    emb_l_ptr,
    parts_ptr,
    scale_ptr,
    n_pairs,
    n_chunks,
    dim,
    padded,
    ref_error_stride,
    emb_w_row,
    emb_w_d,
    emb_l_row,
    emb_l_d,
    n_elements,
    chunk_size,
    size_1,
    size_2,
    pred_row,
    pred_0,
    pred_1,
    pred_2,
    target_row,
    target_0,
    target_1,
    target_2,
    ref_row,
    ref_0,
    ref_1,
    ref_2,
    HAS_REF: tl.constexpr,
    HAS_REF_ERROR: tl.constexpr,
    PARTS: tl.constexpr,
    KEYED: tl.constexpr,
    VELOCITY: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program per row and chunk: partial (2N, chunks) of the reward times C*H*W. The first of a row also adds the
    stored error of the reference, and prepares its embedding; PARTS: 0 without embeddings."""
    program = tl.program_id(0).to(tl.int64)
    row = program // n_chunks
    chunk = program % n_chunks
    reward, error, _ = chunk_sums(
        pred_ptr,
        target_ptr,
        ref_ptr,
        (keys_ptr, p_ptr, q_ptr),
        row,
        chunk,
        n_pairs,
        n_elements,
        chunk_size,
        (size_1, size_2),
        (pred_row, pred_0, pred_1, pred_2),
        (target_row, target_0, target_1, target_2),
        (ref_row, ref_0, ref_1, ref_2),
        HAS_REF,
        False,
        KEYED,
        VELOCITY,
        STRIDED,
        BLOCK_SIZE,
    )
    if not HAS_REF:
        reward = -error
    if HAS_REF_ERROR:
        ref_error = tl.load(ref_error_ptr + row * ref_error_stride).to(tl.float32)
        reward += tl.where(chunk == 0, ref_error * n_elements, 0.0)
    tl.store(partial_ptr + program, reward)
    if PARTS:  # noqa: SIM102 (a constant, and a condition at run time)
        if chunk == 0:
            winners, losers = (emb_w_ptr, emb_w_row, emb_w_d), (emb_l_ptr, emb_l_row, emb_l_d)
            prepare(winners, losers, row, n_pairs, dim, padded, parts_ptr, scale_ptr, PARTS, BLOCK_D)


def launch(
    pred: Tensor,
    source: Source,
    ref_pred: Tensor | None,
    ref_error: Tensor | None,
    emb_w: Tensor | None,
    emb_l: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, effective contrasts, accuracy, reward (2N,), dL/dreward (2N,)) in one (DPO) to four launches."""
    if settings.weight == "dpo":
        return launch_dpo(pred, source, ref_pred, ref_error, settings.beta, settings.label_smoothing)
    n_rows, (pointers, numbers, flags, n_chunks) = pred.shape[0], arguments(pred, source, ref_pred)
    n_pairs = n_rows // 2
    partial = torch.empty(n_rows, n_chunks, dtype=torch.float32, device=pred.device)
    slope = torch.empty(n_rows, dtype=torch.float32, device=pred.device)
    prepared, embeddings, sizes = None, (slope,) * 4, (0,) * 6  # never read
    if emb_w is not None and emb_l is not None:
        prepared = empty(emb_w, emb_l)
        embeddings = emb_w, emb_l, prepared.parts, prepared.scale
        sizes = emb_w.shape[1], prepared.padded, *emb_w.stride(), *emb_l.stride()
    _paired_chunk_kernel[(n_rows * n_chunks,)](
        *pointers,
        slope if ref_error is None else ref_error,
        partial,
        *embeddings,
        n_pairs,
        n_chunks,
        *sizes[:2],
        0 if ref_error is None else ref_error.stride(0),
        *sizes[2:],
        *numbers,
        HAS_REF=ref_pred is not None,
        HAS_REF_ERROR=ref_error is not None,
        PARTS=0 if prepared is None else prepared.n_parts,
        BLOCK_D=block(sizes[0]),
        **flags,
    )
    winners, losers = (Rewards(x, 1.0 / numbers[0]) for x in (partial[:n_pairs], partial[n_pairs:]))
    grads = slope[:n_pairs], slope[n_pairs:]
    similarity = Similarity(prepared, settings.temperature, settings.weight, settings.groups)
    return *launch_rpo(winners, losers, similarity, *grads, settings.beta), slope
