"""`keyed_noise` and `add_keyed_noise`, forward and backward, dense and strided."""

from __future__ import annotations

from fastpref_kernels.keyed_noise import _BLOCK, _add_keyed_noise_kernel, _keyed_noise_kernel

from .case import KernelCase


def noise(dtype: str) -> KernelCase:
    return KernelCase(
        f"keyed_noise[{dtype}]",
        _keyed_noise_kernel,
        {"keys_ptr": "*i64", "out_ptr": f"*{dtype}", "n_elements": "i32", "n_chunks": "i32"},
        {"BLOCK_SIZE": _BLOCK},
        ("keys_ptr", "out_ptr", "n_elements"),
        wide=("out_ptr",),
    )


def add(dtype: str, alphas: str, backward: bool, strided: bool) -> KernelCase:
    numbers = ("n_elements", "n_chunks", "n_timesteps", "size_1", "size_2", "x0_row", "x0_0", "x0_1", "x0_2")
    pointers = {"x0_ptr": f"*{dtype}", "keys_ptr": "*i64", "timesteps_ptr": "*i64", "alphas_cumprod_ptr": f"*{alphas}"}
    words = [dtype, alphas, *["strided"] * strided]
    return KernelCase(
        f"add_keyed_noise_{'bwd' if backward else 'fwd'}[{','.join(words)}]",
        _add_keyed_noise_kernel,
        pointers | {"out_ptr": f"*{dtype}"} | dict.fromkeys(numbers, "i32"),
        {"BACKWARD": backward, "STRIDED": strided, "BLOCK_SIZE": _BLOCK},
        (*pointers, "out_ptr", "n_elements", "x0_row"),
        wide=() if strided else ("x0_ptr", "out_ptr"),
    )


def cases() -> list[KernelCase]:
    found = [noise(dtype) for dtype in ("bf16", "fp16", "fp32")]
    for backward in (False, True):
        found += [add(dtype, "fp32", backward, False) for dtype in ("bf16", "fp16", "fp32")]
        found += [add("bf16", "fp64", backward, False), add("bf16", "fp32", backward, True)]
    return found
