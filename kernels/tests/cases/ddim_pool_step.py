"""`ddim_pool_step`: every configuration, its workloads, arguments, faults and rows of the README."""

from __future__ import annotations

from itertools import product

import torch
from gpu import plain
from gpu.plain import ALPHAS, CANDIDATES, GUIDANCE, T_PREV, Inputs, T
from torch import Tensor

import fastpref_kernels as fp
from fastpref_kernels.ddim_pool_step import triton as kernels

from .case import BF16, Fault, KernelCase, Row, Workload, on, tensor

STEP = {"coefficient_row": "i32", "guidance_scale": "fp32"}


def suffix(dtype: str, step: str, guided: bool, linear: bool = True) -> str:
    """What a case's name says of its configuration."""
    parts = [dtype, *(["step_fp64"] if step == "fp64" else []), "guided" if guided else "plain"]
    return ",".join(parts if linear else [*parts, "transposed"])


def _forward(x: str, pred: str, step: str, guided: bool, linear: bool) -> KernelCase:
    pointers = {"x_ptr": x, "cond_ptr": pred, "uncond_ptr": pred, "keys_ptr": "i64", "coefficients_ptr": step}
    pointers |= {"candidates_ptr": x, "x0_ptr": x}
    rows = ("x_row", "cond_row", "uncond_row")
    wide = ("x_ptr", "cond_ptr", *(["uncond_ptr"] if guided else []), "x0_ptr", "candidates_ptr")
    return KernelCase(
        name=f"ddim_pool_fwd[{suffix(x if x == pred else f'{pred}->{x}', step, guided, linear)}]",
        kernel=kernels._ddim_pool_fwd_kernel,
        signature={name: f"*{dtype}" for name, dtype in pointers.items()}
        | {"n_elements": "i32", "n_blocks": "i32", "n_candidates": "i32"}
        | STEP
        | dict.fromkeys((*rows, "x_inner", "pred_inner", "outer"), "i32"),
        constexprs={"GUIDED": guided, "LINEAR": linear, "BLOCK_SIZE": kernels._BLOCK},
        aligned=(*pointers, "n_elements", *rows),
        wide=wide if linear else wide[-2:],
    )


def _backward(dtype: str, step: str, guided: bool) -> KernelCase:
    pointers = {"grad_candidates_ptr": dtype, "grad_x0_ptr": dtype, "coefficients_ptr": step}
    pointers |= {"grad_x_ptr": dtype, "grad_cond_ptr": dtype, "grad_uncond_ptr": dtype}
    wide = ("grad_candidates_ptr", "grad_x0_ptr", "grad_x_ptr", "grad_cond_ptr")
    return KernelCase(
        name=f"ddim_pool_bwd[{suffix(dtype, step, guided)}]",
        kernel=kernels._ddim_pool_bwd_kernel,
        signature={name: f"*{kind}" for name, kind in pointers.items()}
        | {"n_elements": "i32", "n_blocks": "i32", "n_candidates": "i32"}
        | STEP,
        constexprs={"GUIDED": guided, "BLOCK_SIZE": kernels._BACKWARD_BLOCK},
        aligned=(*pointers, "n_elements"),
        wide=(*wide, "grad_uncond_ptr") if guided else wide,
    )


def types_and_flags() -> list[tuple[str, str, bool, bool]]:
    """(latents, predictions, guided, linear): every flag at 2 and 4 bytes; fp16 differs from bf16 in its casts only."""
    found = [(x, x, *flags) for x, *flags in product(("bf16", "fp32"), (True, False), (True, False))]
    return [*found, ("fp16", "fp16", True, True), ("fp16", "fp16", False, True), ("fp32", "bf16", True, True)]


def cases() -> list[KernelCase]:
    found = [_forward(x, pred, "fp32", *flags) for x, pred, *flags in types_and_flags()]
    found += [_backward(dtype, "fp32", guided) for dtype in ("bf16", "fp16", "fp32") for guided in (True, False)]
    return [*found, _forward("bf16", "bf16", "fp64", True, True), _backward("bf16", "fp64", True)]


def guided_step(i: Inputs) -> tuple[Tensor, float, float, float]:
    """Guided prediction, and abar_t, abar_prev, sigma of the step T -> T_PREV with eta = 1."""
    abar, prev = ALPHAS[T].item(), ALPHAS[T_PREV].item()
    sigma = ((1 - prev) / (1 - abar) * (1 - abar / prev)) ** 0.5
    return i["eps_uncond"] + GUIDANCE * (i["eps_cond"] - i["eps_uncond"]), abar, prev, sigma


