"""`rpo_loss`: each weight, with rewards from memory (M = N and M != N) or from chunks, as `paired_preference_loss`."""

from __future__ import annotations

import torch
from gpu import plain
from gpu.plain import BETA, TEMPERATURE, Inputs
from torch import Tensor
from torch.nn import functional as F

import fastpref_kernels as fp
from fastpref_kernels.common.pairwise import chunk_block
from fastpref_kernels.rpo_loss import embeddings
from fastpref_kernels.rpo_loss import triton as kernels

from .case import Fault, KernelCase, Row, Workload, on, tensor

TILES = ("middle", "small", "single", "single, narrow")
PARTS = {"bf16": 1, "fp32": 2}
STATE = {"parts_ptr": "*fp16", "scale_ptr": "*fp32", "reward_ptr": "*fp32", "state_ptr": "*fp32"}


def prepare(dtype: str, dim: int) -> KernelCase:
    sizes = ("n_winners", "w_row", "l_row", "dim", "padded")
    return KernelCase(
        f"rpo_loss_prepare[{dtype},{embeddings.block(dim)}]",
        embeddings._rpo_prepare_kernel,
        {
            **{"emb_w_ptr": f"*{dtype}", "emb_l_ptr": f"*{dtype}", "parts_ptr": "*fp16", "scale_ptr": "*fp32"},
            **dict.fromkeys(sizes, "i32"),
        },
        {"w_d": 1, "l_d": 1, "PARTS": PARTS[dtype], "BLOCK_D": embeddings.block(dim)},
        ("emb_w_ptr", "emb_l_ptr", "parts_ptr", "scale_ptr", *sizes),
    )


def tiles(tile: str, parts: int) -> tuple[dict[str, int], dict]:
    """Constants of a tile; options, as a case names them. The loads of a product are ahead of it, so that few warps
    are enough; scalars that gfx942 keeps in lanes of a vector register leave memory alone."""
    constants = dict(kernels.blocks(tile, parts))
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants.pop("maxnreg", None)  # only where there is a GPU
    limits = {"max_registers": kernels.MAX_REGISTERS, "min_occupancy": 0.125, "scalars_in_lanes": 192}
    return constants, options | limits


def softmax(tile: str, dtype: str) -> KernelCase:
    constants, options = tiles(tile, PARTS[dtype])
    pointers = {name: STATE[name] for name in ("parts_ptr", "scale_ptr", "state_ptr")}
    sizes = ("n_winners", "rows", "columns", "padded", "column_strip", "n_column_strips")
    return KernelCase(
        f"rpo_loss_softmax[{tile.split()[1]},{dtype}]",
        kernels._rpo_softmax_kernel,
        {**pointers, **dict.fromkeys(sizes, "i32"), "logit_scale": "fp32"},
        constants,
        (*pointers, "padded", "column_strip"),
        tensor_cores=True,
        **options,
    )


def contrast(tile: str, weight: str, dtype: str, chunks: int = 1, pairs: bool = True) -> KernelCase:
    """What is 1 in a launch is a constant of the compiled kernel."""
    uniform = weight == "uniform"
    constants, options = tiles(tile, PARTS[dtype])
    ones = dict.fromkeys(("n_chunks", "w_stride", "l_stride"), 1) if chunks == 1 else {}
    pointers = {"reward_w_ptr": "*fp32", "reward_l_ptr": "*fp32"} | STATE
    sizes = ("n_winners", "n_losers", "rows", "columns", "padded", "n_chunks", "w_stride", "l_stride")
    sizes += ("row_strip", "column_strip", "n_row_strips", "n_column_strips")
    signature = {**pointers, **dict.fromkeys(sizes, "i32")}
    signature |= dict.fromkeys(("reward_scale", "half_beta", "logit_scale"), "fp32")
    flags = {"UNIFORM": uniform, "INSIDE": weight == "inside", "PAIRS": pairs, "SINGLE": tile.startswith("single")}
    strips = {"BLOCK_STRIPS": kernels.MERGED, "BLOCK_CHUNKS": chunk_block(chunks)}
    words = [tile, weight, dtype, *["chunks"] * (chunks > 1), *["pairs"] * pairs]
    return KernelCase(
        f"rpo_loss_contrast[{','.join(words)}]",
        kernels._rpo_contrast_kernel,
        {name: kind for name, kind in signature.items() if name not in ones},
        {**ones, **flags, **constants, **strips},
        (*pointers, "padded", "row_strip", "column_strip"),
        tensor_cores=not uniform,
        **options,
    )


def finish(inside: bool, pairs: bool) -> KernelCase:
    pointers = ("state_ptr", "grad_w_ptr", "grad_l_ptr", "loss_ptr", "effective_ptr", "accuracy_ptr")
    sizes = ("n_winners", "n_losers", "columns", "n_row_strips", "n_column_strips", "programs")
    return KernelCase(
        f"rpo_loss_finish[{','.join(['inside' if inside else 'outside', *['pairs'] * pairs])}]",
        kernels._rpo_finish_kernel,
        {**dict.fromkeys(pointers, "*fp32"), **dict.fromkeys(sizes, "i32"), "grad_scale": "fp32"},
        {"INSIDE": inside, "PAIRS": pairs, "BLOCK": kernels.FINISH, "BLOCK_STRIPS": kernels.STRIPS},
        pointers,
    )


