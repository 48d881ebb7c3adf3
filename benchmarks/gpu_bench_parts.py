"""The parts of gpu_bench.py that are no training steps of ours: rates, attention, a round of SPO, kernels in short."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import op_bench_gpu
import torch
from devices import CPU, seconds
from gpu_bench_measure import Row, graphs, guarded, operations, recomputation
from gpu_bench_steps import arm
from gpu_bench_world import World
from spo_bench import Bench, Outcome
from spo_vs_reference import random_scorer
from spo_vs_reference_report import ROLLOUT, SCORING, TRAINING
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastpref.config import load_config
from fastpref.emoji.random_models import make_random_clip
from fastpref.models.attention import Attention, attention_fault, compute_of

CALLS = 10  # of a kernel in a repeat
MATH_SCORES = 1 << 31  # bytes of scores beyond which plain attention is left out
SDPA = {
    "sdpa": None,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of q and of k, (rows, heads, length, width)


def rates(world: World) -> Iterator[Row]:
    """What this device multiplies and copies in a second, and the operations of a row of the UNet."""
    yield from guarded(world, "rates", "bf16 matrix product", partial(_matrix_rate, world))
    yield from guarded(world, "rates", "copy", partial(_copy_rate, world))
    yield from guarded(world, "rates", "operations", partial(_operations, world))


def _matrix_rate(world: World) -> Iterator[Row]:
    side = 8192 if world.device.type == "cuda" else 256
    a, b = (torch.randn(side, side, device=world.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    for repeat, taken in _repeats(world, lambda: torch.mm(a, b, out=out)):
        yield {"repeat": repeat, "ms": round(1e3 * taken, 6), "tflop_s": round(2 * side**3 / taken / 1e12, 4)}


def _copy_rate(world: World) -> Iterator[Row]:
    size = 1 << (30 if world.device.type == "cuda" else 20)
    source, out = (torch.empty(size, dtype=torch.uint8, device=world.device) for _ in range(2))
    for repeat, taken in _repeats(world, lambda: out.copy_(source)):
        yield {"repeat": repeat, "ms": round(1e3 * taken, 6), "gb_s": round(2 * size / taken / 1e9, 3)}


def _operations(world: World) -> Iterator[Row]:
    chosen = arm("", "dpo", pairs=1)
    yield from operations(world.trainer(*chosen.settings, *graphs("off")), "lora")


def _repeats(world: World, call: Callable[[], Any]) -> Iterator[tuple[int, float]]:
    """(repeat, seconds of a call), each the mean of :data:`CALLS` in a row."""

    def several() -> None:
        for _ in range(CALLS):
            call()

    several()
    for repeat in range(world.repeats):
        yield repeat, seconds(several, world.device) / CALLS


def attention(world: World) -> Iterator[Row]:
    """Every way to compute attention, forward and backward, at the shapes of a UNet pass of four pairs and of one."""
    side = world.config().resolution // 8 if world.model == "sdxl" else 8
    for rows in (8, 2):
        for (q, k), layers in attention_shapes(world.weights.empty, rows, side).items():
            shape = f"{_text(q)}, {k[2]} keys"
            for name in (*SDPA, "xformers", "flash"):
                more = {"backend": name, "shape": shape, "layers": layers, "rows": rows}
                for row in guarded(world, "attention", f"{name}: {shape}", partial(_attention, world, name, q, k)):
                    yield row | more


def attention_shapes(empty: Any, rows: int, side: int) -> Counter[Shapes]:
    """How many layers of a UNet, which is on the meta device, attend in each shape; latents are of ``side``²."""
    unet, found = copy.deepcopy(empty), Counter[Shapes]()

    def note(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found[tuple(q.shape), tuple(k.shape)] += 1
        return torch.empty_like(q)

    unet.set_attn_processor(Attention(note))
    settings, meta = unet.config, {"device": "meta"}
    more = None
    if settings.get("addition_embed_type") == "text_time":
        pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
        more = {"text_embeds": torch.empty(rows, pooled, **meta), "time_ids": torch.empty(rows, 6, **meta)}
    unet(
        torch.empty(rows, settings["in_channels"], side, side, **meta),
        torch.zeros(rows, dtype=torch.int64, **meta),
        torch.empty(rows, 77, settings["cross_attention_dim"], **meta),
        added_cond_kwargs=more,
    )
    return found


def _attention(world: World, name: str, q: tuple[int, ...], k: tuple[int, ...]) -> Iterator[Row]:
    if name == "sdpa math" and 2 * q[0] * q[1] * q[2] * k[2] > MATH_SCORES:
        return
    if name not in SDPA and (fault := attention_fault(name, world.device, torch.bfloat16)) is not None:
        yield {"note": f"left out: {fault}"}
        return
    tensors = [torch.randn(size, device=world.device).bfloat16().requires_grad_() for size in (q, k, k)]
    compute = scaled_dot_product_attention if name in SDPA else compute_of(name)
    backend = SDPA.get(name)

    def call() -> None:
        out = compute(*tensors) if backend is None else _with(backend, tensors)
        torch.autograd.grad(out, tensors, out.detach())

    try:
        for repeat, taken in _repeats(world, call):
            yield {"repeat": repeat, "ms": round(1e3 * taken, 6)}
    except RuntimeError as error:
        if not any(said in str(error) for said in ("No viable backend", "No available kernel")):
            raise
        yield {"note": f"left out: torch has none for {world.device.type}"}


def _with(backend: SDPBackend, tensors: list[torch.Tensor]) -> torch.Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*tensors)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


# One of six steps is plain, of the published twenty four; what a pool and a pair cost is the same. The VAE is one that
# half precision does not overflow, as SPO's own code takes for SDXL; the preference model is small.
SPO = (
    *("sample_steps=6", "plain_steps=1", "candidates=4", "rollout_batch_size=2", "score_threshold=0"),
    *("batch_size=2", "vae_precision=bf16"),
)
SPO_PROMPTS = 2


def spo(world: World) -> Iterator[Row]:
    """A round of SPO, ours and by the literal order of work."""
    yield from guarded(world, "spo", "round", partial(_rounds, world))


def _rounds(world: World) -> Iterator[Row]:
    folder = world.folder / "spo"
    if not folder.is_dir():
        make_random_clip(folder / "clip")
        random_scorer(folder / "clip", folder / "scorer")
    models = [f"model={world.with_parts('vae')}", f"scorer={folder / 'scorer'}"]
    # Eight rows are the most that a graph is kept of, and what one side keeps the other does.
    overrides = ["method=spo", "beta=10", *SPO, *recomputation("none"), *models]
    world.free()
    world.weights.lent = True
    bench = Bench(load_config("", [*world.settings, *overrides]), SPO_PROMPTS, folder)
    for repeat in range(-1, world.repeats):
        outcomes = {"ours": bench.ours(), "literal": bench.other()}
        if repeat >= 0:
            yield from (_round_row(side, repeat, outcomes) for side in outcomes)


def _round_row(side: str, repeat: int, outcomes: dict[str, Outcome]) -> Row:
    found, same = outcomes[side], outcomes["ours"].pairs == outcomes["literal"].pairs
    spent = found.seconds
    phases = {"rollout_ms": spent[ROLLOUT] + spent[SCORING], "training_ms": spent[TRAINING], "ms": spent["total"]}
    return {
        **{"side": side, "repeat": repeat, "pairs": len(found.pairs)},
        **{name: round(1e3 * value, 3) for name, value in phases.items()},
        "prompts_an_hour": round(3600 * SPO_PROMPTS / spent["total"], 2),
        "note": "" if same else "rounding made the two sides keep other pairs",
    }


def kernels(world: World) -> Iterator[Row]:
    """Every kernel at its middle size beside eager torch in bf16."""
    small, device = world.device.type == CPU, world.device.type
    bandwidth = op_bench_gpu.copy_bandwidth(device)
    for w, shape in op_bench_gpu.middle_sizes(small=small):
        for form in op_bench_gpu.SHORT:
            measure = partial(op_bench_gpu.measure, w, shape, form, bandwidth, device)
            yield from guarded(world, "kernels", f"{w.name}, {form}", partial(_kernel, measure))


def _kernel(measure: Callable[[], Row]) -> Iterator[Row]:
    row = measure()
    yield {name: row[name] for name in ("shape", "form", "ms", "gb_s", "share_of_copy") if name in row}
