"""`transition_loss`: every configuration, its workloads, arguments, faults and rows of the README."""

from __future__ import annotations

from gpu import plain
from gpu.plain import BETA, GUIDANCE, Inputs
from torch import Tensor
from torch.nn import functional as F

import fastpref_kernels as fp
from fastpref_kernels.transition_loss import triton as kernels

from .case import BF16, Fault, KernelCase, Row, Workload, on, tensor
from .ddim_pool_step import LATENT, ONE_STEP, ROWS_OF_STEPS, STEP, guided_step, suffix, types_and_flags

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


def _forward(x: str, pred: str, step: str, guided: bool, linear: bool) -> KernelCase:
    read = PREDICTIONS if guided else ("cond", "ref_cond")
    tail = {"coefficients_ptr": step, "partial_ptr": "fp32"}
    return _case(
        f"transition_chunk[{suffix(x if x == pred else f'{pred}->{x}', step, guided, linear)}]",
        "_transition_chunk_kernel",
        _tensors((*PREDICTIONS, *LATENTS), pred, x) | tail,
        ("n_rows", "n_pairs", "n_chunks", "n_blocks"),
        constexprs={"GUIDED": guided, "LINEAR": linear, "BLOCK_SIZE": kernels._BLOCK},
        wide=tuple(f"{name}_ptr" for name in (*read, *(LATENTS if linear else ()))),
    )


def _backward(x: str, pred: str, step: str, guided: bool, linear: bool) -> KernelCase:
    written = ("grad_cond", "grad_uncond") if guided else ("grad_cond",)
    read = ("cond", "uncond") if guided else ("cond",)
    head = {"grad_ptr": "fp32", "slopes_ptr": "fp32"}
    tail = {"coefficients_ptr": step, "grad_cond_ptr": pred, "grad_uncond_ptr": pred}
    return _case(
        f"transition_bwd[{suffix(x if x == pred else f'{pred}->{x}', step, guided, linear)}]",
        "_transition_bwd_kernel",
        head | _tensors(("cond", "uncond", *LATENTS), pred, x) | tail,
        ("n_rows", "n_pairs", "n_blocks"),
        constexprs={"GUIDED": guided, "LINEAR": linear, "BLOCK_SIZE": kernels._BLOCK},
        wide=tuple(f"{name}_ptr" for name in (*read, *written, *(LATENTS if linear else ()))),
    )


def _pairs(chunks: int, stored_beta: bool) -> KernelCase:
    pointers = ("partial", "ratio_w", "ratio_l", "slopes", "loss", "clipped", "accuracy", "beta")
    return KernelCase(
        name=f"transition_pair[{chunks} chunks{',stored beta' if stored_beta else ''}]",
        kernel=kernels._transition_pair_kernel,
        signature={f"{name}_ptr": "*fp32" for name in pointers}
        | {"n_elements": "i32", "n_pairs": "i32", "n_chunks": "i32", "beta": "fp32", "low": "fp32", "high": "fp32"},
        constexprs={"STORED_BETA": stored_beta, "BLOCK_PAIRS": kernels._PAIR_TILES[chunks], "BLOCK_CHUNKS": chunks},
        aligned=(*(f"{name}_ptr" for name in pointers), "n_elements"),
        min_occupancy=0.0,  # the only program of its launch
    )


def cases() -> list[KernelCase]:
    found = [_pairs(chunks, False) for chunks in kernels._PAIR_TILES] + [_pairs(16, True)]
    for make in (_forward, _backward):
        found += [make(x, pred, "fp32", *flags) for x, pred, *flags in types_and_flags()]
        found.append(make("bf16", "bf16", "fp64", True, True))
    return found


def transition(i: Inputs) -> tuple[Tensor, ...]:
    logs = []
    for x in ("x_w", "x_l"):
        terms = []
        for prefix in ("", "ref_"):
            pred, abar, prev, sigma = guided_step({k: i[prefix + k] for k in ("eps_cond", "eps_uncond")})
            x0 = (i["x_t"] - (1 - abar) ** 0.5 * pred) / abar**0.5
            mean = prev**0.5 * x0 + (1 - prev - sigma**2) ** 0.5 * pred
            terms.append(((i[x] - mean) ** 2).flatten(1).mean(1) / (2 * sigma**2))
        logs.append(terms[1] - terms[0])
    return (-F.logsigmoid(BETA / 500 * (logs[0] - logs[1])).mean(),)


def _spo(i: Inputs) -> tuple[Tensor, ...]:
    names = ("eps_cond", "eps_uncond", "ref_eps_cond", "ref_eps_uncond", "x_t", "x_w", "x_l")
    settings = {"guidance_scale": GUIDANCE, "beta": BETA / 500, "clip": None}
    return (fp.transition_loss(*(i[name] for name in names), i["step"], **settings)[0],)


def workloads() -> list[Workload]:
    predictions = ("eps_cond", "eps_uncond")
    return [
        Workload(
            op="transition_loss",
            variant="shared x_t",
            make=plain.latents(*predictions, "ref_eps_cond", "ref_eps_uncond", "x_t", "x_w", "x_l", step=plain.step),
            run=_spo,
            eager=transition,
            wrt=predictions,
            shape=(2, 4, 128, 128),
            forward=14,
            backward=8,
            stated="forward 14 [10]",
        ),
    ]


def samples() -> dict[str, tuple]:
    step = (*[tensor(*LATENT)] * 3, ONE_STEP, 5.0)
    bare = tensor(*LATENT, grad=True), None, tensor(*LATENT), None
    stacked = (tensor(4, 3, 5, grad=True, dtype=BF16), tensor(4, 3, 5, grad=True), *[tensor(4, 3, 5)] * 3)
    return {
        "transition_loss": (*stacked, *[tensor(*LATENT)] * 2, ROWS_OF_STEPS, 5.0, None, 10.0, 0.1),
        "transition_loss[plain]": (*bare, *step, tensor().exp(), 1.0, 0.1),
        "transition_loss_backward": (tensor(), tensor(2, 2), tensor(*LATENT, dtype=BF16), tensor(*LATENT), *step),
    }


ROWS = [
    Row(
        (
            "`transition_loss(eps_cond, eps_uncond, ref_eps_cond, ref_eps_uncond, x_t, x_w, x_l, coefficients, "
            "*, guidance_scale, beta, clip)`"
        ),
        "SPO's loss of two denoising transitions; the ratio is exactly 1 where policy equals reference",
        "to both branches",
        "14; 10 without guidance",
        "8 to 14",
    ),
]

SPO = on("transition_loss", "worked_by_hand or (test_matches_oracle and float32)")
CLIPPING = on("transition_loss", "test_settings_match_oracle or extreme_ratios")

FAULTS = [
    Fault(
        "winner's state for the loser",
        "transition_loss/triton.py",
        "shift * (2.0 * (x_l - x - move) + shift)",
        "shift * (2.0 * (x_w - x - move) + shift)",
        SPO,
    ),
    Fault(
        "square of the shift dropped",
        "transition_loss/triton.py",
        "(x_w - x - move) + shift)",
        "(x_w - x - move))",
        SPO,
    ),
    Fault(
        "half of the likelihood",
        "transition_loss/triton.py",
        "scale = 0.5 / (std * std)",
        "scale = 1.0 / (std * std)",
        SPO,
    ),
    Fault("gradient where clipped", "transition_loss/triton.py", "tl.where(out_w, 0.0, -slope)", "-slope", CLIPPING),
    Fault("losers' partial sums", "transition_loss/triton.py", "(n_pairs + loser) * n_chunks", "loser * n_chunks", SPO),
]
