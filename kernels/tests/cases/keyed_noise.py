"""`keyed_noise` and `add_keyed_noise`, forward and backward, dense and strided."""

from __future__ import annotations

import torch
from gpu import plain

import fastpref_kernels as fp
from fastpref_kernels.keyed_noise.triton import _BLOCK, _add_keyed_noise_kernel, _keyed_noise_kernel

from .case import BF16, Fault, KernelCase, Row, Workload, on, tensor


def noise(dtype: str) -> KernelCase:
    return KernelCase(
        f"keyed_noise[{dtype}]",
        _keyed_noise_kernel,
        {"keys_ptr": "*i64", "out_ptr": f"*{dtype}", "n_elements": "i32", "n_chunks": "i32"},
        {"BLOCK_SIZE": _BLOCK},
        ("keys_ptr", "out_ptr", "n_elements"),
        wide=("out_ptr",),
    )


def add(dtype: str, coefficients: str, backward: bool, strided: bool) -> KernelCase:
    numbers = ("n_elements", "n_chunks", "size_1", "size_2", "x0_row", "x0_0", "x0_1", "x0_2")
    pointers = {"x0_ptr": f"*{dtype}", "keys_ptr": "*i64", "a_ptr": f"*{coefficients}", "s_ptr": f"*{coefficients}"}
    words = [dtype, coefficients, *["strided"] * strided]
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


def workloads() -> list[Workload]:
    rows = {"keys": plain.keys, "a": plain.signal, "s": plain.sigma}
    return [
        Workload(
            op="keyed_noise",
            variant="",
            make=plain.latents("like", keys=plain.keys),
            run=lambda i: (fp.keyed_noise(i["keys"], i["like"].shape[1:], i["like"].dtype),),
            eager=lambda i: (torch.randn_like(i["like"]),),  # other numbers, the same law
            wrt=(),
            shape=(2, 4, 64, 64),
            forward=2,
            stated="keyed_noise 2 (a write)",
        ),
        Workload(
            op="add_keyed_noise",
            variant="",
            make=plain.latents("x0", **rows),
            run=lambda i: (fp.add_keyed_noise(i["x0"], i["keys"], i["a"], i["s"]),),
            eager=lambda i: (plain.noised(i["x0"], plain.noise(i, i["x0"]), i),),
            wrt=("x0",),
            shape=(2, 4, 64, 64),
            forward=4,
            backward=4,
            stated="add_keyed_noise 4 (a read and a write), its backward 4",
        ),
    ]


def samples() -> dict[str, tuple]:
    keys, a = torch.arange(4), torch.tensor([1.0, 0.9, 0.5, 0.0])
    return {
        "keyed_noise": (keys, [3, 5], BF16),
        "add_keyed_noise": (tensor(4, 3, 5, grad=True), keys, a, 1 - a),
        "add_keyed_noise_backward": (tensor(4, 3, 5), a),
    }


ROWS = [
    Row(
        "`keyed_noise(keys, shape, dtype)`",
        "standard normals: Philox4x32-10 and Box-Muller",
        "none",
        "2",
        "",
    ),
    Row(
        "`add_keyed_noise(x0, keys, a, s)`",
        "`a x0 + s keyed_noise`, with coefficients by row",
        "to `x0`",
        "4",
        "4",
    ),
    Row(
        "`derive_keys(seed, epoch, ids, draw, purpose)`, `keyed_uniform_u32(keys)`",
        "64-bit keys by stream (`PURPOSES`); the first word of a key's stream",
        "none",
        "",
        "",
    ),
]

NOISE = on("keyed_noise", "test_noise_matches_oracle")
ADD = on("keyed_noise", "test_add_matches_oracle and float32")

FAULTS = [
    Fault("a round of Philox less", "common/philox.py", "for _ in range(10)", "for _ in range(9)", NOISE),
    Fault("a Philox word", "common/philox.py", "high1 ^ c1 ^ k0", "high0 ^ c1 ^ k0", NOISE),
    Fault("high word of the key", "common/philox.py", "(key >> 32)", "(key >> 31)", NOISE),
    Fault(
        "sine for cosine",
        "common/philox.py",
        "return radius * cosine, radius * sine",
        "return radius * sine, radius * cosine",
        NOISE,
    ),
    Fault("half a turn", "common/philox.py", "6.283185307179586, tl.float32", "3.141592653589793, tl.float32", NOISE),
    Fault(
        "noise without its scale",
        "keyed_noise/triton.py",
        "tl.load(s_ptr + row).to(tl.float32) * _normals",
        "_normals",
        ADD,
    ),
    Fault("one row's coefficient for all", "keyed_noise/triton.py", "tl.load(a_ptr + row)", "tl.load(a_ptr)", ADD),
    Fault("noise in the gradient", "keyed_noise/triton.py", "if not BACKWARD:", "if True:", ADD),
    Fault(
        "int32 rows of the noise",
        "keyed_noise/triton.py",
        "out_ptr + row * n_elements + offset, noise",
        "out_ptr + (row * n_elements).to(tl.int32) + offset, noise",
        ("test_offsets.py", "-k", "test_noise"),
    ),
    Fault(
        "int32 rows of x_t",
        "keyed_noise/triton.py",
        "out_ptr + row * n_elements + offset, x_t",
        "out_ptr + (row * n_elements).to(tl.int32) + offset, x_t",
        ("test_offsets.py", "-k", "test_added_noise"),
    ),
]
