"""Attention on the GPU: each way that works there against float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastpref.models.attention import attention_fault, compute_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
]


@pytest.mark.parametrize("choice", ["sdpa", "xformers", "flash", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parity(choice: str, dtype: torch.dtype) -> None:
    """The bound is a few roundings of the dtype."""
    device = torch.device("cuda")
    if (fault := attention_fault(choice, device, dtype)) is not None:
        pytest.skip(f"{choice}: {fault}")
    random = torch.Generator(device).manual_seed(1)
    rounded = [torch.randn(2, 3, 64, 64, generator=random, device=device).to(dtype) for _ in range(3)]
    results = []
    for inputs, compute in (
        ([x.double() for x in rounded], scaled_dot_product_attention),
        (rounded, compute_of(choice)),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = compute(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    bound = 8 * torch.finfo(dtype).eps
    for expected, found in zip(*results, strict=True):
        assert (found.double() - expected).abs().max() <= bound * expected.abs().max()
