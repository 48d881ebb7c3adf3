"""The ops as PyTorch sees them: schema, fake tensors, autograd registration, torch.compile, import cost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpref_kernels import (
    add_keyed_noise,
    ddim_pool_step,
    dpo_loss,
    geglu,
    group_norm_silu,
    implicit_reward,
    keyed_noise,
    lora_linear,
    rpo_loss,
    transition_loss,
)

OPS = torch.ops.fastpref_kernels
ALPHAS_CUMPROD = torch.linspace(0.99, 0.01, 100)


def tensor(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def transition_samples() -> dict[str, tuple]:
    """The ops on DDIM transitions, with timesteps as numbers and by row, with and without guidance."""
    bf16, latent = torch.bfloat16, (2, 3, 5)
    rows, numbers = (torch.tensor([50, 98]), torch.tensor([0, 49]), -1, 0), (None, None, 50, 0)
    settings = (5.0, 0.5, -1.0, False)
    keys = torch.arange(6).view(2, 3)
    pool = (tensor(*latent, grad=True), tensor(*latent, grad=True))
    step = (*[tensor(*latent)] * 3, ALPHAS_CUMPROD, *numbers, *settings)
    stacked = (tensor(4, 3, 5, grad=True, dtype=bf16), tensor(4, 3, 5, grad=True), *[tensor(4, 3, 5)] * 3)
    return {
        "ddim_pool_step": (*pool, tensor(*latent, grad=True, dtype=bf16), keys, ALPHAS_CUMPROD, *rows, *settings),
        "ddim_pool_step[plain]": (*pool, None, keys, ALPHAS_CUMPROD, *numbers, *settings),
        "ddim_pool_step_backward": (
            *(tensor(2, 3, 3, 5), tensor(*latent), ALPHAS_CUMPROD, *rows, *settings),
            *(torch.float32, bf16, None),
        ),
        "transition_loss": (*stacked, *[tensor(*latent)] * 2, ALPHAS_CUMPROD, *rows, *settings, 10.0, -0.1, 0.1),
        "transition_loss[plain]": (tensor(*latent, grad=True), None, tensor(*latent), None, *step, 10.0, -0.1, 0.1),
        "transition_loss_backward": (tensor(), tensor(2, 2), tensor(*latent, dtype=bf16), tensor(*latent), *step),
    }


def unet_samples() -> dict[str, tuple]:
    """The layers of the UNet, with the outputs that their forward saves for the backward."""
    bf16, x, weight, bias = torch.bfloat16, tensor(2, 6, 3, 5), tensor(6), tensor(6)
    last = tensor(2, 6, 3, 5, dtype=bf16).to(memory_format=torch.channels_last)
    saved = OPS.group_norm_silu(x, 3, weight, bias, 1e-5, True)[1:]
    loras = tensor(2, 6, grad=True), tensor(4, 2, grad=True)
    return {
        "group_norm_silu": (tensor(2, 6, 3, 5, grad=True), 3, tensor(6, grad=True), tensor(6, grad=True), 1e-5, True),
        "group_norm_silu[last]": (last.requires_grad_(), 2, tensor(6), tensor(6), 1e-5, True),
        "group_norm_silu_backward": (tensor(2, 6, 3, 5), x, 3, weight, bias, *saved, True),
        "geglu": (tensor(2, 3, 10, grad=True, dtype=bf16),),
        "geglu_backward": (tensor(2, 3, 5), tensor(2, 3, 10)),
        "lora_linear": (tensor(3, 2, 6, grad=True), tensor(4, 6), tensor(4), *loras, 0.5, False),
        "lora_linear[mixed]": (tensor(3, 6, dtype=bf16), tensor(4, 6, dtype=bf16), None, *loras, 0.5, False),
        "lora_linear_backward": (
            tensor(3, 4),
            tensor(3, 6),
            tensor(4, 6),
            tensor(2, 6),
            tensor(4, 2),
            tensor(3, 2),
            0.5,
            True,
            True,
            True,
        ),
    }


def samples() -> dict[str, tuple]:
    bf16 = torch.bfloat16
    keys, timesteps = torch.arange(4), torch.tensor([1, 50, 98, 99])
    rewards, embeddings = (tensor(4, grad=True), tensor(4, grad=True)), (tensor(4, 3), tensor(4, 3))
    return {
        "implicit_reward": (tensor(4, 3, 5, grad=True), tensor(4, 3, 5), *[None] * 3, tensor(4, 3, 5), None, True),
        "implicit_reward[noise]": (tensor(4, 6, grad=True, dtype=bf16), None, keys, *[None] * 3, tensor(4), False),
        "implicit_reward[velocity]": (
            *(tensor(4, 6, grad=True), tensor(4, 6), keys, timesteps, ALPHAS_CUMPROD),
            *(None, tensor(4), False),
        ),
        "implicit_reward_backward": (tensor(4), torch.tensor(2.0), tensor(4, 6, dtype=bf16), tensor(4, 6), *[None] * 3),
        "implicit_reward_backward[noise]": (tensor(4), None, tensor(4, 6, dtype=bf16), None, keys, None, None),
        "dpo_loss": (*rewards, 2.0, 0.1),
        "rpo_loss": (*rewards, *embeddings, 2.0, 0.5, "outside", 2),
        "rpo_loss[uniform]": (*rewards, None, None, 2.0, 0.5, "uniform", 1),
        "keyed_noise": (keys, [3, 5], bf16),
        "add_keyed_noise": (tensor(4, 3, 5, grad=True), keys, timesteps, ALPHAS_CUMPROD),
        "add_keyed_noise_backward": (tensor(4, 3, 5), keys, timesteps, ALPHAS_CUMPROD),
        **transition_samples(),
        **unet_samples(),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(OPS, name.split("[")[0]).default, samples()[name])


def loss_of(pred: torch.Tensor, target: torch.Tensor, ref_pred: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    """Every op of the package in one function."""
    keys, timesteps = torch.arange(pred.shape[0]), torch.arange(pred.shape[0])
    noisy = add_keyed_noise(pred, keys, timesteps, ALPHAS_CUMPROD)
    noisy = noisy + keyed_noise(keys, pred.shape[1:], pred.dtype)
    winners, losers = implicit_reward(noisy, target, ref_pred).chunk(2)
    rpo = rpo_loss(winners, losers, emb, emb, beta=2.0, temperature=0.5, group_size=2)
    return rpo.loss + dpo_loss(winners, losers, beta=2.0).loss * rpo.effective_contrasts


def test_compiles_as_one_graph(path: str) -> None:
    target, ref_pred, emb = tensor(8, 3, 5), tensor(8, 3, 5), tensor(4, 6)
    pred = tensor(8, 3, 5)
    eager, compiled = (pred.clone().requires_grad_() for _ in range(2))
    expected = loss_of(eager, target, ref_pred, emb)
    torch._dynamo.reset()
    result = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(compiled, target, ref_pred, emb)
    expected.backward()
    result.backward()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-6, atol=1e-6)


def test_results_repeat_bit_for_bit(path: str) -> None:
    inputs = tensor(8, 40), tensor(8, 40), tensor(8, 40), tensor(4, 6)
    runs = []
    for _ in range(2):
        pred = inputs[0].clone().requires_grad_()
        loss_of(pred, *inputs[1:]).backward()
        runs.append(pred.grad)
    assert torch.equal(runs[0], runs[1])


def test_importing_the_package_does_not_import_triton() -> None:
    if torch.version.cuda or torch.version.hip:
        pytest.skip("a torch built for a GPU imports triton with the package")
    code = "import sys, fastpref_kernels; print('triton' in sys.modules)"
    package = str(Path(__file__).parents[1])
    asked_for = ("TRITON_INTERPRET", "FASTPREF_KERNELS_TRITON")
    environment = {key: value for key, value in os.environ.items() if key not in asked_for} | {"PYTHONPATH": package}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "False"


def transitions_of(x_t: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
    keys, options = torch.arange(4).view(2, 2), {"guidance_scale": 5.0}
    pool = ddim_pool_step(x_t, cond, uncond, keys, ALPHAS_CUMPROD, t, t - 20, eta=0.5, **options)
    ends = pool.candidates.detach().unbind(1)
    reference = 0.9 * cond.detach(), uncond.detach()
    found = transition_loss(cond, uncond, *reference, x_t, *ends, ALPHAS_CUMPROD, t, t - 20, clip=None, **options)
    return found.loss + found.ratio_w.sum() + pool.x0.square().mean()


@pytest.mark.parametrize("t", [50, torch.tensor([20, 98])], ids=["number", "rows"])
def test_transitions_compile_as_one_graph(path: str, t: int | torch.Tensor) -> None:
    inputs = tensor(2, 3, 5), tensor(2, 3, 5), tensor(2, 3, 5)
    eager, compiled = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    expected = transitions_of(*eager, t)
    torch._dynamo.reset()
    result = torch.compile(transitions_of, fullgraph=True, backend="aot_eager")(*compiled, t)
    expected.backward()
    result.backward()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-6)


def layers_of(x: torch.Tensor, norm: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    hidden = group_norm_silu(x, 2, norm, norm).flatten(2).transpose(1, 2).contiguous()
    return geglu(lora_linear(hidden, lora_b.detach() @ lora_a.detach(), None, lora_a, lora_b, 0.5)).square().sum()


def test_layers_compile_as_one_graph(path: str) -> None:
    inputs = tensor(2, 6, 3, 5), tensor(6), tensor(2, 6), tensor(8, 2)
    eager, compiled = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    expected = layers_of(*eager)
    torch._dynamo.reset()
    result = torch.compile(layers_of, fullgraph=True, backend="aot_eager")(*compiled)
    expected.backward()
    result.backward()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)
