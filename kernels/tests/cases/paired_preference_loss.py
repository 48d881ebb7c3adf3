"""The first launch of `paired_preference_loss`; its others are cases of `dpo_loss`, `rpo_loss`, `implicit_reward`."""

from __future__ import annotations

from fastpref_kernels._paired_kernels import _paired_chunk_kernel
from fastpref_kernels.rpo_loss import norm_block

from .case import KernelCase
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
