"""The implicit reward of diffusion preference alignment.

    error_i  = mean over C*H*W of (pred_i - target_i)^2
    reward_i = mean over C*H*W of (ref_pred_i - target_i)^2 - error_i          or  ref_error_i - error_i

Shapes: pred, target, ref_pred (N, ...), ref_error (N,) -> reward (N,). Inputs fp16, bf16, fp32 or fp64, mixed at
will; they are upcast before the difference, and the sum and the result are fp32 (fp64 if pred is fp64).
The two squares are subtracted element by element, as (r - p)(r - t + p - t), before the sum: no digits are lost
between two nearly equal means, and the reward is exactly 0 where the policy equals the reference.
Bytes per element at 16 bits: forward 6 (4 with ref_error), backward 6 (two reads and one write); `cross` reads the
losers' two tensors once more.
The sum has two stages (chunks of a row, then the chunks) whose order is a function of C*H*W alone, without atomics:
a row's bits do not depend on the batch around it.
Source: Diffusion-DPO, arXiv 2311.12908, equation 14, with the mean in place of the sum.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_device, check_floating, check_like
from ._dispatch import jit, tl, triton, use_triton
from .cpu import implicit_reward as torch_path

_BLOCK = 1024
_MAX_CHUNKS = 256  # of a row: enough programs for a full GPU at two rows, few enough for one block in the second stage


class ImplicitReward(NamedTuple):
    reward: Tensor
    error: Tensor
    cross: Tensor | None


@jit
def _implicit_reward_chunk_kernel(
    pred_ptr,
    target_ptr,
    ref_ptr,
    partial_ptr,
    n_elements,
    n_rows,
    n_chunks,
    HAS_REF: tl.constexpr,
    CROSS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Stage one, a program per row and chunk: sums into partial (3, N, chunks), reward, error, cross."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    base = row * n_elements
    pair_rows = n_rows // 2
    loser_base = (row + pair_rows) * n_elements
    reward = tl.zeros((BLOCK_SIZE,), tl.float32)
    error = tl.zeros((BLOCK_SIZE,), tl.float32)
    cross = tl.zeros((BLOCK_SIZE,), tl.float32)
    for block in range(BLOCKS):
        offset = (chunk * BLOCKS + block).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = offset < n_elements
        p = tl.load(pred_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(target_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        delta = p - t
        error += delta * delta
        if HAS_REF:
            r = tl.load(ref_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
            reward += (r - p) * ((r - t) + delta)
        if CROSS:
            winner = mask & (row < pair_rows)
            p_l = tl.load(pred_ptr + loser_base + offset, mask=winner, other=0.0).to(tl.float32)
            t_l = tl.load(target_ptr + loser_base + offset, mask=winner, other=0.0).to(tl.float32)
            cross += delta * (p_l - t_l)
    place = partial_ptr + row * n_chunks + chunk
    plane = tl.cast(n_rows, tl.int64) * n_chunks
    tl.store(place, tl.sum(reward, axis=0))
    tl.store(place + plane, tl.sum(error, axis=0))
    tl.store(place + 2 * plane, tl.sum(cross, axis=0))


@jit
def _implicit_reward_row_kernel(
    partial_ptr,
    ref_error_ptr,
    out_ptr,
    n_elements,
    n_rows,
    n_chunks,
    HAS_REF: tl.constexpr,
    HAS_REF_ERROR: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Stage two, a program per row: out (3, N) holds reward, error, cross."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    mask = chunk < n_chunks
    place = partial_ptr + row * n_chunks + chunk
    plane = tl.cast(n_rows, tl.int64) * n_chunks
    scale = 1.0 / tl.cast(n_elements, tl.float32)
    error = tl.sum(tl.load(place + plane, mask=mask, other=0.0), axis=0) * scale
    if HAS_REF:
        reward = tl.sum(tl.load(place, mask=mask, other=0.0), axis=0) * scale
    elif HAS_REF_ERROR:
        reward = tl.load(ref_error_ptr + row).to(tl.float32) - error
    else:
        reward = -error
    tl.store(out_ptr + row, reward)
    tl.store(out_ptr + n_rows + row, error)
    cross = tl.sum(tl.load(place + 2 * plane, mask=mask, other=0.0), axis=0) * scale
    tl.store(out_ptr + 2 * tl.cast(n_rows, tl.int64) + row, cross)


@jit
def _implicit_reward_bwd_kernel(
    grad_ptr, pred_ptr, target_ptr, grad_pred_ptr, n_elements, BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """grad_pred = -2/(C*H*W) * (pred - target) * grad, a program per row and chunk."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    base = row * n_elements
    scale = tl.load(grad_ptr + row).to(tl.float32) * (-2.0 / tl.cast(n_elements, tl.float32))
    for block in range(BLOCKS):
        offset = (chunk * BLOCKS + block).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        mask = offset < n_elements
        p = tl.load(pred_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(target_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_pred_ptr + base + offset, (scale * (p - t)).to(grad_pred_ptr.dtype.element_ty), mask=mask)


def _chunks(n_elements: int) -> tuple[int, int]:
    """(chunks of a row, blocks of a chunk)."""
    blocks = -(-n_elements // _BLOCK)
    blocks_per_chunk = -(-blocks // _MAX_CHUNKS)
    return -(-blocks // blocks_per_chunk), blocks_per_chunk


def _launch_forward(
    pred: Tensor, target: Tensor, ref_pred: Tensor | None, ref_error: Tensor | None, cross: bool
) -> tuple[Tensor, Tensor, Tensor]:
    pred, target = pred.contiguous(), target.contiguous()
    n_rows, n_elements = pred.shape[0], pred[0].numel()
    n_chunks, blocks = _chunks(n_elements)
    partial = torch.empty(3, n_rows, n_chunks, dtype=torch.float32, device=pred.device)
    out = torch.empty(3, n_rows, dtype=torch.float32, device=pred.device)
    _implicit_reward_chunk_kernel[(n_rows, n_chunks)](
        pred,
        target,
        pred if ref_pred is None else ref_pred.contiguous(),
        partial,
        n_elements,
        n_rows,
        n_chunks,
        HAS_REF=ref_pred is not None,
        CROSS=cross,
        BLOCKS=blocks,
        BLOCK_SIZE=_BLOCK,
    )
    _implicit_reward_row_kernel[(n_rows,)](
        partial,
        partial if ref_error is None else ref_error.contiguous(),
        out,
        n_elements,
        n_rows,
        n_chunks,
        HAS_REF=ref_pred is not None,
        HAS_REF_ERROR=ref_error is not None,
        BLOCK_CHUNKS=triton.next_power_of_2(n_chunks),
    )
    # an output of a custom op may not be a view of another
    return out[0].clone(), out[1].clone(), out[2, : n_rows // 2 if cross else 0].clone()


def _launch_backward(grad: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    pred, target, grad = pred.contiguous(), target.contiguous(), grad.contiguous()
    n_rows, n_elements = pred.shape[0], pred[0].numel()
    n_chunks, blocks = _chunks(n_elements)
    grad_pred = torch.empty_like(pred)
    _implicit_reward_bwd_kernel[(n_rows, n_chunks)](
        grad, pred, target, grad_pred, n_elements, BLOCKS=blocks, BLOCK_SIZE=_BLOCK
    )
    return grad_pred


@torch.library.custom_op(
    "fastpref_kernels::implicit_reward",
    mutates_args=(),
    schema="(Tensor pred, Tensor target, Tensor? ref_pred, Tensor? ref_error, bool cross) -> (Tensor, Tensor, Tensor)",
)
def _implicit_reward(
    pred: Tensor, target: Tensor, ref_pred: Tensor | None, ref_error: Tensor | None, cross: bool
) -> tuple[Tensor, Tensor, Tensor]:
    path = _launch_forward if use_triton(pred) else torch_path.forward
    return path(pred, target, ref_pred, ref_error, cross)


@_implicit_reward.register_fake
def _(pred, target, ref_pred, ref_error, cross):
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    rows = pred.shape[0]
    return tuple(pred.new_empty(size, dtype=dtype) for size in (rows, rows, rows // 2 if cross else 0))


@torch.library.custom_op(
    "fastpref_kernels::implicit_reward_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor pred, Tensor target) -> Tensor",
)
def _implicit_reward_backward(grad: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    path = _launch_backward if use_triton(pred) else torch_path.backward
    return path(grad, pred, target)


@_implicit_reward_backward.register_fake
def _(grad, pred, target):
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _backward(ctx: Any, grad_reward: Tensor, grad_error: Tensor, grad_cross: Tensor) -> tuple[Tensor | None, ...]:
    return _implicit_reward_backward(grad_reward, *ctx.saved_tensors), None, None, None, None


_implicit_reward.register_autograd(_backward, setup_context=_setup_context)


def _check(pred: Tensor, target: Tensor, ref_pred: Tensor | None, ref_error: Tensor | None, cross: bool) -> None:
    op = "implicit_reward"
    check_floating(op, "pred", pred)
    if pred.dim() < 2:
        raise ValueError(f"{op}: pred must be (N, ...), got shape {tuple(pred.shape)}")
    if pred.numel() == 0:
        raise ValueError(f"{op}: pred is empty, shape {tuple(pred.shape)}")
    check_like(op, "target", target, "pred", pred)
    if ref_pred is not None and ref_error is not None:
        raise ValueError(f"{op}: give ref_pred or ref_error, not both")
    if ref_pred is not None:
        check_like(op, "ref_pred", ref_pred, "pred", pred)
    if ref_error is not None:
        check_floating(op, "ref_error", ref_error)
        check_device(op, "ref_error", ref_error, "pred", pred)
        if ref_error.shape != pred.shape[:1]:
            raise ValueError(f"{op}: ref_error must have shape ({pred.shape[0]},), got {tuple(ref_error.shape)}")
    if cross and pred.shape[0] % 2:
        raise ValueError(f"{op}: cross needs [winners; losers], an even number of rows, got {pred.shape[0]}")


def implicit_reward_parts(
    pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None = None,
    *,
    ref_error: Tensor | None = None,
    cross: bool = False,
) -> ImplicitReward:
    """The implicit reward with the policy's error and, on request, the pairs' cross term.

    Arguments and errors as `implicit_reward`; `cross=True` takes [winners; losers], an even number of rows.

    Returns `ImplicitReward(reward, error, cross)`, of which only `reward` back-propagates, to pred only:
    reward (N,); error (N,) = mean((pred - target)^2); cross (N/2,) = mean(delta_w * delta_l), where delta =
    pred - target and rows i and N/2 + i are a pair, or None. The cross term is the inner product in the safeguard of
    Diffusion-SDPO, arXiv 2511.03317.
    """
    _check(pred, target, ref_pred, ref_error, cross)
    detached = [None if x is None else x.detach() for x in (target, ref_pred, ref_error)]
    reward, error, inner = _implicit_reward(pred, *detached, cross)
    return ImplicitReward(reward, error.detach(), inner.detach() if cross else None)


def implicit_reward(
    pred: Tensor, target: Tensor, ref_pred: Tensor | None = None, *, ref_error: Tensor | None = None
) -> Tensor:
    """How much better the policy denoises each sample than the reference: err_ref - err_theta.

    pred, target, ref_pred: (N, ...) predictions and their common target (noise or velocity); fp16, bf16, fp32 or
        fp64, mixed at will. On a GPU one that is not contiguous is copied first.
    ref_error: (N,) the reference's mean squared error, in place of ref_pred; with neither, err_ref = 0.

    Returns (N,) fp32, fp64 if pred is fp64; NaN in a row gives NaN for that row. The gradient goes to pred only, in
    pred's dtype, and is contiguous.
    Raises ValueError for an empty batch and for a shape, dtype or device that does not fit.
    Source: Diffusion-DPO, arXiv 2311.12908, equation 14.
    """
    return implicit_reward_parts(pred, target, ref_pred, ref_error=ref_error).reward
