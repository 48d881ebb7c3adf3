"""Launchers of the kernels in _reward_kernels.py, and how a row is cut for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _reward_kernels as kernels
from ._strides import layout_of
from ._targets import Source

_FEW, _MANY = 66, 1024  # chunks of a row: two rows fill 132 multiprocessors; one block of the second stage holds them


def split(n_elements: int) -> tuple[int, int]:
    """(chunks, elements of a chunk) of a row; a chunk is a multiple of 16 elements, so that it starts aligned."""
    if n_elements <= _MANY * 1024:
        size = min(1024, max(128, n_elements // _FEW // 16 * 16))
    else:
        size = -(-n_elements // (_MANY * 1024)) * 1024
    return -(-n_elements // size), size


def block(chunk_size: int, strided: bool, cross: bool = False) -> dict[str, int]:
    """BLOCK_SIZE and num_warps. Dense rows: eight elements a thread, which at 16 bits is one 16-byte access; strided
    ones: four, the elements of one Philox block, since each also needs its address in registers."""
    if strided:
        return {"BLOCK_SIZE": 512, "num_warps": 4}
    size = 256 if chunk_size <= 256 or cross else 1024  # cross in 1024 spills on sm_100
    return {"BLOCK_SIZE": size, "num_warps": size // 256}


def block_chunks(n_chunks: int) -> int:
    """Block of the second stage."""
    return 128 if n_chunks <= 128 else _MANY


class Arguments(NamedTuple):
    """What the forward and the backward kernel are given alike."""

    pointers: tuple[Tensor, ...]  # pred, target, third, keys, timesteps, alphas_cumprod
    numbers: tuple[int, ...]  # n_elements, chunk_size, ... to the last stride
    flags: dict[str, Any]
    n_chunks: int


def arguments(pred: Tensor, source: Source, third: Tensor | None, cross: bool = False) -> Arguments:
    """third: ref_pred or grad_pred. A pointer that a kernel does not use is pred's."""
    n_elements = pred[0].numel()
    n_chunks, chunk_size = split(n_elements)
    layout = layout_of("implicit_reward", pred, source.tensor, third)
    keyed = [None if x is None else x.contiguous() for x in source[1:]]
    pointers = (pred, source.tensor, third, *keyed)
    n_timesteps = 0 if source.alphas_cumprod is None else source.alphas_cumprod.shape[0]
    flags = {
        "KEYED": source.keys is not None,
        "VELOCITY": source.timesteps is not None,
        "STRIDED": not layout.flat,
        **block(chunk_size, not layout.flat, cross),
    }
    numbers = (n_elements, chunk_size, n_timesteps, *layout.sizes, *(s for row in layout.strides for s in row))
    return Arguments(tuple(pred if x is None else x for x in pointers), numbers, flags, n_chunks)


def launch_forward(
    pred: Tensor, source: Source, ref_pred: Tensor | None, ref_error: Tensor | None, cross: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(reward (N,), error (N,), cross (N/2,) or (0,)) in two launches."""
    n_rows, (pointers, numbers, flags, n_chunks) = pred.shape[0], arguments(pred, source, ref_pred, cross)
    partial = torch.empty(3, n_rows, n_chunks, dtype=torch.float32, device=pred.device)
    reward, error = (torch.empty(n_rows, dtype=torch.float32, device=pred.device) for _ in range(2))
    inner = torch.empty(n_rows // 2 if cross else 0, dtype=torch.float32, device=pred.device)
    chosen = {"HAS_REF": ref_pred is not None, "CROSS": cross}
    kernels._implicit_reward_chunk_kernel[(n_rows * n_chunks,)](
        *pointers, partial, n_rows, n_chunks, *numbers, **chosen, **flags
    )
    kernels._implicit_reward_row_kernel[(n_rows,)](
        partial,
        partial if ref_error is None else ref_error,
        reward,
        error,
        inner,
        n_rows,
        n_chunks,
        numbers[0],
        0 if ref_error is None else ref_error.stride(0),
        **chosen,
        HAS_REF_ERROR=ref_error is not None,
        BLOCK_CHUNKS=block_chunks(n_chunks),
    )
    return reward, error, inner


def launch_backward(grad: Tensor, factor: Tensor | None, pred: Tensor, source: Source) -> Tensor:
    """-2/(C*H*W) * (pred - target) * grad * factor in one launch; in pred's dtype and memory order."""
    grad_pred = torch.empty_like(pred)
    pointers, numbers, flags, n_chunks = arguments(pred, source, grad_pred)
    kernels._implicit_reward_bwd_kernel[(pred.shape[0] * n_chunks,)](
        *pointers,
        grad,
        grad if factor is None else factor,
        n_chunks,
        grad.stride(0),
        *numbers,
        HAS_FACTOR=factor is not None,
        **flags,
    )
    return grad_pred
