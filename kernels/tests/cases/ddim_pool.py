from __future__ import annotations

from itertools import product

from fastpref_kernels import _ddim_pool_kernels as kernels

from .case import KernelCase

STEP = {
    "n_timesteps": "i32",
    "t_all": "i32",
    "t_prev_all": "i32",
    "v_prediction": "i32",
    "guidance_scale": "fp32",
    "eta": "fp32",
    "final_alpha": "fp32",
}


def suffix(dtype: str, alphas: str, guided: bool, linear: bool = True) -> str:
    """What a case's name says of its configuration."""
    parts = [dtype, *(["alphas_fp64"] if alphas == "fp64" else []), "guided" if guided else "plain"]
    return ",".join(parts if linear else [*parts, "transposed"])


def _forward(x: str, pred: str, alphas: str, guided: bool, linear: bool) -> KernelCase:
    pointers = {"x_ptr": x, "cond_ptr": pred, "uncond_ptr": pred, "keys_ptr": "i64", "alphas_cumprod_ptr": alphas}
    pointers |= {"t_ptr": "i64", "t_prev_ptr": "i64", "candidates_ptr": x, "x0_ptr": x}
    rows = ("x_row", "cond_row", "uncond_row")
    wide = ("x_ptr", "cond_ptr", *(["uncond_ptr"] if guided else []), "x0_ptr", "candidates_ptr")
    return KernelCase(
        name=f"ddim_pool_fwd[{suffix(x if x == pred else f'{pred}->{x}', alphas, guided, linear)}]",
        kernel=kernels._ddim_pool_fwd_kernel,
        signature={name: f"*{dtype}" for name, dtype in pointers.items()}
        | {"n_elements": "i32", "n_blocks": "i32", "n_candidates": "i32"}
        | STEP
        | dict.fromkeys((*rows, "x_inner", "pred_inner", "outer"), "i32"),
        constexprs={"GUIDED": guided, "LINEAR": linear, "BLOCK_SIZE": kernels._BLOCK},
        aligned=(*pointers, "n_elements", *rows),
        wide=wide if linear else wide[-2:],
    )


def _backward(dtype: str, alphas: str, guided: bool) -> KernelCase:
    pointers = {"grad_candidates_ptr": dtype, "grad_x0_ptr": dtype, "alphas_cumprod_ptr": alphas, "t_ptr": "i64"}
    pointers |= {"t_prev_ptr": "i64", "grad_x_ptr": dtype, "grad_cond_ptr": dtype, "grad_uncond_ptr": dtype}
    wide = ("grad_candidates_ptr", "grad_x0_ptr", "grad_x_ptr", "grad_cond_ptr")
    return KernelCase(
        name=f"ddim_pool_bwd[{suffix(dtype, alphas, guided)}]",
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
