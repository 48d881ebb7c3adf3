"""The ops as PyTorch sees them: schema, fake tensors, autograd registration, torch.compile, import cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpref_kernels import add_keyed_noise, dpo_loss, implicit_reward, keyed_noise, rpo_loss

OPS = torch.ops.fastpref_kernels
ALPHAS_CUMPROD = torch.linspace(0.99, 0.01, 100)


def tensor(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def samples() -> dict[str, tuple]:
    bf16 = torch.bfloat16
    keys, timesteps = torch.arange(4), torch.tensor([1, 50, 98, 99])
    rewards, embeddings = (tensor(4, grad=True), tensor(4, grad=True)), (tensor(4, 3), tensor(4, 3))
    return {
        "implicit_reward": (tensor(4, 3, 5, grad=True), tensor(4, 3, 5), tensor(4, 3, 5), None, True),
        "implicit_reward[bf16]": (tensor(4, 6, grad=True, dtype=bf16), tensor(4, 6), None, tensor(4), False),
        "implicit_reward_backward": (tensor(4), tensor(4, 6, dtype=bf16), tensor(4, 6)),
        "dpo_loss": (*rewards, 2.0, 0.1),
        "rpo_loss": (*rewards, *embeddings, 2.0, 0.5, "outside", 2),
        "rpo_loss[uniform]": (*rewards, None, None, 2.0, 0.5, "uniform", 1),
        "keyed_noise": (keys, [3, 5], bf16),
        "add_keyed_noise": (tensor(4, 3, 5, grad=True), keys, timesteps, ALPHAS_CUMPROD),
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
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": package}, check=True
    )
    assert result.stdout.strip() == "False"
