"""The similarity-weighted contrastive loss of Diffusion-RPO, streamed over the contrast matrix.

    u_ij     = beta/2 * (reward_w_i - reward_l_j)
    omega_ij = softmax over j of cos(emb_w_i, emb_l_j) / temperature
    outside:  loss = -mean_i sum_j omega_ij * log sigmoid(u_ij)
    inside:   loss = -mean_ij log sigmoid(omega_ij * u_ij)
    uniform:  as outside, with omega_ij = 1 / number of losers of the row

Row i is contrasted with the losers of its own contrast group: consecutive blocks of `group_size` rows, or everything.
Shapes: reward_w (M,), reward_l (N,), emb_w (M, D), emb_l (N, D) -> scalar; in fp32 (fp64 if a reward is fp64).
Memory: O(M + N); no contrast matrix is stored. Three launches: the embeddings' norms; a row kernel with an online
softmax, which gives the loss and dL/dreward_w in one walk over the losers ("inside" in two); a column kernel that
recomputes the weights from the rows' maxima and sums, gives dL/dreward_l and takes the means. No float atomics.
Bytes: 2 * BLOCK * D embedding elements per tile of BLOCK x BLOCK contrasts, twice ("inside" three times); the backward
multiplies the stored gradients, 8 bytes per reward.
Rounding that the temperature multiplies: a cosine is off by delta, at most about 2 D u and usually 2 sqrt(D) u
(u = 2^-24 in fp32, the order of the sum is the BLAS kernel's or the tile's), so a weight is off by a factor of
exp(2 delta / temperature), and loss and gradients with it: at D = 1536 by 1e-4 at temperature 0.1, by a tenth at 1e-4,
where ties are broken by rounding. With fp64 rewards u is 2^-53 (CPU).
Source: Diffusion-RPO, arXiv 2406.06382; "inside" is the form of RPO for language models, arXiv 2402.10958."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_contrasts, check_positive
from ._dispatch import accumulation_dtype, use_triton
from ._operator import operator
from ._rpo_kernels import _inverse_norm_kernel, _rpo_column_kernel, _rpo_row_kernel
from .cpu.dpo_loss import share_won
from .cpu.rpo_loss import rpo_loss as torch_path
from .dpo_loss import PairwiseLoss, Rewards, chunk_block


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


def _accuracy(reward_w: Tensor, reward_l: Tensor) -> Tensor:
    """Share of pairs with reward_w > reward_l, a tie a half; of all contrasts if M != N, counted by sorting."""
    if reward_w.shape == reward_l.shape:
        return share_won(reward_w, reward_l)
    losers, winners = reward_l.sort().values, reward_w.contiguous()
    below, up_to = (torch.searchsorted(losers, winners, right=right) for right in (False, True))
    won = torch.where(reward_w.isnan(), 0, below + up_to).to(reward_w.dtype)
    return won.mean() / (2 * reward_l.shape[0])


@operator(
    "rpo_loss",
    "(Tensor reward_w, Tensor reward_l, Tensor? emb_w, Tensor? emb_l, float beta, float temperature, str weight,"
    " int groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    if weight == "uniform":
        emb_w = emb_l = None
    if use_triton(reward_w):
        grads = torch.empty_like(reward_w), torch.empty_like(reward_l)
        norm = None if emb_w is None or emb_l is None else launch_norms(emb_w, emb_l)
        similarity = Similarity(emb_w, emb_l, norm, temperature, weight, groups)
        scalars = launch(Rewards(reward_w[:, None]), Rewards(reward_l[:, None]), similarity, *grads, beta)[:3]
        return *scalars, *grads
    loss, effective, grad_w, grad_l = torch_path(reward_w, reward_l, emb_w, emb_l, beta, temperature, weight, groups)
    inside = reward_l.shape[0] // groups if weight == "inside" else 1
    count = reward_w.shape[0] * inside
    return loss.mean() / inside, effective.mean(), _accuracy(reward_w, reward_l), grad_w / count, grad_l / count


@_rpo_loss.register_fake
def _(reward_w, reward_l, emb_w, emb_l, beta, temperature, weight, groups):
    scalars = [reward_w.new_empty(()) for _ in range(3)]
    return *scalars, reward_w.new_empty(reward_w.shape), reward_l.new_empty(reward_l.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros, a launch each, for the outputs that nobody differentiates
    ctx.save_for_backward(output[3], output[4])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return None, None, None, None, None, None, None, None
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
