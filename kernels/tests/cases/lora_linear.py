"""`lora_linear`: half types, both tiles, forward with and without bias, backward."""

from __future__ import annotations

from fastpref_kernels.lora_linear import _BLOCK_R, _TILES, _lora_matmul_kernel

from .case import KernelCase

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
