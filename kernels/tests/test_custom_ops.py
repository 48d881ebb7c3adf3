"""The ops as PyTorch sees them: schema, fake tensors, autograd registration, torch.compile, import cost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import samples
from cases.case import tensor
from transitions import same_step, steps

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


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.fastpref_kernels, name.split("[")[0]).default, samples()[name])


def loss_of(pred: torch.Tensor, target: torch.Tensor, ref_pred: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    """Every op of the package in one function."""
    keys, a = torch.arange(pred.shape[0]), torch.linspace(1, 0, pred.shape[0])
    noisy = add_keyed_noise(pred, keys, a, 1 - a)
    noisy = noisy + keyed_noise(keys, pred.shape[1:], pred.dtype)
    winners, losers = implicit_reward(noisy, target, ref_pred=ref_pred).chunk(2)
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


def transitions_of(x_t: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    keys, options = torch.arange(4).view(2, 2), {"guidance_scale": 5.0}
    pool = ddim_pool_step(x_t, cond, uncond, keys, step, **options)
    ends = pool.candidates.detach().unbind(1)
    reference = 0.9 * cond.detach(), uncond.detach()
    found = transition_loss(cond, uncond, *reference, x_t, *ends, step, clip=None, **options)
    return found.loss + found.ratio_w.sum() + pool.x0.square().mean()


@pytest.mark.parametrize("shared", [True, False], ids=["one step", "a step a row"])
def test_transitions_compile_as_one_graph(path: str, shared: bool) -> None:
    step = same_step(1).expand(2, 5) if shared else steps(torch.tensor([21, 951]), torch.tensor([1, 901]))
    inputs = tensor(2, 3, 5), tensor(2, 3, 5), tensor(2, 3, 5)
    eager, compiled = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    expected = transitions_of(*eager, step)
    torch._dynamo.reset()
    result = torch.compile(transitions_of, fullgraph=True, backend="aot_eager")(*compiled, step)
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
