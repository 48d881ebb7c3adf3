"""Launchers of the kernels in _transition_kernels.py, and how a row is cut for them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _transition_kernels as kernels
from ._ddim import Step, all_channels_last, empty_rows_like

_BLOCK = 1024
_MAX_CHUNKS = 256  # of a row: enough programs for a full GPU at two rows, few enough for one block in the second stage
_PAIR_TILES = {16: 64, 64: 16, 256: 4}  # chunks -> pairs of a tile of the second stage


def _chunks(n_elements: int) -> tuple[int, int]:
    """(chunks of a row, blocks of a chunk)."""
    blocks = -(-n_elements // _BLOCK)
    blocks_per_chunk = -(-blocks // _MAX_CHUNKS)
    return -(-blocks // blocks_per_chunk), blocks_per_chunk


def _order(predictions: dict[str, Tensor], latents: dict[str, Tensor]) -> tuple[int, int, bool]:
    """(inner, outer, linear): kernels go through rows as the predictions lie in memory, latents may lie transposed."""
    op = "transition_loss"
    last = all_channels_last(op, predictions)
    channels, places = predictions["eps_cond"].shape[1], predictions["eps_cond"][0, 0].numel()
    inner, outer = (channels, places) if last else (places, channels)
    return inner, outer, last == all_channels_last(op, latents)


def _named(prefix: str, cond: Tensor, uncond: Tensor | None) -> dict[str, Tensor]:
    found = {f"{prefix}eps_cond": cond}
    return found if uncond is None else found | {f"{prefix}eps_uncond": uncond}


def launch_forward(
    predictions: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    latents: tuple[Tensor, Tensor, Tensor],
    alphas_cumprod: Tensor,
    step: Step,
    beta: float,
    low: float,
    high: float,
) -> tuple[Tensor, ...]:
    cond, uncond, ref_cond, ref_uncond = predictions
    named = _named("", cond, uncond) | _named("ref_", ref_cond, ref_uncond)
    inner, outer, linear = _order(named, dict(zip(("x_t", "x_w", "x_l"), latents, strict=True)))
    n_rows, n_pairs, n_elements = cond.shape[0], latents[1].shape[0], cond[0].numel()
    n_chunks, n_blocks = _chunks(n_elements)
    tensors = (cond, cond if uncond is None else uncond, ref_cond, ref_cond if ref_uncond is None else ref_uncond)
    partial, ratio_w, ratio_l, slopes, *scalars = (
        torch.empty(shape, dtype=torch.float32, device=cond.device)
        for shape in ((2, n_pairs, n_chunks), (n_pairs,), (n_pairs,), (2, n_pairs), (), (), ())
    )
    kernels._transition_chunk_kernel[(n_rows, n_chunks)](
        *tensors,
        *latents,
        alphas_cumprod.contiguous(),
        *step.row_pointers(cond.device),
        partial,
        n_elements,
        n_rows,
        n_pairs,
        n_chunks,
        n_blocks,
        alphas_cumprod.shape[0],
        *step.numbers(),
        *(x.stride(0) for x in (*tensors, *latents)),
        inner,
        outer,
        GUIDED=uncond is not None,
        LINEAR=linear,
        BLOCK_SIZE=_BLOCK,
    )
    block_chunks = min(size for size in _PAIR_TILES if size >= n_chunks)
    kernels._transition_pair_kernel[(1,)](
        partial,
        ratio_w,
        ratio_l,
        slopes,
        *scalars,
        n_elements,
        n_pairs,
        n_chunks,
        beta,
        low,
        high,
        BLOCK_PAIRS=_PAIR_TILES[block_chunks],
        BLOCK_CHUNKS=block_chunks,
    )
    loss, clipped, accuracy = scalars
    return loss, ratio_w, ratio_l, clipped, accuracy, slopes


def launch_backward(
    grad: Tensor,
    slopes: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    latents: tuple[Tensor, Tensor, Tensor],
    alphas_cumprod: Tensor,
    step: Step,
) -> list[Tensor]:
    named = _named("", cond, uncond)
    inner, outer, linear = _order(named, dict(zip(("x_t", "x_w", "x_l"), latents, strict=True)))
    n_elements = cond[0].numel()
    n_blocks = -(-n_elements // _BLOCK)
    grads = [empty_rows_like(x) for x in named.values()]
    tensors = (cond, cond if uncond is None else uncond, *latents)
    kernels._transition_bwd_kernel[(cond.shape[0] * n_blocks,)](
        grad,
        slopes,
        *tensors,
        alphas_cumprod.contiguous(),
        *step.row_pointers(cond.device),
        grads[0],
        grads[-1],
        n_elements,
        cond.shape[0],
        slopes.shape[1],
        n_blocks,
        alphas_cumprod.shape[0],
        *step.numbers(),
        *(x.stride(0) for x in tensors),
        inner,
        outer,
        GUIDED=uncond is not None,
        LINEAR=linear,
        BLOCK_SIZE=_BLOCK,
    )
    return grads
