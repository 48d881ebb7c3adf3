"""Every op at any size, beside eager torch that computes the same: for tests on a GPU, byte counts and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastpref_kernels as fp
from gpu import plain
from gpu.plain import BETA, CANDIDATES, GUIDANCE, MILD_BETA, T_PREV, TEMPERATURE, Inputs, T


@dataclass(frozen=True)
class Workload:
    """One op in one variant.

    make(shape, dtype, device): inputs. run, eager (inputs -> outputs): the op, and plain torch in the inputs' dtypes.
    wrt: inputs that get a gradient. per: the input or output size that bytes are counted for.
    forward, backward: bytes per element at 16 bits, None where the op's docstring states none; stated: where it does.
    """

    op: str
    variant: str
    make: Callable[[tuple[int, ...], torch.dtype, str], Inputs]
    run: Callable[[Inputs], tuple[Tensor, ...]]
    eager: Callable[[Inputs], tuple[Tensor, ...]]
    wrt: tuple[str, ...]
    shape: tuple[int, ...]  # small, for tests
    forward: float | None = None
    backward: float | None = None
    stated: str = ""
    elements: Callable[[tuple[int, ...]], int] = field(default=lambda shape: int(torch.Size(shape).numel()))

    @property
    def name(self) -> str:
        return f"{self.op}[{self.variant}]" if self.variant else self.op


def _op_reward(i: Inputs, target: Any) -> tuple[Tensor, ...]:
    return (fp.implicit_reward(i["pred"], target, i.get("ref_pred"), ref_error=i.get("ref_error")),)


def _kept(i: Inputs) -> Any:
    return fp.KeyedVelocity(i["keys"], i["x0"], i["timesteps"], i["alphas"])


def _rewards() -> list[Workload]:
    found = []
    for variant, more, forward in (("ref_pred", {}, (6, 4, 6)), ("ref_error", {"ref_error": plain.errors}, (4, 2, 4))):
        names = ("pred", "ref_pred") if variant == "ref_pred" else ("pred",)
        common = {"op": "implicit_reward", "wrt": ("pred",), "shape": (1, 4, 64, 128)}
        velocity = {"keys": plain.keys, "timesteps": plain.timesteps, "alphas": plain.alphas}
        found += [
            Workload(
                variant=f"tensor,{variant}",
                make=plain.latents(*names, "target", **more),
                run=lambda i: _op_reward(i, i["target"]),
                eager=lambda i: plain.reward(i, i["target"]),
                forward=forward[0],
                backward=6,
                stated="target tensor   6 (4)   6",
                **common,
            ),
            Workload(
                variant=f"noise,{variant}",
                make=plain.latents(*names, keys=plain.keys, **more),
                run=lambda i: _op_reward(i, fp.KeyedNoise(i["keys"])),
                eager=lambda i: plain.reward(i, plain.noise(i, i["pred"])),
                forward=forward[1],
                backward=4,
                stated="KeyedNoise   4 (2)   4",
                **common,
            ),
            Workload(
                variant=f"velocity,{variant}",
                make=plain.latents(*names, "x0", **velocity, **more),
                run=lambda i: _op_reward(i, _kept(i)),
                eager=lambda i: plain.reward(i, plain.velocity(i["x0"], plain.noise(i, i["x0"]), i)),
                forward=forward[2],
                backward=6,
                stated="KeyedVelocity   6 (4)   6",
                **common,
            ),
        ]
    return found


def _noises() -> list[Workload]:
    schedule = {"keys": plain.keys, "timesteps": plain.timesteps, "alphas": plain.alphas}
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
            make=plain.latents("x0", **schedule),
            run=lambda i: (fp.add_keyed_noise(i["x0"], i["keys"], i["timesteps"], i["alphas"]),),
            eager=lambda i: (plain.noised(i["x0"], plain.noise(i, i["x0"]), i),),
            wrt=("x0",),
            shape=(2, 4, 64, 64),
            forward=4,
            backward=4,
            stated="add_keyed_noise 4 (a read and a write), its backward 4",
        ),
    ]


def _rpo(i: Inputs, weight: str) -> tuple[Tensor, ...]:
    settings = {"beta": BETA, "temperature": TEMPERATURE, "weight": weight}
    return (fp.rpo_loss(i["reward_w"], i["reward_l"], i["emb_w"], i["emb_l"], **settings).loss,)


def _losses() -> list[Workload]:
    rewards = ("reward_w", "reward_l")
    rpo = [
        Workload(
            op="rpo_loss",
            variant=weight,
            make=plain.contrasts,
            run=lambda i, w=weight: _rpo(i, w),
            eager=lambda i, w=weight: plain.pairwise(w, i),
            wrt=rewards,
            shape=(65, 40),
        )
        for weight in ("outside", "inside")
    ]
    return [
        Workload(
            op="dpo_loss",
            variant="",
            make=plain.contrasts,
            run=lambda i: (fp.dpo_loss(i["reward_w"], i["reward_l"], beta=BETA).loss,),
            eager=lambda i: (-F.logsigmoid(BETA / 2 * (i["reward_w"] - i["reward_l"])).mean(),),
            wrt=rewards,
            shape=(2048, 1),
            forward=24,
            stated="Bytes per pair: forward 24",
            elements=lambda shape: shape[0],
        ),
        *rpo,
        Workload(
            op="paired_preference_loss",
            variant="dpo,noise",
            make=plain.latents("pred", "ref_pred", keys=plain.keys),
            run=lambda i: (
                fp.paired_preference_loss(i["pred"], i["ref_pred"], fp.KeyedNoise(i["keys"]), beta=MILD_BETA)[0],
            ),
            eager=plain.paired,
            wrt=("pred",),
            shape=(4, 4, 64, 64),
        ),
    ]


def _spo(i: Inputs) -> tuple[Tensor, ...]:
    names = ("eps_cond", "eps_uncond", "ref_eps_cond", "ref_eps_uncond", "x_t", "x_w", "x_l")
    settings = {"guidance_scale": GUIDANCE, "eta": 1.0, "beta": BETA / 500, "clip": None}
    return (fp.transition_loss(*(i[name] for name in names), i["alphas"], T, T_PREV, **settings)[0],)


def _steps() -> list[Workload]:
    predictions = ("eps_cond", "eps_uncond")
    return [
        Workload(
            op="ddim_pool_step",
            variant=f"K={CANDIDATES}",
            make=plain.latents("x_t", *predictions, keys=plain.pool_keys, alphas=plain.alphas),
            run=lambda i: tuple(
                fp.ddim_pool_step(
                    i["x_t"], i["eps_cond"], i["eps_uncond"], i["keys"], i["alphas"], T, T_PREV, guidance_scale=GUIDANCE
                )
            ),
            eager=plain.pool,
            wrt=("x_t", *predictions),
            shape=(2, 4, 64, 64),
            forward=8 + 2 * CANDIDATES,
            backward=8 + 2 * CANDIDATES,
            stated="forward 8 + 2K",
        ),
        Workload(
            op="transition_loss",
            variant="shared x_t",
            make=plain.latents(
                *predictions, "ref_eps_cond", "ref_eps_uncond", "x_t", "x_w", "x_l", alphas=plain.alphas
            ),
            run=_spo,
            eager=plain.transition,
            wrt=predictions,
            shape=(2, 4, 128, 128),
            forward=14,
            backward=8,
            stated="forward 14 [10]",
        ),
    ]


def _layers() -> list[Workload]:
    return [
        Workload(
            op="group_norm_silu",
            variant="",
            make=plain.activation,
            run=lambda i: (fp.group_norm_silu(i["x"], 32, i["weight"], i["bias"]),),
            eager=lambda i: (F.silu(F.group_norm(i["x"], 32, i["weight"], i["bias"])),),
            wrt=("x", "weight", "bias"),
            shape=(2, 64, 48, 48),
            forward=6,
            backward=10,
            stated="forward 6 (two reads and one write), backward 10 (four reads and one write)",
        ),
        Workload(
            op="geglu",
            variant="",
            make=lambda shape, dtype, device: {"x": torch.randn(shape, device=device).to(dtype)},
            run=lambda i: (fp.geglu(i["x"]),),
            eager=lambda i: (torch.mul(i["x"].chunk(2, -1)[0], F.gelu(i["x"].chunk(2, -1)[1])),),
            wrt=("x",),
            shape=(64, 2560),
            forward=6,
            backward=10,
            stated="forward 6 (two reads and one write), backward 10 (three reads and two writes)",
            elements=lambda shape: int(torch.Size(shape).numel()) // 2,
        ),
        Workload(
            op="lora_linear",
            variant="",
            make=plain.lora,
            run=lambda i: (fp.lora_linear(i["x"], i["weight"], None, i["lora_a"], i["lora_b"], 0.5),),
            eager=lambda i: (i["x"] @ i["weight"].T + 0.5 * (i["x"] @ i["lora_a"].T) @ i["lora_b"].T,),
            wrt=("x", "lora_a", "lora_b"),
            shape=(96, 64, 128, 8),
        ),
    ]


WORKLOADS = {w.name: w for w in (*_rewards(), *_noises(), *_losses(), *_steps(), *_layers())}


def gradients(outputs: tuple[Tensor, ...], inputs: Inputs, wrt: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Of the outputs, each weighted with fixed pseudo-random numbers of its shape."""
    weights = []
    for x in outputs:
        wave = torch.sin(torch.arange(x.numel(), device=x.device, dtype=torch.float64) * 12.9898).view(x.shape)
        weights.append(wave.to(x.dtype) if x.dim() else torch.ones_like(x))
    return torch.autograd.grad(outputs, [inputs[name] for name in wrt], weights)


def leaves(inputs: Inputs, wrt: tuple[str, ...], dtype: torch.dtype | None = None) -> Inputs:
    """A copy whose `wrt` require gradients; floating tensors in `dtype` if one is given."""
    fresh = {}
    for name, x in inputs.items():
        x = x.detach().clone()
        if dtype is not None and x.dtype.is_floating_point:
            x = x.to(dtype)
        fresh[name] = x.requires_grad_(name in wrt)
    return fresh
