"""`dpo_loss`: rewards from memory, or from chunks as `paired_preference_loss` has them."""

from __future__ import annotations

from fastpref_kernels._pairwise_kernels import _dpo_loss_kernel
from fastpref_kernels.dpo_loss import blocks

from .case import KernelCase


def case(chunks: int) -> KernelCase:
    pointers = ("reward_w_ptr", "reward_l_ptr", "reward_ptr", "loss_ptr", "effective_ptr")
    numbers = ("n_pairs", "n_chunks", "w_stride", "l_stride")
    signature = dict.fromkeys((*pointers, "accuracy_ptr", "grad_w_ptr", "grad_l_ptr"), "*fp32") | dict.fromkeys(
        numbers, "i32"
    )
    signature |= dict.fromkeys(("reward_scale", "beta", "label_smoothing"), "fp32")
    ones = {"n_chunks": 1, "w_stride": 1, "l_stride": 1} if chunks == 1 else {}
    return KernelCase(
        f"dpo_loss[{'chunks' if chunks > 1 else 'rewards'}]",
        _dpo_loss_kernel,
        {name: kind for name, kind in signature.items() if name not in ones},
        {**ones, **blocks(chunks)},
        ("reward_w_ptr", "reward_ptr", "grad_w_ptr"),
    )


def cases() -> list[KernelCase]:
    return [case(1), case(128)]
