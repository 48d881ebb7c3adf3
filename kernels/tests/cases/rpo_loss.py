"""`rpo_loss`: each weight, with rewards from memory (M = N and M != N) or from chunks, as `paired_preference_loss`."""

from __future__ import annotations

import torch
from gpu import plain
from gpu.plain import BETA, TEMPERATURE, Inputs
from torch import Tensor
from torch.nn import functional as F

import fastpref_kernels as fp
from fastpref_kernels.rpo_loss import triton as kernels

from .case import Fault, KernelCase, Row, Workload, on, tensor

ALIGNED = ("emb_w_ptr", "emb_l_ptr", "norm_ptr", "reward_ptr", "state_ptr", "dim", "emb_w_row", "emb_l_row")


def common(kernel, pointers: tuple[str, ...], numbers: tuple[str, ...], weight: str, chunks: int, dtype: str) -> dict:
    """Everything of a case but its name; what is 1 in a launch is a constant of the compiled kernel."""
    flags = kernels.row_blocks(weight, chunks) if kernel is kernels._rpo_row_kernel else kernels.column_blocks(chunks)
    ones = ["emb_w_d", "emb_l_d"] + ["n_chunks", "w_stride", "l_stride"] * (chunks == 1)
    signature = {name: f"*{dtype}" if name.startswith("emb") else "*fp32" for name in pointers}
    signature |= dict.fromkeys(numbers, "i32")
    signature |= dict.fromkeys(("reward_scale", "beta", "grad_scale", "temperature"), "fp32")
    constants = {name: 1 for name in ones if name in numbers}
    constants |= {"UNIFORM": weight == "uniform", "INSIDE": weight == "inside"}
    constants |= {name: flags[name] for name in ("BLOCK", "BLOCK_CHUNKS", "BLOCK_D")}
    return {
        "kernel": kernel,
        "signature": {name: kind for name, kind in signature.items() if name not in constants},
        "constexprs": constants,
        "aligned": ALIGNED,
        "num_warps": flags["num_warps"],
        "num_stages": flags["num_stages"],
    }


def row(weight: str, chunks: int, pairs: bool, dtype: str = "fp32") -> KernelCase:
    pointers = ("reward_w_ptr", "reward_l_ptr", "emb_w_ptr", "emb_l_ptr", "norm_ptr", "reward_ptr")
    numbers = ("n_winners", "rows", "columns", "dim", "n_chunks", "w_stride", "l_stride")
    strides = ("emb_w_row", "emb_w_d", "emb_l_row", "emb_l_d")
    case = common(
        kernels._rpo_row_kernel,
        (*pointers, "state_ptr", "grad_w_ptr"),
        (*numbers, *strides),
        weight,
        chunks,
        dtype,
    )
    case["constexprs"] |= {"PAIRS": pairs}
    words = [weight, dtype, *["chunks"] * (chunks > 1), *["pairs"] * pairs]
    return KernelCase(f"rpo_loss_rows[{','.join(words)}]", **case)


def column(weight: str, chunks: int, dtype: str = "fp32") -> KernelCase:
    pointers = ("reward_l_ptr", "emb_w_ptr", "emb_l_ptr", "norm_ptr", "reward_ptr", "state_ptr")
    numbers = ("n_winners", "rows", "columns", "dim", "n_chunks", "l_stride")
    strides = ("emb_w_row", "emb_w_d", "emb_l_row", "emb_l_d")
    case = common(
        kernels._rpo_column_kernel,
        (*pointers, "grad_l_ptr", "loss_ptr", "effective_ptr", "accuracy_ptr"),
        (*numbers, *strides),
        weight,
        chunks,
        dtype,
    )
    words = [weight, dtype, *["chunks"] * (chunks > 1)]
    return KernelCase(f"rpo_loss_columns[{','.join(words)}]", **case)


def norms(dtype: str, block: int) -> KernelCase:
    return KernelCase(
        f"rpo_loss_norms[{dtype},{block}]",
        kernels._inverse_norm_kernel,
        {
            **{"emb_w_ptr": f"*{dtype}", "emb_l_ptr": f"*{dtype}", "norm_ptr": "*fp32", "n_winners": "i32"},
            **{"w_row": "i32", "l_row": "i32", "dim": "i32"},
        },
        {"w_d": 1, "l_d": 1, "BLOCK_D": block},
        ("emb_w_ptr", "emb_l_ptr", "norm_ptr", "w_row", "l_row", "dim"),
    )


