"""Attention computed in other ways is the same attention, and what cannot be had is said in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.models import attention
from fastpref.models.attention import attention_fault, set_attention, sliced_attention
from fastpref.train.job import TrainJob

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")


def inputs(dtype: torch.dtype, *, queries: int = 37, keys: int = 19) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    made = [torch.randn(2, 3, n, 16, generator=g, dtype=torch.float64) for n in (queries, keys, keys)]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


@pytest.mark.parametrize("slices", [1, 5, 37])
def test_sliced_attention_and_its_gradients_are_sdpa(monkeypatch: pytest.MonkeyPatch, slices: int) -> None:
    q, k, v = inputs(torch.float64)
    monkeypatch.setattr(attention, "_SLICE_BYTES", -(-37 // slices) * 2 * 3 * 19 * 8)
    weight = torch.randn(2, 3, 37, 16, dtype=torch.float64)
    results = []
    for compute in (scaled_dot_product_attention, sliced_attention):
        out = compute(q, k, v)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_slices_keep_no_scores() -> None:
    """What the backward keeps is of the size of the inputs, not of queries times keys."""
    q, k, v = inputs(torch.float32, queries=512, keys=512)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        sliced_attention(q, k, v)
    assert max(kept, default=0) < 512 * 512


def step(config: Config) -> tuple[float, torch.Tensor]:
    trainer = TrainJob.open(config).trainer
    loss = [trainer.step(n)["loss"] for n in range(2)][-1]
    return loss, torch.cat([p.detach().flatten() for p in trainer.policy.trainable.values()])


@pytest.mark.parametrize("extra", [["attention=sliced"], ["attention=sdpa"], ["fused_ops=true"]])
def test_training_is_the_same_function(sdxl_config: MakeConfig, extra: list[str]) -> None:
    common = ["method=dpo", "beta=200", "batch_size=2", "precision=fp64", "learning_rate=1e-2"]
    (loss, weights), (other, found) = step(sdxl_config(*common)), step(sdxl_config(*common, *extra))
    assert loss != pytest.approx(0.6931, abs=1e-3) and other == pytest.approx(loss, rel=1e-9)
    assert (found - weights).abs().max() < 1e-7 * weights.abs().max()


def test_fused_ops_and_slices_run_in_bf16_with_a_frozen_copy(sdxl_config: MakeConfig) -> None:
    common = ["method=dpo", "beta=20", "batch_size=2", "precision=bf16", "train=full", "gradient_checkpointing=full"]
    plain, _ = step(sdxl_config(*common))
    loss, _ = step(sdxl_config(*common, "fused_ops=true", "attention=sliced"))
    assert loss == pytest.approx(plain, rel=2e-2)


def fake(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


@pytest.mark.parametrize(("choice", "package"), [("xformers", "xformers"), ("flash", "flash_attn")])
def test_what_cannot_be_used_is_one_line(
    sdxl_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, choice: str, package: str
) -> None:
    """Not installed; installed without an operator for this device; broken."""

    def refuse(*_: Any) -> None:
        raise NotImplementedError("No operator found\nfor this device")

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"attention {choice}: not installed.*attention=auto"):
        TrainJob.open(sdxl_config(f"attention={choice}", "method=dpo"))
    ops = fake(f"{package}.ops", memory_efficient_attention=refuse)
    monkeypatch.setitem(sys.modules, package, fake(package, ops=ops, flash_attn_func=refuse))
    monkeypatch.setitem(sys.modules, f"{package}.ops", ops)
    assert attention_fault(choice, CPU, torch.float32) == "does not work on cpu in float32: No operator found"
    TrainJob.open(sdxl_config("attention=auto", "method=dpo"))


def test_a_package_that_works_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout is (N, length, heads, width)."""

    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v)

    monkeypatch.setitem(sys.modules, "flash_attn", fake("flash_attn", flash_attn_func=operator))
    q, k, v = inputs(torch.float64)
    assert attention_fault("flash", CPU, torch.float64) is None
    found = attention._COMPUTES["flash"](q, k, v)
    assert torch.allclose(found, scaled_dot_product_attention(q, k, v), atol=1e-12)


def test_short_memory_is_met_with_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(torch.float64)
    used: list[str] = []
    monkeypatch.setattr(attention, "sliced_attention", lambda *x: used.append("sliced") or x[0])
    for free in (4 * 2 * 3 * 37 * 19 * 8, 4 * 2 * 3 * 37 * 19 * 8 - 1):
        monkeypatch.setattr(attention, "free_bytes", lambda _, free=free: free)
        used.append(str(free))
        attention._by_free_memory(q, k, v)
    assert used[-1] == "sliced" and used.count("sliced") == 1


def test_set_attention_leaves_the_default_alone() -> None:
    class Unet:
        def set_attn_processor(self, _: Any) -> None:
            raise AssertionError

    for choice in ("auto", "sdpa"):
        set_attention(Unet(), choice, CPU, torch.float32)
