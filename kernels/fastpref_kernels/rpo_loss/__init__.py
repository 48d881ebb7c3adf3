"""The similarity-weighted contrastive loss of Diffusion-RPO, streamed over the contrast matrix.

    u_ij     = beta/2 * (reward_w_i - reward_l_j)
    omega_ij = softmax over j of cos(emb_w_i, emb_l_j) / temperature
    outside:  loss = -mean_i sum_j omega_ij * log sigmoid(u_ij)
    inside:   loss = -mean_ij log sigmoid(omega_ij * u_ij)
    uniform:  as outside, with omega_ij = 1 / number of losers of the row

Row i is contrasted with the losers of its own contrast group: consecutive blocks of `group_size` rows, or everything.
Shapes: reward_w (M,), reward_l (N,), emb_w (M, D), emb_l (N, D) -> scalar; in fp32 (fp64 if a reward is fp64).
Memory: O(M + N); no contrast matrix is stored. Scratch, with D padded to a multiple of 64: the embeddings in fp16, 2 D
bytes a row for half inputs and 4 D for fp32; 16 bytes a winner and 4 a loser for each of at most 32 strips.
Launches: the embeddings' parts and scales; the softmax of the rows; losses and slopes of rows and columns; their sums.
Up to 128 losers a group, and for "uniform", there is no softmax launch. No float atomics.
Bytes: (BLOCK_M + BLOCK_N) * D * parts fp16 elements per tile and walk, of which there are two, or one without a
softmax launch, none for "uniform"; the backward multiplies the stored gradients, 8 bytes per reward.
Products: half inputs are one fp16 part, exact but for what is 2^-38 of a row's largest element; fp32 is two, of 22 bits
together, and three products on tensor cores with fp32 sums, of which the large one has a sum of its own.
Predicted for an H200 and never measured, D = 256, bf16 | fp32: 21 | 28 us at M = N = 1,024, 0.12 to 0.18 | 0.23 to 0.35
ms at 4,096, 1.7 to 2.7 | 3.5 to 5.4 ms at 16,384. Of 36 bytes a contrast and part from the L2 cache at 5.6 TB/s, 50
instructions a contrast, D multiplications a walk (3 D in fp32) at 60 % of the dense fp16 rate, all overlapped to none;
and 3 us a launch.
Rounding that the temperature multiplies: a cosine is off by delta, at most about 2 D u and usually 2 sqrt(D) u
(u = 2^-24 in fp32, the order of the sum is the BLAS kernel's or the tile's; two parts add at most 8 u, and tensor cores
that truncate each step of 8 elements D / 4 u), so a weight is off by a factor of
exp(2 delta / temperature), and loss and gradients with it: at D = 1536 by 1e-4 at temperature 0.1, by a tenth at 1e-4,
where ties are broken by rounding. With fp64 rewards u is 2^-53 (CPU).
Source: Diffusion-RPO, arXiv 2406.06382; "inside" is the form of RPO for language models, arXiv 2402.10958."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from torch import Tensor, empty_like, promote_types

from ..common.checks import Weight, check_beta, check_contrasts, check_positive
from ..common.dispatch import accumulation_dtype, use_triton
from ..common.operator import operator
from ..common.pairwise import PairwiseLoss, Rewards, register_stored_gradients, times_beta
from .embeddings import launch_prepare
from .torch import accuracy
from .torch import rpo_loss as torch_path
from .triton import Similarity, launch


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
        grads = empty_like(reward_w), empty_like(reward_l)
        prepared = None if emb_w is None or emb_l is None else launch_prepare(emb_w, emb_l)
        similarity = Similarity(prepared, temperature, weight, groups)
        scalars = launch(Rewards(reward_w[:, None]), Rewards(reward_l[:, None]), similarity, *grads, beta)[:3]
        return *scalars, *grads
    loss, effective, grad_w, grad_l = torch_path(reward_w, reward_l, emb_w, emb_l, beta, temperature, weight, groups)
    inside = reward_l.shape[0] // groups if weight == "inside" else 1
    count = reward_w.shape[0] * inside
    return loss.mean() / inside, effective.mean(), accuracy(reward_w, reward_l), grad_w / count, grad_l / count


@_rpo_loss.register_fake
def _(reward_w, reward_l, emb_w, emb_l, beta, temperature, weight, groups):
    scalars = [reward_w.new_empty(()) for _ in range(3)]
    return *scalars, reward_w.new_empty(reward_w.shape), reward_l.new_empty(reward_l.shape)


register_stored_gradients(_rpo_loss, first=3, n_inputs=8)


def rpo_loss(
    reward_w: Tensor,
    reward_l: Tensor,
    emb_w: Tensor | None,
    emb_l: Tensor | None,
    *,
    beta: float | Tensor,
    temperature: float,
    weight: Weight = "outside",
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
    check_beta("rpo_loss", beta)
    check_positive("rpo_loss", "temperature", temperature)
    dtype = accumulation_dtype(promote_types(reward_w.dtype, reward_l.dtype))
    groups = 1 if group_size is None else reward_w.shape[0] // group_size
    embeddings = (None, None) if emb_w is None or emb_l is None else (emb_w.detach(), emb_l.detach())
    *rewards, beta = times_beta(reward_w.to(dtype), reward_l.to(dtype), beta)
    loss, effective, accuracy, _, _ = _rpo_loss(*rewards, *embeddings, beta, float(temperature), weight, groups)
    return PairwiseLoss(loss, effective.detach(), accuracy.detach())
