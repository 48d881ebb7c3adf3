"""`lora_linear`: half types, both tiles, forward with and without bias, backward."""

from __future__ import annotations

import torch
from gpu.plain import Inputs

import fastpref_kernels as fp
from fastpref_kernels.lora_linear.triton import _BLOCK_R, _TILES, _lora_matmul_kernel

from .case import BF16, Fault, KernelCase, Row, Workload, on, tensor

POINTERS = ("x_ptr", "weight_ptr", "low_ptr", "up_ptr", "bias_ptr", "out_ptr")
SIZES = ("n_rows", "n_columns", "n_inner", "rank", "row_stride")


def cases() -> list[KernelCase]:
    found = []
    for dtype in ("bf16", "fp16"):
        for tile, (block_m, block_n, block_k, warps) in _TILES.items():
            for variant, transposed, has_bias in (("bias", True, True), ("plain", True, False), ("dx", False, False)):
                flags = {"TRANSPOSED": transposed, "HAS_BIAS": has_bias, "BLOCK_R": _BLOCK_R}
                found.append(
                    KernelCase(
                        name=f"lora_matmul[{dtype},{tile},{variant}]",
                        kernel=_lora_matmul_kernel,
                        signature={name: f"*{dtype}" for name in POINTERS} | dict.fromkeys(SIZES, "i32"),
                        constexprs={**flags, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k},
                        aligned=(*POINTERS, *SIZES),
                        num_warps=warps,
                        wide=("x_ptr", "weight_ptr", "out_ptr"),
                        min_occupancy=0.125,  # a matrix product hides latency by its pipeline
                    )
                )
    return found


def lora(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    rows, inner, columns, rank = shape
    sizes = {"x": (rows, inner), "weight": (columns, inner), "lora_a": (rank, inner), "lora_b": (columns, rank)}
    return {name: (torch.randn(size, device=device) / inner**0.5).to(dtype) for name, size in sizes.items()}


def workloads() -> list[Workload]:
    return [
        Workload(
            op="lora_linear",
            variant="",
            make=lora,
            run=lambda i: (fp.lora_linear(i["x"], i["weight"], None, i["lora_a"], i["lora_b"], 0.5),),
            eager=lambda i: (i["x"] @ i["weight"].T + 0.5 * (i["x"] @ i["lora_a"].T) @ i["lora_b"].T,),
            wrt=("x", "lora_a", "lora_b"),
            shape=(96, 64, 128, 8),
        ),
    ]


def samples() -> dict[str, tuple]:
    loras = tensor(2, 6, grad=True), tensor(4, 2, grad=True)
    saved = tensor(3, 6), tensor(4, 6), tensor(2, 6), tensor(4, 2), tensor(3, 2)
    return {
        "lora_linear": (tensor(3, 2, 6, grad=True), tensor(4, 6), tensor(4), *loras, 0.5, False),
        "lora_linear[mixed]": (tensor(3, 6, dtype=BF16), tensor(4, 6, dtype=BF16), None, *loras, 0.5, False),
        "lora_linear_backward": (tensor(3, 4), *saved, 0.5, True, True, True),
    }


ROWS = [
    Row(
        "`lora_linear(x, weight, bias, lora_a, lora_b, scale, *, blas=False)`",
        "`x W^T + b + scale (x A^T) B^T`; by element of the output",
        "to `x`, `lora_a`, `lora_b`",
        "2 (6 with `blas`), and the operands",
        "the same",
    ),
]

LORA = on("lora_linear", "worked_by_hand or (test_matches_oracle and bfloat16)")

FAULTS = [
    Fault("rank not masked", "lora_linear/triton.py", "mask_r = r < rank", "mask_r = r < rank + 1", LORA),
    Fault(
        "bias on every block",
        "lora_linear/triton.py",
        "bias_ptr + column, mask=mask_n",
        "bias_ptr + column * 0, mask=mask_n",
        LORA,
    ),
]
