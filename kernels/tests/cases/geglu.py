"""`geglu`: every dtype and block."""

from __future__ import annotations

from fastpref_kernels.geglu import _BLOCKS, _geglu_bwd_kernel, _geglu_fwd_kernel

from .case import KernelCase

SIZES = {"row_stride": "i32", "n_columns": "i32"}


def cases() -> list[KernelCase]:
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for block in _BLOCKS:
            for kernel, short, names in (
                (_geglu_fwd_kernel, "fwd", ("hidden_ptr", "out_ptr")),
                (_geglu_bwd_kernel, "bwd", ("grad_ptr", "hidden_ptr", "grad_hidden_ptr")),
            ):
                pointers = {name: f"*{dtype}" for name in names}
                found.append(
                    KernelCase(
                        name=f"geglu_{short}[{dtype},{block}]",
                        kernel=kernel,
                        signature=pointers | SIZES,
                        constexprs={"BLOCK_SIZE": block},
                        aligned=(*pointers, *SIZES),
                        wide=tuple(pointers) if block == _BLOCKS[-1] else (),
                    )
                )
    return found
