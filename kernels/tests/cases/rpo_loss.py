"""`rpo_loss`: each weight, with rewards from memory (M = N and M != N) or from chunks, as `paired_preference_loss`."""

from __future__ import annotations

from fastpref_kernels import _rpo_kernels as kernels
from fastpref_kernels.rpo_loss import column_blocks, norm_block, row_blocks

from .case import KernelCase

ALIGNED = ("emb_w_ptr", "emb_l_ptr", "norm_ptr", "reward_ptr", "state_ptr", "dim", "emb_w_row", "emb_l_row")


def common(kernel, pointers: tuple[str, ...], numbers: tuple[str, ...], weight: str, chunks: int, dtype: str) -> dict:
    """Everything of a case but its name; what is 1 in a launch is a constant of the compiled kernel."""
    flags = row_blocks(weight, chunks) if kernel is kernels._rpo_row_kernel else column_blocks(chunks)
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
    return found + [norms(dtype, block) for dtype in ("fp32", "bf16") for block in (norm_block(256), norm_block(768))]
