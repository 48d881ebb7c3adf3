"""`dpo_loss` of dense rewards."""

from __future__ import annotations

from gpu import plain
from gpu.plain import BETA
from torch.nn import functional as F

import fastpref_kernels as fp
from fastpref_kernels.dpo_loss.triton import BLOCK, _dpo_loss_kernel

from .case import Fault, KernelCase, Row, Workload, on, tensor


def cases() -> list[KernelCase]:
    pointers = ("reward_w_ptr", "reward_l_ptr", "loss_ptr", "effective_ptr", "accuracy_ptr", "grad_w_ptr", "grad_l_ptr")
    signature = dict.fromkeys(pointers, "*fp32") | {"n_pairs": "i32", "beta": "fp32", "label_smoothing": "fp32"}
    constants = {"w_stride": 1, "l_stride": 1, "BLOCK": BLOCK}
    return [KernelCase("dpo_loss", _dpo_loss_kernel, signature, constants, ("reward_w_ptr", "grad_w_ptr"))]


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
            forward=16,
            stated="Bytes per pair: forward 16",
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
        "16 a pair",
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
