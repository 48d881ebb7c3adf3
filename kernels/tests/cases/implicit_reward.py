"""`implicit_reward`: dense rows by dtype, target, reference and block; strided rows and the cross term at bf16."""

from __future__ import annotations

from typing import Any

import torch
from gpu import plain
from gpu.plain import Inputs
from torch import Tensor

import fastpref_kernels as fp
from fastpref_kernels.implicit_reward import triton as kernels

from .case import BF16, Fault, KernelCase, Row, Workload, on, tensor

GEOMETRY = ("n_elements", "chunk_size", "size_1", "size_2")
TARGETS = {
    "tensor": {"KEYED": False, "VELOCITY": False},
    "noise": {"KEYED": True, "VELOCITY": False},
    "velocity": {"KEYED": True, "VELOCITY": True},
}
STAGES = {"ref_error_ptr": "*fp32", "partial_ptr": "*fp32", "counter_ptr": "*i32"}  # of a sum in two stages
SMALL, LARGE, STRIDED = kernels.block(256, False), kernels.block(1024, False), kernels.block(1024, True)


LONG = ((LARGE, False), (STRIDED, True))  # blocks of rows of more than 128 chunks


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
        "p_ptr": "*fp32",
        "q_ptr": "*fp32",
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


def forward(
    dtype: str, target: str, ref: bool, cross: bool, strided: bool, block: dict, chunks: int = 128
) -> KernelCase:
    """Without `ref` with the reference's stored error or without anything, by turns."""
    words = [dtype, target, *["ref"] * ref, *["cross"] * cross, *["strided"] * strided]
    words += [str(block["BLOCK_SIZE"]), *["many"] * (chunks > 128)]
    names = ("reward_ptr", "error_ptr", "cross_ptr")
    own = STAGES | dict.fromkeys(names, "*fp32") | dict.fromkeys(("n_rows", "n_chunks", "ref_error_stride"), "i32")
    flags = {"HAS_REF": ref, "HAS_REF_ERROR": not ref and not cross, "CROSS": cross}
    given = launch(dtype, "ref", own, target, strided, flags, block)
    given["constexprs"] |= {"BLOCK_CHUNKS": kernels.block_chunks(chunks)}
    return KernelCase(f"implicit_reward_fwd[{','.join(words)}]", kernels._implicit_reward_fwd_kernel, **given)


def backward(dtype: str, target: str, factor: bool, strided: bool, block: dict) -> KernelCase:
    own = {"grad_ptr": "*fp32", "factor_ptr": "*fp32", "n_chunks": "i32", "grad_stride": "i32"}
    words = [dtype, target, *["factor"] * factor, *["strided"] * strided, str(block["BLOCK_SIZE"])]
    return KernelCase(
        f"implicit_reward_bwd[{','.join(words)}]",
        kernels._implicit_reward_bwd_kernel,
        **launch(dtype, "out", own, target, strided, {"HAS_FACTOR": factor}, block),
    )


def cases() -> list[KernelCase]:
    found = []
    for target in TARGETS:
        for ref in (False, True):
            found += [forward("bf16", target, ref, False, False, block) for block in (SMALL, LARGE)]
            found += [forward("bf16", target, ref, False, strided, b, 1024) for b, strided in LONG]
            found += [forward("bf16", target, ref, True, False, SMALL, 1024)]
            found += [forward("bf16", target, ref, True, False, SMALL)]
            found += [forward("bf16", target, ref, cross, True, STRIDED) for cross in (False, True)]
        for factor in (False, True):
            found += [backward("bf16", target, factor, False, block) for block in (SMALL, LARGE)]
            found += [backward("bf16", target, factor, True, STRIDED)]
        for dtype in ("fp16", "fp32"):
            found += [forward(dtype, target, True, False, False, LARGE), backward(dtype, target, False, False, LARGE)]
    return found


def _op_reward(i: Inputs, target: Any) -> tuple[Tensor, ...]:
    return (fp.implicit_reward(i["pred"], target, ref_pred=i.get("ref_pred"), ref_error=i.get("ref_error")),)


def _kept(i: Inputs) -> Any:
    return fp.KeyedVelocity(i["keys"], i["x0"], i["p"], i["q"])