def cases() -> list[KernelCase]:
    found = []
    for weight in ("outside", "inside", "uniform"):
        found += [row(weight, 1, False), row(weight, 1, True), column(weight, 1)]
        found += [row(weight, 128, True), column(weight, 128)]
    found += [row("outside", 1, True, "bf16"), column("outside", 1, "bf16")]
    return found + [
        norms(dtype, block)
        for dtype in ("fp32", "bf16")
        for block in (kernels.norm_block(256), kernels.norm_block(768))
    ]


def pairwise(weight: str, i: Inputs) -> tuple[Tensor, ...]:
    u = BETA / 2 * (i["reward_w"][:, None] - i["reward_l"][None])
    similarity = F.normalize(i["emb_w"], dim=1, eps=1e-12) @ F.normalize(i["emb_l"], dim=1, eps=1e-12).T
    omega = torch.softmax(similarity / TEMPERATURE, 1)
    return (-(omega * F.logsigmoid(u)).sum(1).mean() if weight == "outside" else -F.logsigmoid(omega * u).mean(),)


def _rpo(i: Inputs, weight: str) -> tuple[Tensor, ...]:
    settings = {"beta": BETA, "temperature": TEMPERATURE, "weight": weight}
    return (fp.rpo_loss(i["reward_w"], i["reward_l"], i["emb_w"], i["emb_l"], **settings).loss,)


def workloads() -> list[Workload]:
    return [
        Workload(
            op="rpo_loss",
            variant=weight,
            make=plain.contrasts,
            run=lambda i, w=weight: _rpo(i, w),
            eager=lambda i, w=weight: pairwise(w, i),
            wrt=("reward_w", "reward_l"),
            shape=(65, 40),
        )
        for weight in ("outside", "inside")
    ]


def samples() -> dict[str, tuple]:
    rewards, embeddings = (tensor(4, grad=True), tensor(4, grad=True)), (tensor(4, 3), tensor(4, 3))
    return {
        "rpo_loss": (*rewards, *embeddings, 2.0, 0.5, "outside", 2),
        "rpo_loss[uniform]": (*rewards, None, None, 2.0, 0.5, "uniform", 1),
    }


ROWS = [
    Row(
        ('`rpo_loss(reward_w, reward_l, emb_w, emb_l, *, beta, temperature, weight="outside", group_size=None)`'),
        (
            "`-mean_i sum_j omega_ij log sigmoid(beta/2 (reward_w_i - reward_l_j))`, `omega_i = "
            "softmax_j(cos(emb_w_i, emb_l_j) / temperature)`"
        ),
        "to both rewards, none to the embeddings",
        "embeddings by tiles, O(M + N) memory",
        "8 a reward",
    ),
]

RPO_SIZES = on("rpo_loss", "test_matches_oracle and float32 and 33")
RPO = on("rpo_loss", "worked_by_hand or (test_contrast_groups and (12 or 36))")

FAULTS = [
    Fault(
        "epsilon of the norm",
        "rpo_loss/triton.py",
        "tl.sqrt(tl.sum(total, axis=0)), 1e-12)",
        "tl.sqrt(tl.sum(total, axis=0)), 1.0)",
        on("rpo_loss", "test_matches_oracle and float32 and 7"),
    ),
    Fault(
        "columns beyond the group",
        "rpo_loss/triton.py",
        "tl.where(mask_j[None, :], cosine * norm_w",
        "tl.where(mask_j[None, :] | True, cosine * norm_w",
        RPO_SIZES,
    ),
    Fault("older sums not rescaled", "rpo_loss/triton.py", "loss = factor * loss", "loss = loss", RPO),
    Fault(
        "online softmax rescaled the wrong way",
        "rpo_loss/triton.py",
        "tl.where(total > 0.0, maximum - higher, 0.0)",
        "tl.where(total > 0.0, higher - maximum, 0.0)",
        RPO,
    ),
    Fault("entropy without its shift", "rpo_loss/triton.py", "(moment + shift * total)", "moment", RPO),
    Fault(
        "group of the losers",
        "rpo_loss/triton.py",
        "j = _clamped(group, local_j, columns)\n        l = rewards_of",
        "j = _clamped(0, local_j, columns)\n        l = rewards_of",
        RPO,
    ),
    Fault(
        "slope of the columns",
        "rpo_loss/triton.py",
        "if INSIDE:\n            u = omega * u\n",
        "if not INSIDE:\n            u = omega * u\n",
        RPO,
    ),
    Fault("softmax sum not applied", "rpo_loss/triton.py", "            loss = loss / total\n", "", RPO),
]
