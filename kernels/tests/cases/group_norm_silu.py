"""`group_norm_silu`: every tile and dtype; half inputs with half and with fp32 weights."""

from __future__ import annotations

from fastpref_kernels import _group_norm_silu_kernels as kernels
from fastpref_kernels.group_norm_silu import _BLOCK_GROUP, _TILES

from .case import KernelCase

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
    group = {"BLOCK_SIZE": _BLOCK_GROUP}
    found = [case("group_norm_group", kernels.group_kernel, "fp32", "fp32", group)]
    for affine in ("bf16", "fp16", "fp32"):
        found.append(case(f"group_norm_group_sums[{affine}]", kernels.group_sums_kernel, "fp32", affine, group))
    for tile, (block_c, block_p) in _TILES.items():
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