def workloads() -> list[Workload]:
    found = []
    for variant, more, forward in (("ref_pred", {}, (6, 4, 6)), ("ref_error", {"ref_error": plain.errors}, (4, 2, 4))):
        names = ("pred", "ref_pred") if variant == "ref_pred" else ("pred",)
        common = {"op": "implicit_reward", "wrt": ("pred",), "shape": (1, 4, 64, 128)}
        velocity = {"keys": plain.keys, "p": plain.signal, "q": plain.minus_sigma}
        found += [
            Workload(
                variant=f"tensor,{variant}",
                make=plain.latents(*names, "target", **more),
                run=lambda i: _op_reward(i, i["target"]),
                eager=lambda i: plain.reward(i, i["target"]),
                forward=forward[0],
                backward=6,
                stated="target tensor   6 (4)   6",
                **common,
            ),
            Workload(
                variant=f"noise,{variant}",
                make=plain.latents(*names, keys=plain.keys, **more),
                run=lambda i: _op_reward(i, fp.KeyedNoise(i["keys"])),
                eager=lambda i: plain.reward(i, plain.noise(i, i["pred"])),
                forward=forward[1],
                backward=4,
                stated="KeyedNoise   4 (2)   4",
                **common,
            ),
            Workload(
                variant=f"velocity,{variant}",
                make=plain.latents(*names, "x0", **velocity, **more),
                run=lambda i: _op_reward(i, _kept(i)),
                eager=lambda i: plain.reward(i, plain.velocity(i["x0"], plain.noise(i, i["x0"]), i)),
                forward=forward[2],
                backward=6,
                stated="KeyedVelocity   6 (4)   6",
                **common,
            ),
        ]
    return found


def samples() -> dict[str, tuple]:
    keys, p = torch.arange(4), torch.tensor([1.0, 0.9, 0.5, 0.0])
    return {
        "implicit_reward": (tensor(4, 3, 5, grad=True), tensor(4, 3, 5), *[None] * 3, tensor(4, 3, 5), None, True),
        "implicit_reward[noise]": (tensor(4, 6, grad=True, dtype=BF16), None, keys, *[None] * 3, tensor(4), False),
        "implicit_reward[velocity]": (
            *(tensor(4, 6, grad=True), tensor(4, 6), keys, p, p - 1),
            *(None, tensor(4), False),
        ),
        "implicit_reward_backward": (tensor(4), torch.tensor(2.0), tensor(4, 6, dtype=BF16), tensor(4, 6), *[None] * 3),
        "implicit_reward_backward[noise]": (tensor(4), None, tensor(4, 6, dtype=BF16), None, keys, None, None),
    }


ROWS = [
    Row(
        "`implicit_reward(pred, target, *, ref_pred=None, ref_error=None)`",
        ("`mean((ref_pred - target)^2) - mean((pred - target)^2)` per row, exactly 0 where pred equals ref_pred"),
        "to `pred`",
        "6; 4 with `ref_error`",
        "6",
    ),
    Row(
        "the same with `target=KeyedNoise(keys)`",
        "target is `keyed_noise(keys, ...)`, recomputed in registers",
        "to `pred`",
        "4; 2 with `ref_error`",
        "4",
    ),
    Row(
        "the same with `target=KeyedVelocity(keys, x0, p, q)`",
        "target is `p noise + q x0`, with coefficients by row: v, flow",
        "to `pred`",
        "6; 4 with `ref_error`",
        "6",
    ),
    Row(
        "`implicit_reward_parts(..., cross=False)`",
        "also `mean((pred - target)^2)` and, per pair, `mean(delta_w * delta_l)`",
        "through `reward` only",
        "the losers once more with `cross`",
        "the same",
    ),
]

REWARD = on("implicit_reward", "worked_by_hand or parts_match or (test_matches_oracle and float32 and 19)")
SMALL_REWARD = on("implicit_reward", "test_matches_oracle and float32")
MEMORY_ORDER = on("implicit_reward", "memory_order")
WORKLOADS = ("test_workloads.py", "-k", "test_kernels_equal_eager_float64 and implicit_reward and noise")

LAST = on("implicit_reward", "last_program")
STORED = """    store_sums(sums, partial_ptr, program, tl.cast(n_rows, tl.int64) * n_chunks, HAS_REF, CROSS)
    if is_last(counter_ptr + row, n_chunks):
"""
COUNTED = """    if is_last(counter_ptr + row, n_chunks):
        store_sums(sums, partial_ptr, program, tl.cast(n_rows, tl.int64) * n_chunks, HAS_REF, CROSS)
"""

