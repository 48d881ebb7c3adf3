"""The first launch of `paired_preference_loss`; its others are cases of `dpo_loss`, `rpo_loss`, `implicit_reward`."""

from __future__ import annotations

from gpu import plain
from gpu.plain import MILD_BETA, Inputs, noise, reward
from torch import Tensor
from torch.nn import functional as F

import fastpref_kernels as fp
from fastpref_kernels.paired_preference_loss.triton import _paired_chunk_kernel
from fastpref_kernels.rpo_loss.triton import norm_block

from .case import Fault, KernelCase, Row, Workload, on, tensor
from .implicit_reward import LARGE, SMALL, STRIDED, TARGETS, launch


def case(target: str, ref: bool, embeddings: bool, strided: bool, block: dict) -> KernelCase:
    own = dict.fromkeys(("ref_error_ptr", "partial_ptr", "emb_w_ptr", "emb_l_ptr", "norm_ptr"), "*fp32")
    numbers = ("n_pairs", "n_chunks", "dim", "ref_error_stride", "emb_w_row", "emb_w_d", "emb_l_row", "emb_l_d")
    own |= dict.fromkeys(numbers, "i32")
    given = launch("bf16", "ref", own, target, strided, {"HAS_REF": ref, "HAS_REF_ERROR": not ref}, block)
    given["constexprs"] |= {"HAS_EMB": embeddings, "BLOCK_D": norm_block(768 if embeddings else 0)}
    if embeddings:  # dense rows: a stride of 1 is a constant of the compiled kernel
        given["constexprs"] |= {"emb_w_d": 1, "emb_l_d": 1}
        given["signature"] = {k: v for k, v in given["signature"].items() if k not in ("emb_w_d", "emb_l_d")}
    words = [target, *["ref"] * ref, *["rpo"] * embeddings, *["strided"] * strided, str(block["BLOCK_SIZE"])]
    return KernelCase(f"paired_preference_loss[{','.join(words)}]", _paired_chunk_kernel, **given)


def cases() -> list[KernelCase]:
    return [
        case(target, ref, embeddings, block is STRIDED, block)
        for target in TARGETS
        for ref in (False, True)
        for embeddings in (False, True)
        for block in (SMALL, LARGE, STRIDED)
        if block is LARGE or not embeddings
    ]


def paired(i: Inputs) -> tuple[Tensor, ...]:
    reward_w, reward_l = reward(i, noise(i, i["pred"]))[0].chunk(2)
    return (-F.logsigmoid(MILD_BETA / 2 * (reward_w - reward_l)).mean(),)


def _paired(i: Inputs) -> tuple[Tensor, ...]:
    return (fp.paired_preference_loss(i["pred"], fp.KeyedNoise(i["keys"]), ref_pred=i["ref_pred"], beta=MILD_BETA)[0],)


def workloads() -> list[Workload]:
    return [
        Workload(
            op="paired_preference_loss",
            variant="dpo,noise",
            make=plain.latents("pred", "ref_pred", keys=plain.keys),
            run=_paired,
            eager=paired,
            wrt=("pred",),
            shape=(4, 4, 64, 64),
        ),
    ]


def samples() -> dict[str, tuple]:
    latents, embeddings = (tensor(4, 6, grad=True), tensor(4, 6)), (tensor(2, 5), tensor(2, 5))
    rest = None, None, None, tensor(4, 6), None
    return {
        "paired_preference_loss": (*latents, *rest, None, None, 2.0, 0.1, 1.0, "dpo", 1),
        "paired_preference_loss[rpo]": (*latents, *rest, *embeddings, 2.0, 0.0, 0.5, "outside", 1),
    }


ROWS = [
    Row(
        '`paired_preference_loss(pred, target, *, beta, ref_pred=None, ref_error=None, kind="dpo", ...)`',
        (
            "`dpo_loss` or `rpo_loss` of the implicit rewards of `[winners; losers]`, at most 4 launches with the"
            " backward"
        ),
        "to `pred`",
        "as `implicit_reward`",
        "the same",
    ),
]

PAIRED = on("paired_preference_loss", "test_matches_oracle and float32")

FAULTS = [
    Fault(
        "chunks of the wrong row",
        "common/pairwise.py",
        "row.to(tl.int64)[:, None] * reward[1]",
        "(0 * row).to(tl.int64)[:, None] * reward[1]",
        PAIRED,
    ),
    Fault(
        "chunks of a row dropped",
        "common/pairwise.py",
        "for first in range(0, reward[2], BLOCK_CHUNKS):",
        "for first in range(0, BLOCK_CHUNKS, BLOCK_CHUNKS):",
        ("test_workloads.py", "-k", "test_kernels_equal_eager_float64 and paired"),
    ),
]
