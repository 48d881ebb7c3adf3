"""`implicit_reward`: dense rows by dtype, target, reference and block; strided rows and the cross term at bf16."""

from __future__ import annotations

from fastpref_kernels import _reward_kernels as kernels
from fastpref_kernels._reward_launch import block

from .case import KernelCase

GEOMETRY = ("n_elements", "chunk_size", "n_timesteps", "size_1", "size_2")
TARGETS = {
    "tensor": {"KEYED": False, "VELOCITY": False},
    "noise": {"KEYED": True, "VELOCITY": False},
    "velocity": {"KEYED": True, "VELOCITY": True},
}
SMALL, LARGE, STRIDED = block(256, False), block(1024, False), block(1024, True)


def integers(third: str) -> dict[str, str]:
    names = [*GEOMETRY, *(f"{x}_{part}" for x in ("pred", "target", third) for part in ("row", 0, 1, 2))]
    return dict.fromkeys(names, "i32")


def launch(dtype: str, third: str, own: dict[str, str], target: str, strided: bool, flags: dict, block: dict) -> dict:
    """Everything of a case but its kernel and its name, as `arguments` and the launchers give it."""
    pointers = {
        "pred_ptr": f"*{dtype}",
        "target_ptr": f"*{dtype}",
        f"{third}_ptr": f"*{dtype}",
        "keys_ptr": "*i64",
        "timesteps_ptr": "*i64",
        "alphas_ptr": "*fp32",
    }
    rows = ("n_elements", "chunk_size", "pred_row", "target_row", f"{third}_row")
    used = ["pred_ptr"] + ["target_ptr"] * (target != "noise") + [f"{third}_ptr"] * flags.get("HAS_REF", True)
    return {
        "signature": pointers | own | integers(third),
        "constexprs": {**flags, **TARGETS[target], "STRIDED": strided, "BLOCK_SIZE": block["BLOCK_SIZE"]},
        "aligned": (*pointers, *rows),
        "num_warps": block["num_warps"],
        "wide": () if strided else tuple(used),
    }


def forward(dtype: str, target: str, ref: bool, cross: bool, strided: bool, block: dict) -> KernelCase:
    own = {"partial_ptr": "*fp32", "n_rows": "i32", "n_chunks": "i32"}
    words = [dtype, target, *["ref"] * ref, *["cross"] * cross, *["strided"] * strided, str(block["BLOCK_SIZE"])]
    return KernelCase(
        f"implicit_reward_fwd[{','.join(words)}]",
        kernels._implicit_reward_chunk_kernel,
        **launch(dtype, "ref", own, target, strided, {"HAS_REF": ref, "CROSS": cross}, block),
    )


def backward(dtype: str, target: str, factor: bool, strided: bool, block: dict) -> KernelCase:
    own = {"grad_ptr": "*fp32", "factor_ptr": "*fp32", "n_chunks": "i32", "grad_stride": "i32"}
    words = [dtype, target, *["factor"] * factor, *["strided"] * strided, str(block["BLOCK_SIZE"])]
    return KernelCase(
        f"implicit_reward_bwd[{','.join(words)}]",
        kernels._implicit_reward_bwd_kernel,
        **launch(dtype, "out", own, target, strided, {"HAS_FACTOR": factor}, block),
    )


def second_stage(ref: bool, ref_error: bool, cross: bool, chunks: int) -> KernelCase:
    pointers = ("partial_ptr", "ref_error_ptr", "reward_ptr", "error_ptr", "cross_ptr")
    numbers = ("n_rows", "n_chunks", "n_elements", "ref_error_stride")
    words = [*["ref"] * ref, *["ref_error"] * ref_error, *["cross"] * cross, str(chunks)]
    return KernelCase(
        f"implicit_reward_rows[{','.join(words)}]",
        kernels._implicit_reward_row_kernel,
        dict.fromkeys(pointers, "*fp32") | dict.fromkeys(numbers, "i32"),
        {"HAS_REF": ref, "CROSS": cross, "HAS_REF_ERROR": ref_error, "BLOCK_CHUNKS": chunks},
        pointers,
    )


def cases() -> list[KernelCase]:
    found = []
    for target in TARGETS:
        for ref in (False, True):
            found += [forward("bf16", target, ref, False, False, block) for block in (SMALL, LARGE)]
            found += [forward("bf16", target, ref, True, False, SMALL)]
            found += [forward("bf16", target, ref, cross, True, STRIDED) for cross in (False, True)]
        for factor in (False, True):
            found += [backward("bf16", target, factor, False, block) for block in (SMALL, LARGE)]
            found += [backward("bf16", target, factor, True, STRIDED)]
        for dtype in ("fp16", "fp32"):
            found += [forward(dtype, target, True, False, False, LARGE), backward(dtype, target, False, False, LARGE)]
    for ref, ref_error in ((True, False), (False, True), (False, False)):
        found += [second_stage(ref, ref_error, cross, chunks) for cross in (False, True) for chunks in (128, 1024)]
    return found