FAULTS = [
    Fault(
        "sign of a difference",
        "implicit_reward/triton.py",
        "(r - p) * ((r - t) + delta)",
        "(p - r) * ((r - t) + delta)",
        REWARD,
    ),
    Fault("a term subtracted", "implicit_reward/triton.py", "((r - t) + delta)", "((r - t) - delta)", REWARD),
    Fault("error not squared", "implicit_reward/triton.py", "error += delta * delta", "error += tl.abs(delta)", REWARD),
    Fault(
        "mask one too wide",
        "implicit_reward/triton.py",
        "mask = (offset < n_elements) & (offset < start + chunk_size)  # not",
        "mask = (offset <= n_elements) & (offset < start + chunk_size)  # not",
        SMALL_REWARD,
    ),
    Fault(
        "chunks overlap",
        "implicit_reward/triton.py",
        "& (offset < start + chunk_size)  # not a minimum",
        "# not a minimum",
        on("implicit_reward", "parts_match or many_chunks"),
    ),
    Fault("loser is the winner", "implicit_reward/triton.py", "tl.where(is_winner, row + n_pairs, row)", "row", REWARD),
    Fault(
        "a plane of the partial sums",
        "implicit_reward/triton.py",
        "tl.store(partial_ptr + plane + program, sums[1])",
        "tl.store(partial_ptr + program, sums[1])",
        REWARD,
    ),
    Fault(
        "second stage drops a chunk",
        "implicit_reward/triton.py",
        "mask = chunk < n_chunks\n",
        "mask = chunk < tl.maximum(n_chunks - 1, 1)\n",
        on("implicit_reward", "parts_match"),
    ),
    Fault(
        "counters stay as they are",
        "common/last.py",
        "tl.store(counter_ptr, 0)",
        "tl.store(counter_ptr, programs)",
        LAST,
    ),
    Fault("the last program but one adds up", "common/last.py", "programs - 1", "programs - 2", LAST),
    Fault("the first program adds up", "common/last.py", "== programs - 1", "== 0", LAST),
    Fault("counting in orders nothing", "common/last.py", 'sem="acq_rel"', 'sem="relaxed"', LAST),
    Fault("counting in publishes nothing", "common/last.py", 'sem="acq_rel"', 'sem="acquire"', LAST),
    Fault("sums stored after counting in", "implicit_reward/triton.py", STORED, COUNTED, LAST),
    Fault(
        "a counter for all rows",
        "implicit_reward/triton.py",
        "is_last(counter_ptr + row,",
        "is_last(counter_ptr,",
        LAST,
    ),
    Fault(
        "sign of reference and policy",
        "implicit_reward/triton.py",
        ".to(tl.float32) - error",
        ".to(tl.float32) + error",
        SMALL_REWARD,
    ),
    Fault(
        "missing factor 2",
        "implicit_reward/triton.py",
        "(-2.0 / tl.cast(n_elements",
        "(-1.0 / tl.cast(n_elements",
        REWARD,
    ),
    Fault(
        "gradient of the wrong row",
        "implicit_reward/triton.py",
        "tl.load(grad_ptr + row * grad_stride)",
        "tl.load(grad_ptr)",
        REWARD,
    ),
    Fault("stride of the middle dimension", "common/strides.py", "* strides[2]", "* strides[1]", MEMORY_ORDER),
    Fault(
        "64-bit row offset",
        "common/strides.py",
        "start = row * strides[0]",
        "start = (row * strides[0]).to(tl.int32)",
        on("keyed_targets", "two_to_the_31"),
    ),
    Fault(
        "noise of the next block",
        "implicit_reward/targets.py",
        "first // 4, BLOCK_SIZE // 4",
        "first // 4 + 1, BLOCK_SIZE // 4",
        WORKLOADS,
    ),
    Fault(
        "coefficients swapped",
        "implicit_reward/targets.py",
        "of_row[1] * noise + of_row[2] * x0",
        "of_row[2] * noise + of_row[1] * x0",
        ("test_workloads.py", "-k", "test_kernels_equal_eager_float64 and velocity"),
    ),
]
