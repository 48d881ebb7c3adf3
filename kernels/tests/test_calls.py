"""How ops are called: what they refuse and in which words, and what a compiler may let vary."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.case import ALPHAS_CUMPROD
from tolerances import assert_close
from transitions import same_step

import fastpref_kernels as fp

X, ROWS, EMB = torch.randn(4, 3, 5), torch.randn(2), torch.randn(2, 6)
KEYS = torch.arange(4)
PREDICTIONS = dict.fromkeys(("eps_cond", "eps_uncond", "ref_eps_cond", "ref_eps_uncond", "x_t", "x_w", "x_l"), X)
STEP = {"coefficients": same_step(4), "guidance_scale": 5.0}
REWARDS = {"reward_w": ROWS, "reward_l": -ROWS, "beta": 2.0}
LAYER = {"weight": torch.randn(7, 5), "lora_a": torch.randn(2, 5), "lora_b": torch.randn(7, 2)}
POOL = {name: X for name in ("x_t", "eps_cond", "eps_uncond")}
CALLS: dict[str, dict[str, Any]] = {
    "implicit_reward": {"pred": X, "target": X, "ref_pred": X},
    "implicit_reward_parts": {"pred": X, "target": X, "ref_error": X[:, 0, 0]},
    "paired_preference_loss": {"pred": X, "target": X, "ref_pred": X, "beta": 2.0, "kind": "dpo"},
    "dpo_loss": REWARDS | {"label_smoothing": 0.1},
    "rpo_loss": REWARDS | {"emb_w": EMB, "emb_l": EMB, "temperature": 0.5, "weight": "outside", "group_size": 2},
    "keyed_noise": {"keys": KEYS, "shape": (3,), "dtype": torch.float32},
    "add_keyed_noise": {"x0": X, "keys": KEYS, "a": torch.ones(4), "s": torch.ones(4)},
    "derive_keys": {"seed": 0, "epoch": 0, "ids": KEYS, "draw": 0, "purpose": "noise"},
    "keyed_uniform_u32": {"keys": KEYS},
    "ddim_pool_step": POOL | {"keys": KEYS[:, None]} | STEP,
    "predict_x0": POOL | STEP,
    "transition_loss": PREDICTIONS | {"beta": 2.0, "clip": 0.1} | STEP,
    "geglu": {"hidden": torch.randn(3, 8)},
    "lora_linear": {"x": X, "bias": torch.randn(7), "scale": 0.5} | LAYER,
}
WRONG: list[tuple[str, str, object]] = [
    (op, name, wrong)
    for op, given in CALLS.items()
    for name, value in given.items()
    for kind, wrong in ((torch.Tensor, "array"), (str, "other"), (float, "2.0"), (int, "2"), (torch.dtype, "float32"))
    if isinstance(value, kind)
]


@pytest.mark.parametrize(("op", "name", "wrong"), WRONG)
def test_strings_and_arrays_are_value_errors_of_one_line(op: str, name: str, wrong: object) -> None:
    given = CALLS[op]
    getattr(fp, op)(**given)
    value = given[name].numpy() if isinstance(given[name], torch.Tensor) else wrong
    with pytest.raises(ValueError, match=name) as error:
        getattr(fp, op)(**given | {name: value})
    assert "\n" not in str(error.value)


ALPHAS = {"timesteps": KEYS, "alphas_cumprod": ALPHAS_CUMPROD}
ALPHAS_AND_T = {"alphas_cumprod": ALPHAS_CUMPROD, "t": 50, "t_prev": 30}
OLD: list[tuple[Callable[[], Any], str]] = [
    (lambda: fp.implicit_reward(X, X, X), r"implicit_reward\(pred, target, \*, ref_pred=None"),  # type: ignore[misc]
    (lambda: fp.implicit_reward_parts(X, X, X), r"implicit_reward_parts\(pred, target, \*, ref_pred=None"),  # type: ignore[misc]
    (lambda: fp.paired_preference_loss(X, X, X, beta=2.0), r"\(pred, target, \*, beta, ref_pred=None"),  # type: ignore[misc]
    (lambda: fp.paired_preference_loss(X, None, X, beta=2.0), r"\(pred, target, \*, beta, ref_pred=None"),  # type: ignore[misc]
    (lambda: fp.add_keyed_noise(X, KEYS, **ALPHAS), r"add_keyed_noise\(x0, keys, a, s\)"),
    (lambda: fp.KeyedVelocity(KEYS, X, **ALPHAS), r"KeyedVelocity\(keys, x0, p, q\)"),
    (
        lambda: fp.ddim_pool_step(X, X, X, KEYS[:, None], ALPHAS_CUMPROD, 50, 30, guidance_scale=5.0),  # type: ignore[misc]
        r"ddim_pool_step\(x_t, eps_cond, eps_uncond, keys, coefficients, \*, guidance_scale",
    ),
    (
        lambda: fp.predict_x0(X, X, X, ALPHAS_CUMPROD, 50, guidance_scale=5.0),  # type: ignore[misc]
        r"predict_x0\(x_t, eps_cond, eps_uncond, coefficients, \*, guidance_scale\)",
    ),
    (
        lambda: fp.transition_loss(**PREDICTIONS, **ALPHAS_AND_T, guidance_scale=5.0),
        r"transition_loss\(eps_cond, .*x_l, coefficients, \*, guidance_scale",
    ),
    (lambda: fp.ddim_pool_step(**CALLS["ddim_pool_step"], eta=0.5), r"keys, coefficients, \*, guidance_scale"),
]


@pytest.mark.parametrize(("call", "new"), OLD)
def test_a_call_of_version_0_1_shows_the_new_one(call: Callable[[], Any], new: str) -> None:
    with pytest.raises(TypeError, match="since version 0.2 the call is .*" + new) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastpref_kernels.__version__"}
    assert fp.__version__ == "0.2.0"


def losses(beta: Any, other: Any) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Losses of a leaf (4, 3, 5), with two numbers that may vary."""
    fixed = PREDICTIONS | STEP | {"guidance_scale": other}
    lora, pool = (LAYER["weight"], None, LAYER["lora_a"], LAYER["lora_b"], other), CALLS["ddim_pool_step"]
    rpo = {"emb_w": EMB, "emb_l": EMB, "temperature": other}
    return {
        "dpo_loss": lambda x: fp.dpo_loss(x[:2, 0, 0], x[2:, 0, 0], beta=beta, label_smoothing=0.1 * other).loss,
        "rpo_loss": lambda x: fp.rpo_loss(x[:2, 0, 0], x[2:, 0, 0], EMB, EMB, beta=beta, temperature=other).loss,
        "paired_preference_loss": lambda x: fp.paired_preference_loss(x, X, ref_pred=-X, beta=beta).loss,
        "paired_preference_loss[rpo]": lambda x: (
            fp.paired_preference_loss(x, X, ref_pred=-X, beta=beta, kind="rpo", **rpo).loss
        ),
        "transition_loss": lambda x: (
            fp.transition_loss(**fixed | {"eps_cond": x, "ref_eps_cond": x.detach() + 0.1}, beta=beta, clip=other).loss
        ),
        "ddim_pool_step": lambda x: fp.ddim_pool_step(**pool | {"x_t": x, "guidance_scale": other}).x0.square().sum(),
        "lora_linear": lambda x: fp.lora_linear(x, *lora).sum(),
    }


