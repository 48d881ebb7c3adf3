"""`dpo_loss`: rewards from memory, or from chunks as `paired_preference_loss` has them."""

from __future__ import annotations

from gpu import plain
from gpu.plain import BETA
from torch.nn import functional as F

import fastpref_kernels as fp
from fastpref_kernels.dpo_loss.triton import _dpo_loss_kernel, blocks

from .case import Fault, KernelCase, Row, Workload, on, tensor


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


def workloads() -> list[Workload]:
    return [
        Workload(
            op="dpo_loss",
            variant="",
            make=plain.contrasts,
            run=lambda i: (fp.dpo_loss(i["reward_w"], i["reward_l"], beta=BETA).loss,),
            eager=lambda i: (-F.logsigmoid(BETA / 2 * (i["reward_w"] - i["reward_l"])).mean(),),
            wrt=("reward_w", "reward_l"),
            shape=(2048, 1),
            forward=24,
            stated="Bytes per pair: forward 24",
            elements=lambda shape: shape[0],
        ),
    ]


def samples() -> dict[str, tuple]:
    return {"dpo_loss": (tensor(4, grad=True), tensor(4, grad=True), 2.0, 0.1)}


ROWS = [
    Row(
        "`dpo_loss(reward_w, reward_l, *, beta, label_smoothing=0)`",
        "`-mean_i log sigmoid(beta/2 (reward_w_i - reward_l_i))`, smoothed as in conservative DPO",
        "to both rewards",
        "24 a pair",
        "16 a pair",
    ),
]

DPO = on("dpo_loss", "worked_by_hand or (test_matches_oracle and float32)")

FAULTS = [
    Fault(
        "winner and loser swapped",
        "dpo_loss/triton.py",
        "u = (w - l) * (0.5 * beta)",
        "u = (l - w) * (0.5 * beta)",
        DPO,
    ),
    Fault("a tie counts as lost", "common/pairwise.py", "tl.where(w == l, 0.5, 0.0)", "0.0", DPO),
    Fault("beta without its half", "dpo_loss/triton.py", "scale = 0.5 * beta /", "scale = beta /", DPO),
    Fault(
        "label smoothing forgotten",
        "dpo_loss/triton.py",
        "term = -(1.0 - label_smoothing) * kept",
        "term = -kept",
        DPO,
    ),
]
