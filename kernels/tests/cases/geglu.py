"""`geglu`: every dtype and tile."""

from __future__ import annotations

import torch
from torch.nn import functional as F

import fastpref_kernels as fp
from fastpref_kernels.geglu.triton import _TILES, _WARPS, _geglu_bwd_kernel, _geglu_fwd_kernel

from .case import BF16, Fault, KernelCase, Row, Workload, on, tensor

SIZES = {"n_rows": "i32", "row_stride": "i32", "n_columns": "i32"}


def cases() -> list[KernelCase]:
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for tile, (rows, columns) in _TILES.items():
            for kernel, short, names in (
                (_geglu_fwd_kernel, "fwd", ("hidden_ptr", "out_ptr")),
                (_geglu_bwd_kernel, "bwd", ("grad_ptr", "hidden_ptr", "grad_hidden_ptr")),
            ):
                pointers = {name: f"*{dtype}" for name in names}
                found.append(
                    KernelCase(
                        name=f"geglu_{short}[{dtype},{tile}]",
                        kernel=kernel,
                        signature=pointers | SIZES,
                        constexprs={"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns},
                        aligned=(*pointers, *SIZES),
                        num_warps=_WARPS,
                        wide=tuple(pointers),
                    )
                )
    return found


def workloads() -> list[Workload]:
    return [
        Workload(
            op="geglu",
            variant="",
            make=lambda shape, dtype, device: {"x": torch.randn(shape, device=device).to(dtype)},
            run=lambda i: (fp.geglu(i["x"]),),
            eager=lambda i: (torch.mul(i["x"].chunk(2, -1)[0], F.gelu(i["x"].chunk(2, -1)[1])),),
            wrt=("x",),
            shape=(64, 2560),
            forward=6,
            backward=10,
            stated="forward 6 (two reads and one write), backward 10 (three reads and two writes)",
            elements=lambda shape: int(torch.Size(shape).numel()) // 2,
        ),
    ]


def samples() -> dict[str, tuple]:
    return {
        "geglu": (tensor(2, 3, 10, grad=True, dtype=BF16),),
        "geglu_backward": (tensor(2, 3, 5), tensor(2, 3, 10)),
    }


ROWS = [
    Row(
        "`geglu(hidden)`",
        "`value * gelu(gate)` of `hidden.chunk(2, -1)`, exact GELU; by element of the output",
        "to `hidden`",
        "6",
        "10",
    ),
]

GEGLU = on("geglu", "test_matches_oracle and float32 or exact_gelu")

FAULTS = [
    Fault(
        "value and gate swapped",
        "geglu/triton.py",
        "(value * (gate * phi)).to(out_ptr",
        "(gate * (value * phi * phi)).to(out_ptr",
        GEGLU,
    ),
    Fault("density without the gate", "geglu/triton.py", "(phi + gate * density)", "(phi + density)", GEGLU),
    Fault("gate's column", "geglu/triton.py", "tl.store(place + n_columns,", "tl.store(place + n_columns - 1,", GEGLU),
]
