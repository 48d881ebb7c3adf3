"""DPO's launch of `paired_preference_loss` and RPO's first; the others are cases of `rpo_loss`, `implicit_reward`."""

from __future__ import annotations

from gpu import plain
from gpu.plain import MILD_BETA, Inputs, noise, reward
from torch import Tensor
from torch.nn import functional as F

import fastpref_kernels as fp
from fastpref_kernels.implicit_reward.triton import block_chunks
from fastpref_kernels.paired_preference_loss.dpo import _paired_dpo_kernel, block_pairs
from fastpref_kernels.paired_preference_loss.triton import _paired_chunk_kernel
from fastpref_kernels.rpo_loss.embeddings import block as row_block

from .case import Fault, KernelCase, Row, Workload, on, tensor
from .implicit_reward import LARGE, LONG, SMALL, STAGES, STRIDED, TARGETS, launch


def case(target: str, ref: bool, parts: int, strided: bool, block: dict) -> KernelCase:
    """parts: of embeddings as `rpo_loss` prepares them, in fp32 where it is 2; 0 without embeddings."""
    own = {"ref_error_ptr": "*fp32", "partial_ptr": "*fp32"}
    own |= dict.fromkeys(("emb_w_ptr", "emb_l_ptr"), "*bf16" if parts == 1 else "*fp32")
    own |= {"parts_ptr": "*fp16" if parts else "*fp32", "scale_ptr": "*fp32"}
    numbers = (
        "n_pairs",
        "n_chunks",
        "dim",
        "padded",
        "ref_error_stride",
        "emb_w_row",
        "emb_w_d",
        "emb_l_row",
        "emb_l_d",
    )
    own |= dict.fromkeys(numbers, "i32")
    given = launch("bf16", "ref", own, target, strided, {"HAS_REF": ref, "HAS_REF_ERROR": not ref}, block)
    given["constexprs"] |= {"PARTS": parts, "BLOCK_D": row_block(768 if parts else 0)}
    if parts:  # dense rows: a stride of 1 is a constant of the compiled kernel
        given["constexprs"] |= {"emb_w_d": 1, "emb_l_d": 1}
        given["signature"] = {k: v for k, v in given["signature"].items() if k not in ("emb_w_d", "emb_l_d")}
    words = [target, *["ref"] * ref, *[f"rpo {parts}"] * (parts > 0), *["strided"] * strided, str(block["BLOCK_SIZE"])]
    return KernelCase(f"paired_preference_loss[{','.join(words)}]", _paired_chunk_kernel, **given)


def dpo(target: str, ref: bool, strided: bool, block: dict, chunks: int = 128) -> KernelCase:
    names = ("reward_ptr", "slope_ptr", "loss_ptr", "effective_ptr", "accuracy_ptr")
    own = STAGES | dict.fromkeys(names, "*fp32") | {"n_pairs": "i32", "n_chunks": "i32"}
    own |= {"beta": "fp32", "label_smoothing": "fp32", "ref_error_stride": "i32"}
    given = launch("bf16", "ref", own, target, strided, {"HAS_REF": ref, "HAS_REF_ERROR": not ref}, block)
    given["constexprs"] |= {"BLOCK_CHUNKS": block_chunks(chunks), "BLOCK": block_pairs(block["num_warps"])}
    words = [target, *["ref"] * ref, *["strided"] * strided, str(block["BLOCK_SIZE"]), *["many"] * (chunks > 128)]
    return KernelCase(f"paired_preference_loss_dpo[{','.join(words)}]", _paired_dpo_kernel, **given)


def _dpo_cases() -> list[KernelCase]:
    found = []
    for target in TARGETS:
        for ref in (False, True):
            found += [dpo(target, ref, block is STRIDED, block) for block in (SMALL, LARGE, STRIDED)]
            found += [dpo(target, ref, strided, block, 1024) for block, strided in LONG]
    return found


def cases() -> list[KernelCase]:
    return _dpo_cases() + [
        case(target, ref, parts, block is STRIDED, block)
        for target in TARGETS
        for ref in (False, True)
        for parts in (0, 1, 2)
        for block in (SMALL, LARGE, STRIDED)
        if block is LARGE or not parts
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
            "`dpo_loss` or `rpo_loss` of the implicit rewards of `[winners; losers]`; launches with the backward: 2 for"
            " DPO, 4 for RPO, 5 in groups of more than 128 pairs"
        ),
        "to `pred`",
        "as `implicit_reward`",
        "the same",
    ),
]

PAIRED = on("paired_preference_loss", "test_matches_oracle and float32 and outside")

DPO = on("paired_preference_loss", "worked_by_hand or last_program")
REWARDED = """        tl.store(reward_ptr + row, reward)
        if is_last(counter_ptr, n_rows):
"""
COUNTED = """        if is_last(counter_ptr, n_rows):
            tl.store(reward_ptr + row, reward)
"""

FAULTS = [
    Fault(
        "DPO before all rewards", "paired_preference_loss/dpo.py", "counter_ptr, n_rows)", "counter_ptr, n_pairs)", DPO
    ),
    Fault("a reward stored after counting in", "paired_preference_loss/dpo.py", REWARDED, COUNTED, DPO),
    Fault(
        "rows and all share a counter",
        "paired_preference_loss/dpo.py",
        "counter_ptr + 1 + row",
        "counter_ptr + row",
        DPO,
    ),
    Fault(
        "losers before winners", "paired_preference_loss/dpo.py", "(reward_ptr + n_pairs, 1)", "(reward_ptr, 1)", DPO
    ),
    Fault(
        "a counter too few",
        "paired_preference_loss/dpo.py",
        "counters(device, n_rows + 1)",
        "counters(device, n_rows)[:n_rows]",
        DPO,
    ),
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
        on("paired_preference_loss", "many_chunks_of_rpo"),
    ),
]
