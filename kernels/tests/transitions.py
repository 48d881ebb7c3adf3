"""Inputs of the tests of the ops on DDIM transitions."""

from __future__ import annotations

import torch
from coefficients import ddim
from reference import transition_loss as oracle
from reference.ddim_pool_step import ddim_step

from fastpref_kernels import derive_keys
from fastpref_kernels.common.dispatch import accumulation_dtype

ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
TIMES = torch.tensor([951, 501, 1]), torch.tensor([901, 451, 0])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def steps(t: torch.Tensor, t_prev: torch.Tensor, dtype: torch.dtype = torch.float32, **options: object) -> torch.Tensor:
    """Coefficients of DDIM steps as an op on tensors of dtype takes them."""
    return ddim(ALPHAS_CUMPROD, t, t_prev, **options).to(accumulation_dtype(dtype))


def same_step(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every row goes from 501 to 451."""
    return steps(torch.full((rows,), 501), torch.full((rows,), 451), dtype)


def pool_batch(shape: tuple[int, ...], dtype: torch.dtype, rows: int = 3) -> list[torch.Tensor]:
    """x_t, eps_cond, eps_uncond."""
    return [torch.randn(rows, *shape).to(dtype) for _ in range(3)]


def keys_for(rows: int, k: int) -> torch.Tensor:
    return derive_keys(0, 0, torch.arange(rows * k), 0, "sample").view(rows, k)


class TransitionBatch:
    """Transitions as in training: a reference close to the policy, x_w and x_l drawn from the reference."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        pairs: int = 3,
        stacked: bool = False,
        with_guidance: bool = True,
        change: float = 0.05,
    ) -> None:
        rows = 2 * pairs if stacked else pairs
        self.stacked, self.pairs = stacked, pairs
        self.t, self.t_prev = TIMES[0].repeat(pairs)[:pairs], TIMES[1].repeat(pairs)[:pairs]
        reference = torch.randn(2, rows, *shape)
        policy = reference + change * torch.randn(2, rows, *shape)
        self.x_t = torch.randn(rows, *shape).to(dtype)
        self.policy: list[torch.Tensor | None] = list(policy.to(dtype))
        self.reference: list[torch.Tensor | None] = list(reference.to(dtype))
        times = (x.repeat(rows // pairs) for x in (self.t, self.t_prev))
        mean, sigma, _ = ddim_step(self.x_t, self.reference[0], ALPHAS_CUMPROD, *times, 1.0)
        ends = [mean[: self.pairs], mean[-self.pairs :]]
        spread = [sigma[: self.pairs], sigma[-self.pairs :]]
        self.x_w, self.x_l = ((m + s * torch.randn_like(m)).to(dtype) for m, s in zip(ends, spread, strict=True))
        if not with_guidance:
            self.policy[1] = self.reference[1] = None

    def arguments(self, **process: object) -> tuple:
        step = steps(self.t, self.t_prev, self.policy[0].dtype, **process)
        return *self.policy, *self.reference, self.x_t, self.x_w, self.x_l, step

    def require_grad(self) -> list[torch.Tensor]:
        return [x.requires_grad_() for x in self.policy if x is not None]

    def exact(self, **settings: object) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """(leaves, (loss, ratio_w, ratio_l)) of the oracle, from separate predictions for winners and losers."""
        leaves = [None if x is None else x.detach().double().requires_grad_() for x in self.policy]

        def side(group: list, part: slice) -> tuple:
            return tuple(None if x is None else x[part] for x in group)

        w, lose = slice(0, self.pairs), slice(-self.pairs, None)
        found = oracle.transition_loss(
            side(leaves, w),
            side(leaves, lose),
            side(self.reference, w),
            side(self.reference, lose),
            (self.x_w, self.x_l),
            (self.x_t[w], self.x_t[lose]),
            oracle.Settings(ALPHAS_CUMPROD, self.t, self.t_prev, **settings),
        )
        return [x for x in leaves if x is not None], found
