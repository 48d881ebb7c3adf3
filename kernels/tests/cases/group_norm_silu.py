"""`group_norm_silu`: every tile and dtype; half inputs with half and with fp32 weights."""

from __future__ import annotations

import torch
from gpu.plain import Inputs
from torch.nn import functional as F

import fastpref_kernels as fp
from fastpref_kernels.group_norm_silu import triton as kernels

from .case import BF16, Fault, KernelCase, Row, Workload, on, tensor

TENSORS = ("grad_ptr", "input_ptr", "out_ptr", "grad_input_ptr")
AFFINE = ("weight_ptr", "bias_ptr")
DTYPES = (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp16", "fp32"), ("fp32", "fp32"))
ALIGNED = ("n_channels", "n_positions", "batch_stride", "outer_stride", "dense_stride")


def case(name: str, kernel: object, dtype: str, affine: str, constexprs: dict[str, object]) -> KernelCase:
    """Tensors in `dtype`, weight and bias in `affine`, statistics in fp32, numbers in i32."""
    signature = {}
    for argument in kernel.arg_names:  # type: ignore[attr-defined]
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
        wide=tuple(a for a in signature if a in TENSORS),
    )


def cases() -> list[KernelCase]:
    group = {"BLOCK_SIZE": kernels._BLOCK_GROUP}
    found = [case("group_norm_group", kernels.group_kernel, "fp32", "fp32", group)]
    for affine in ("bf16", "fp16", "fp32"):
        found.append(case(f"group_norm_group_sums[{affine}]", kernels.group_sums_kernel, "fp32", affine, group))
    for tile, (block_c, block_p) in kernels._TILES.items():
        constexprs = {"CHANNELS_LAST": tile == "last", "BLOCK_C": block_c, "BLOCK_P": block_p}
        for dtype in ("bf16", "fp16", "fp32"):
            name = f"group_norm_moments[{dtype},{tile}]"
            found.append(case(name, kernels.moments_kernel, dtype, dtype, constexprs))
        for dtype, affine in DTYPES:
            words = f"[{dtype}{'' if affine == dtype else ',weight ' + affine},{tile}]"
            for short, kernel in (
                ("silu", kernels.normalise_kernel),
                ("silu_sums", kernels.sums_kernel),
                ("silu_dx", kernels.grad_input_kernel),
            ):
                found.append(case(f"group_norm_{short}{words}", kernel, dtype, affine, constexprs))
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
            shape=(2, 64, 48, 48),
            forward=6,
            backward=10,
            stated="forward 6 (two reads and one write), backward 10 (four reads and one write)",
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
        "6",
        "10",
    ),
]

NORM = on("group_norm_silu", "worked_by_hand or (test_matches_oracle and float32)")
TILES = on("group_norm_silu", "many_tiles")

FAULTS = [
    Fault("eps outside the root", "group_norm_silu/triton.py", "/ total + eps))", "/ total) + eps)", NORM),
    Fault(
        "merge without the means' distance",
        "group_norm_silu/triton.py",
        "+ delta * delta * (seen * share)",
        "",
        TILES,
    ),
    Fault(
        "silu's slope",
        "group_norm_silu/triton.py",
        "(1.0 + z * (1.0 - sigmoid))",
        "(1.0 - z * (1.0 - sigmoid))",
        NORM,
    ),
    Fault(
        "channel's group",
        "group_norm_silu/triton.py",
        "num_groups)\n    mean = _by_channel(mean_ptr, group, channel, n_channels)\n    scale = _by_channel(rstd",
        "num_groups) // 2\n    mean = _by_channel(mean_ptr, group, channel, n_channels)\n    scale = _by_channel(rstd",
        NORM,
    ),
]