def gradient(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("op", losses(1.0, 1.0))
def test_numbers_may_change_between_compiled_calls(op: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, beta, other: losses(beta, other)[op](x), fullgraph=True, backend="aot_eager")
    for beta, other in ((2.0, 0.5), (3.0, 0.75), (4.5, 1.25)):
        x = torch.randn(4, 3, 5, requires_grad=True)
        found, expected = compiled(x, beta, other), losses(beta, other)[op](x)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
        torch.testing.assert_close(gradient(found, x), gradient(expected, x), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("op", [name for name in losses(1.0, 1.0) if "loss" in name])
def test_beta_may_be_a_tensor(path: str, op: str) -> None:
    """It gives what the number gives; also compiled, where nobody can look at it."""
    x = torch.randn(4, 3, 5, requires_grad=True)
    expected = losses(3.0, 0.5)[op](x)
    stored = losses(torch.tensor(3.0), 0.5)[op](x)
    assert_close(stored, expected.double())
    assert_close(gradient(stored, x), gradient(expected, x).double())
    if path == "cpu":
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, beta: losses(beta, 0.5)[op](x), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, torch.tensor(3.0)), stored, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("op", losses(1.0, 1.0))
def test_a_second_derivative_is_an_error_and_no_zero(op: str) -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(losses(2.0, 0.5)[op](x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("beta", [torch.tensor([2.0]), torch.tensor(2)], ids=["vector", "integer"])
def test_a_beta_that_is_no_floating_scalar_is_refused(beta: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="floating scalar"):
        fp.dpo_loss(ROWS, ROWS, beta=beta)
