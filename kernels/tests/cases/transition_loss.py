from __future__ import annotations

from fastpref_kernels import _transition_kernels as kernels
from fastpref_kernels import _transition_launch as launch

from .case import KernelCase
from .ddim_pool import STEP, suffix, types_and_flags

PREDICTIONS = ("cond", "uncond", "ref_cond", "ref_uncond")
LATENTS = ("x", "x_w", "x_l")


def _tensors(names: tuple[str, ...], pred: str, x: str) -> dict[str, str]:
    return {f"{name}_ptr": x if name in LATENTS else pred for name in names}


def _case(name: str, kernel: str, pointers: dict[str, str], counts: tuple[str, ...], **options: object) -> KernelCase:
    rows = tuple(
        f"{p.removesuffix('_ptr')}_row" for p in pointers if p.removesuffix("_ptr") in (*PREDICTIONS, *LATENTS)
    )
    return KernelCase(
        name=name,
        kernel=getattr(kernels, kernel),
        signature={name: f"*{kind}" for name, kind in pointers.items()}
        | dict.fromkeys(("n_elements", *counts), "i32")
        | STEP
        | dict.fromkeys((*rows, "inner", "outer"), "i32"),
        aligned=(*pointers, "n_elements", *rows),
        **options,  # type: ignore[arg-type]
    )


def _forward(x: str, pred: str, alphas: str, guided: bool, linear: bool) -> KernelCase:
    read = PREDICTIONS if guided else ("cond", "ref_cond")
    tail = {"alphas_cumprod_ptr": alphas, "t_ptr": "i64", "t_prev_ptr": "i64", "partial_ptr": "fp32"}
    return _case(
        f"transition_chunk[{suffix(x if x == pred else f'{pred}->{x}', alphas, guided, linear)}]",
        "_transition_chunk_kernel",
        _tensors((*PREDICTIONS, *LATENTS), pred, x) | tail,
        ("n_rows", "n_pairs", "n_chunks", "n_blocks"),
        constexprs={"GUIDED": guided, "LINEAR": linear, "BLOCK_SIZE": launch._BLOCK},
        wide=tuple(f"{name}_ptr" for name in (*read, *(LATENTS if linear else ()))),
    )


def _backward(x: str, pred: str, alphas: str, guided: bool, linear: bool) -> KernelCase:
    written = ("grad_cond", "grad_uncond") if guided else ("grad_cond",)
    read = ("cond", "uncond") if guided else ("cond",)
    head = {"grad_ptr": "fp32", "slopes_ptr": "fp32"}
    tail = {"alphas_cumprod_ptr": alphas, "t_ptr": "i64", "t_prev_ptr": "i64"}
    tail |= {"grad_cond_ptr": pred, "grad_uncond_ptr": pred}
    return _case(
        f"transition_bwd[{suffix(x if x == pred else f'{pred}->{x}', alphas, guided, linear)}]",
        "_transition_bwd_kernel",
        head | _tensors(("cond", "uncond", *LATENTS), pred, x) | tail,
        ("n_rows", "n_pairs", "n_blocks"),
        constexprs={"GUIDED": guided, "LINEAR": linear, "BLOCK_SIZE": launch._BLOCK},
        wide=tuple(f"{name}_ptr" for name in (*read, *written, *(LATENTS if linear else ()))),
    )


def _pairs(chunks: int) -> KernelCase:
    pointers = ("partial", "ratio_w", "ratio_l", "slopes", "loss", "clipped", "accuracy")
    return KernelCase(
        name=f"transition_pair[{chunks} chunks]",
        kernel=kernels._transition_pair_kernel,
        signature={f"{name}_ptr": "*fp32" for name in pointers}
        | {"n_elements": "i32", "n_pairs": "i32", "n_chunks": "i32", "beta": "fp32", "low": "fp32", "high": "fp32"},
        constexprs={"BLOCK_PAIRS": launch._PAIR_TILES[chunks], "BLOCK_CHUNKS": chunks},
        aligned=(*(f"{name}_ptr" for name in pointers), "n_elements"),
        min_occupancy=0.0,  # the only program of its launch
    )


def cases() -> list[KernelCase]:
    found = [_pairs(chunks) for chunks in launch._PAIR_TILES]
    for make in (_forward, _backward):
        found += [make(x, pred, "fp32", *flags) for x, pred, *flags in types_and_flags()]
        found.append(make("bf16", "bf16", "fp64", True, True))
    return found