def cases() -> list[KernelCase]:
    found = [prepare(dtype, dim) for dtype in PARTS for dim in (256, 768)]
    found += [softmax(f"softmax, {tile}", dtype) for tile in ("large", "middle", "small") for dtype in PARTS]
    for tile in TILES:
        weights = ("outside", "inside")
        found += [contrast(tile, weight, dtype) for weight in weights for dtype in PARTS]
        found += [contrast(tile, weight, "fp32", chunks=128) for weight in weights]
        found += [contrast(tile, weight, "fp32", pairs=False) for weight in weights]
        found += [
            contrast(tile, "uniform", "bf16", chunks, pairs) for chunks, pairs in ((1, True), (128, True), (1, False))
        ]
    return found + [finish(inside, pairs) for inside in (False, True) for pairs in (False, True)]


def pairwise(weight: str, i: Inputs) -> tuple[Tensor, ...]:
    u = BETA / 2 * (i["reward_w"][:, None] - i["reward_l"][None])
    similarity = F.normalize(i["emb_w"], dim=1, eps=1e-12) @ F.normalize(i["emb_l"], dim=1, eps=1e-12).T
    omega = torch.softmax(similarity / TEMPERATURE, 1)
    return (-(omega * F.logsigmoid(u)).sum(1).mean() if weight == "outside" else -F.logsigmoid(omega * u).mean(),)


def _rpo(i: Inputs, weight: str) -> tuple[Tensor, ...]:
    settings = {"beta": BETA, "temperature": TEMPERATURE, "weight": weight}
    return (fp.rpo_loss(i["reward_w"], i["reward_l"], i["emb_w"], i["emb_l"], **settings).loss,)


def workloads() -> list[Workload]:
    return [
        Workload(
            op="rpo_loss",
            variant=weight,
            make=plain.contrasts,
            run=lambda i, w=weight: _rpo(i, w),
            eager=lambda i, w=weight: pairwise(w, i),
            wrt=("reward_w", "reward_l"),
            shape=(65, 40),
        )
        for weight in ("outside", "inside")
    ]


def samples() -> dict[str, tuple]:
    rewards, embeddings = (tensor(4, grad=True), tensor(4, grad=True)), (tensor(4, 3), tensor(4, 3))
    return {
        "rpo_loss": (*rewards, *embeddings, 2.0, 0.5, "outside", 2),
        "rpo_loss[uniform]": (*rewards, None, None, 2.0, 0.5, "uniform", 1),
    }


ROWS = [
    Row(
        ('`rpo_loss(reward_w, reward_l, emb_w, emb_l, *, beta, temperature, weight="outside", group_size=None)`'),
        (
            "`-mean_i sum_j omega_ij log sigmoid(beta/2 (reward_w_i - reward_l_j))`, `omega_i = "
            "softmax_j(cos(emb_w_i, emb_l_j) / temperature)`"
        ),
        "to both rewards, none to the embeddings",
        "embeddings by tiles, O(M + N) memory",
        "8 a reward",
    ),
]

RPO_SIZES = on("rpo_loss", "test_matches_oracle and float32 and 33")
RPO = on("rpo_loss", "worked_by_hand or (test_contrast_groups and (12 or 36))")
RPO_WALKS = on("rpo_loss", "many_columns")


def fault(what: str, old: str, new: str, tests: tuple[str, ...], file: str = "triton") -> Fault:
    return Fault(what, f"rpo_loss/{file}.py", old, new, tests)


FAULTS = [
    fault(
        "epsilon of the norm",
        "tl.sqrt(tl.sum(total, axis=0)), 1e-12)",
        "tl.sqrt(tl.sum(total, axis=0)), 1.0)",
        on("rpo_loss", "test_matches_oracle and float32 and 7"),
        "embeddings",
    ),
    fault("embeddings of one part", "(x - high.to(tl.float32))", "(x - x)", RPO_WALKS, "embeddings"),
    fault(
        "columns beyond the group",
        "tl.where(mask_j[None, :], product",
        "tl.where(mask_j[None, :] | True, product",
        RPO_SIZES,
    ),
    fault("a small product left out", "small = tl.dot(w_rest, l, small)", "small = small", RPO_WALKS),
    fault(
        "online softmax rescaled the wrong way",
        "tl.where(total > 0.0, maximum - higher, 0.0)",
        "tl.where(total > 0.0, higher - maximum, 0.0)",
        RPO_WALKS,
    ),
    fault("entropy without its shift", "(moment + shift * total)", "moment", RPO_WALKS),
    fault("strips merged unscaled", "tl.sum(factor * totals, axis=0)", "tl.sum(totals, axis=0)", RPO_WALKS),
    fault(
        "group of the losers",
        "j = _clamped(group, local_j, columns)\n            if UNIFORM",
        "j = _clamped(0, local_j, columns)\n            if UNIFORM",
        RPO,
    ),
    fault("columns of earlier rows forgotten", "earlier + column, mask", "column, mask", on("rpo_loss", "many_rows")),
    fault(
        "softmax sum not applied",
        "omega *= tl.where(mask_i, 1.0 / total, 0.0)",
        "omega *= tl.where(mask_i, 1.0, 0.0)",
        RPO,
    ),
    fault("rows beyond the group", "omega *= tl.where(mask_i, 1.0 / total, 0.0)", "omega *= (1.0 / total)", RPO_SIZES),
]
