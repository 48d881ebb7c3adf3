"""`lora_linear`, which has no kernel of its own."""

from __future__ import annotations

import torch
from gpu.plain import Inputs

import fastpref_kernels as fp

from .case import BF16, Fault, KernelCase, Row, Workload, tensor


def cases() -> list[KernelCase]:
    return []  # BLAS alone


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
        "lora_linear": (tensor(3, 2, 6, grad=True), tensor(4, 6), tensor(4), *loras, 0.5),
        "lora_linear[mixed]": (tensor(3, 6, dtype=BF16), tensor(4, 6, dtype=BF16), None, *loras, 0.5),
        "lora_linear_backward": (tensor(3, 4), *saved, 0.5, True, True),
    }


ROWS = [
    Row(
        "`lora_linear(x, weight, bias, lora_a, lora_b, scale)`",
        "`x W^T + b + scale (x A^T) B^T`; by element of the output",
        "to `x`, `lora_a`, `lora_b`",
        "6, and the operands",
        "the same",
    ),
]

LORA = ("test_lora_linear.py", "-k", "worked_by_hand or (test_matches_oracle and bfloat16)")

FAULTS = [
    Fault(
        "low-rank product instead of the sum",
        "lora_linear/torch.py",
        "y.addmm_(t, lora_b.to(x.dtype).T)",
        "y.addmm_(t, lora_b.to(x.dtype).T, beta=0)",
        LORA,
    ),
    Fault("scale forgotten", "lora_linear/torch.py", "beta=0, alpha=scale)", "beta=0)", LORA),
    Fault("gradient of the base alone", "lora_linear/torch.py", ".addmm_(u, lora_a.to(x.dtype))", "", LORA),
]