def pool(i: Inputs) -> tuple[Tensor, ...]:
    pred, abar, prev, sigma = guided_step(i)
    x0 = (i["x_t"] - (1 - abar) ** 0.5 * pred) / abar**0.5
    mean = prev**0.5 * x0 + (1 - prev - sigma**2) ** 0.5 * pred
    noise = fp.keyed_noise(i["keys"].flatten(), x0.shape[1:], torch.float32).to(x0.dtype)
    return mean.unsqueeze(1) + sigma * noise.view(x0.shape[0], CANDIDATES, *x0.shape[1:]), x0


def workloads() -> list[Workload]:
    return [
        Workload(
            op="ddim_pool_step",
            variant=f"K={CANDIDATES}",
            make=plain.latents("x_t", "eps_cond", "eps_uncond", keys=plain.pool_keys, step=plain.step),
            run=lambda i: tuple(
                fp.ddim_pool_step(
                    i["x_t"], i["eps_cond"], i["eps_uncond"], i["keys"], i["step"], guidance_scale=GUIDANCE
                )
            ),
            eager=pool,
            wrt=("x_t", "eps_cond", "eps_uncond"),
            shape=(2, 4, 64, 64),
            forward=8 + 2 * CANDIDATES,
            backward=8 + 2 * CANDIDATES,
            stated="forward 8 + 2K",
        ),
    ]


LATENT = (2, 3, 5)
ROWS_OF_STEPS = torch.tensor([[2.0, -1.5, 0.25, -0.5, 0.5], [1.0, -0.25, 0.0, -0.125, 0.25]])
ONE_STEP = ROWS_OF_STEPS[:1].expand(2, 5)


def samples() -> dict[str, tuple]:
    keys = torch.arange(6).view(2, 3)
    pool = (tensor(*LATENT, grad=True), tensor(*LATENT, grad=True))
    return {
        "ddim_pool_step": (*pool, tensor(*LATENT, grad=True, dtype=BF16), keys, ROWS_OF_STEPS, 5.0),
        "ddim_pool_step[plain]": (*pool, None, keys, ONE_STEP, 5.0),
        "ddim_pool_step_backward": (
            *(tensor(2, 3, 3, 5), tensor(*LATENT), ROWS_OF_STEPS, 5.0),
            *(torch.float32, BF16, None),
        ),
    }


ROWS = [
    Row(
        "`ddim_pool_step(x_t, eps_cond, eps_uncond, keys, coefficients, *, guidance_scale, k)`",
        "guidance, predicted x0, mean of the step, K candidates",
        "to `x_t` and both predictions",
        "8 + 2K",
        "8 + 2K",
    ),
    Row(
        "`predict_x0(x_t, eps_cond, eps_uncond, coefficients, *, guidance_scale)`",
        "the predicted clean latents of such a step alone",
        "",
        "",
        "",
    ),
]

POOL = on("ddim_pool_step", "worked_by_hand or (test_matches_oracle and float32)")

FAULTS = [
    Fault("std for c", "common/steps.py", "c = tl.load(place + 3)", "c = tl.load(place + 4)", POOL),
    Fault("one step for all rows", "common/steps.py", "row * coefficient_row", "0 * coefficient_row", POOL),
    Fault(
        "guidance the wrong way",
        "ddim_pool_step/triton.py",
        "pred = uncond + guidance_scale * (pred - uncond)",
        "pred = pred + guidance_scale * (uncond - pred)",
        POOL,
    ),
    Fault(
        "candidates share a key",
        "ddim_pool_step/triton.py",
        "tl.load(keys_ptr + candidate)",
        "tl.load(keys_ptr + row * n_candidates)",
        POOL,
    ),
    Fault(
        "gradient of the unconditional branch",
        "ddim_pool_step/triton.py",
        "(1.0 - guidance_scale) * grad_pred",
        "guidance_scale * grad_pred",
        POOL,
    ),
    Fault(
        "32-bit row",
        "ddim_pool_step/triton.py",
        "candidate * n_elements + offset",
        "(candidate * n_elements).to(tl.int32) + offset",
        ("test_offsets.py",),
    ),
]
