"""`group_norm_silu`: every tile and dtype; half inputs with half and with fp32 weights."""

from __future__ import annotations

from typing import Any

import torch
from gpu.plain import Inputs
from torch.nn import functional as F

import fastpref_kernels as fp
from fastpref_kernels.group_norm_silu import backward, plan
from fastpref_kernels.group_norm_silu import triton as kernels

from .case import BF16, Fault, KernelCase, Row, Workload, on, tensor

TENSORS = ("grad_ptr", "input_ptr", "out_ptr", "grad_input_ptr")
AFFINE = ("weight_ptr", "bias_ptr")
DTYPES = (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp32"))
ALIGNED = ("n_channels", "n_positions", "batch_stride", "outer_stride", "dense_stride")


def case(name: str, kernel: Any, tile: plan.Tile, dtype: str, affine: str, constexprs: dict[str, object]) -> KernelCase:
    """Tensors in `dtype`, weight and bias in `affine`, statistics in fp32, numbers in i32."""
    constexprs = {"BLOCK_R": tile.rows, "BLOCK_P": tile.positions, **constexprs}
    signature = {}
    for argument in kernel.arg_names:
        if argument in TENSORS:
            signature[argument] = f"*{dtype}"
        elif argument in AFFINE:
            signature[argument] = f"*{affine}"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32"
        elif argument not in constexprs:
            signature[argument] = "fp32" if argument == "eps" else "i32"
    return KernelCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        aligned=tuple(a for a in signature if a.endswith("_ptr") or a in ALIGNED),
        num_warps=tile.warps,
        wide=tuple(a for a in signature if a in TENSORS),
    )


def cases() -> list[KernelCase]:
    found = []
    for name, tile in plan.SPLIT.items():
        split = {"CHANNELS_LAST": "last" in name, "BLOCK_G": plan.GROUPS.get(name, 1)}
        more = split | {"BLOCK_ENTRIES": plan.BLOCK_ENTRIES}
        for dtype in ("bf16", "fp16", "fp32"):
            found.append(case(f"group_norm_moments[{dtype},{name}]", kernels.moments_kernel, tile, dtype, dtype, split))
        for dtype, affine in DTYPES:
            words = f"[{dtype}{'' if affine == dtype else ',weight ' + affine},{name}]"
            for short, kernel, constants in (
                ("silu", kernels.normalise_kernel, more),
                ("silu_sums", backward.sums_kernel, split),
                ("silu_dx", backward.grad_input_kernel, more),
            ):
                found.append(case(f"group_norm_{short}{words}", kernel, tile, dtype, affine, constants))
    for short, kernel in (("whole", kernels.whole_kernel), ("whole_bwd", backward.whole_backward_kernel)):
        for name, tile in (plan.WHOLE | {"large": plan.LARGE}).items():
            for dtype, affine in DTYPES:
                if (short, dtype, name) == ("whole_bwd", "fp32", "large"):
                    continue
                words = f"[{dtype}{'' if affine == dtype else ',weight ' + affine},{name}]"
                found.append(case(f"group_norm_{short}{words}", kernel, tile, dtype, affine, {}))
    return found


def activation(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    channels = shape[1]
    affine = {name: torch.rand(channels, device=device).to(dtype) for name in ("weight", "bias")}
    return {"x": torch.randn(shape, device=device).to(dtype), **affine}


def workloads() -> list[Workload]:
    return [
        Workload(
            op="group_norm_silu",
            variant="",
            make=activation,
            run=lambda i: (fp.group_norm_silu(i["x"], 32, i["weight"], i["bias"]),),
            eager=lambda i: (F.silu(F.group_norm(i["x"], 32, i["weight"], i["bias"])),),
            wrt=("x", "weight", "bias"),
            shape=(2, 64, 72, 64),
            forward=6,
            backward=10,
            stated="two each way, forward 6 (two reads and one write), backward 10 (four reads and one write)",
        ),
    ]


def samples() -> dict[str, tuple]:
    x, weight, bias = tensor(2, 6, 3, 5), tensor(6), tensor(6)
    last = tensor(2, 6, 3, 5, dtype=BF16).to(memory_format=torch.channels_last)
    saved = torch.ops.fastpref_kernels.group_norm_silu(x, 3, weight, bias, 1e-5, True)[1:]
    return {
        "group_norm_silu": (tensor(2, 6, 3, 5, grad=True), 3, tensor(6, grad=True), tensor(6, grad=True), 1e-5, True),
        "group_norm_silu[last]": (last.requires_grad_(), 2, tensor(6), tensor(6), 1e-5, True),
        "group_norm_silu_backward": (tensor(2, 6, 3, 5), x, 3, weight, bias, *saved, True),
    }


ROWS = [
    Row(
        "`group_norm_silu(input, num_groups, weight, bias, eps)`",
        "`silu(group_norm(...))`, channels first or last, 3-D to 5-D",
        "to input, weight, bias",
        "6; 4 for a small group",
        "10; 6",
    ),
]

NORM = on("group_norm_silu", "worked_by_hand or (test_matches_oracle and float32)")
SPLIT = ("test_group_norm_silu.py", "-k", "split_groups")

FAULTS = [
    Fault(
        "eps outside the root of a whole group",
        "group_norm_silu/triton.py",
        "axis=1), axis=0) / total + eps)",
        "axis=1), axis=0) / total) + eps",
        NORM,
    ),
    Fault(
        "eps outside the root",
        "group_norm_silu/triton.py",
        "square / tl.maximum(total, 1.0) + eps)",
        "square / tl.maximum(total, 1.0)) + 100 * eps",
        SPLIT,
    ),
    Fault(
        "merge without the means' distance",
        "group_norm_silu/triton.py",
        "square + square_more + delta * delta * (count * share)",
        "square + square_more",
        SPLIT,
    ),
    Fault(
        "pool without the means' distance",
        "group_norm_silu/triton.py",
        "square + count * delta * delta,",
        "square,",
        SPLIT,
    ),
    Fault("entry of another chunk", "group_norm_silu/triton.py", "+ (unit - first) * n_chunks +", "+", SPLIT),
    Fault("channel of a segment", "group_norm_silu/triton.py", "+ row // segments", "+ row % segments", SPLIT),
    Fault(
        "silu's slope", "group_norm_silu/backward.py", "1.0 + z * (1.0 - sigmoid)", "1.0 - z * (1.0 - sigmoid)", NORM
    ),
    Fault(
        "channel's group",
        "group_norm_silu/backward.py",
        "num_groups + channel // (n_channels // num_groups)",
        "num_groups + channel // (n_channels // num_groups) // 2",
        NORM,
    ),
    Fault(
        "weight of the channels forgotten in a group's sums",
        "group_norm_silu/backward.py",
        "first_sum * weight, second_sum * weight",
        "first_sum, second_sum",
        SPLIT,
    ),
    Fault(
        "sums of the wrong channel", "group_norm_silu/backward.py", "channel) * n_chunks +", "unit) * n_chunks +", SPLIT
    ),
]
