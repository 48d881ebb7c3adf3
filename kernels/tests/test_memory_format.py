"""Strides of dimensions of size 1 mean nothing, so no op may look at them."""

from __future__ import annotations

import pytest
import torch
from gpu.workloads import WORKLOADS, gradients, leaves

from fastpref_kernels.common.memory_format import Layout, as_dense, layout
from fastpref_kernels.common.strides import layout_of

ODD = 7
SHAPES = {  # one row, and something else of size 1
    "rpo_loss": (1, 4),
    "dpo_loss": (1, 1),
    "group_norm_silu": (1, 32, 5, 1),
    "geglu": (1, 8),
    "lora_linear": (1, 8, 8, 1),
}
LATENTS = (2, 1, 4, 1)  # losses of pairs need two rows


def odd(x: torch.Tensor, last: bool = False) -> torch.Tensor:
    """The same elements, channels last if asked for, with an odd stride for each dimension of size 1."""
    if last and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    strides = [ODD if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_an_op_does_not_look_at_strides_of_size_one(path: str, name: str, last: bool) -> None:
    w = WORKLOADS[name]
    inputs = leaves(w.make(SHAPES.get(w.op, LATENTS), torch.float32, "cpu"), w.wrt)
    strange = {n: odd(x.detach(), last).requires_grad_(x.requires_grad) for n, x in inputs.items()}
    found = []
    for given in (inputs, strange):
        outputs = w.run(given)
        found.append([*outputs, *(gradients(outputs, given, w.wrt) if w.wrt else ())])
    for expected, result in zip(*found, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("batch", [1, ODD, 10**6])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_one_image_is_dense_whatever_its_batch_stride(last: bool, batch: int) -> None:
    image = torch.randn(1, 8, 4, 6)
    image = image.to(memory_format=torch.channels_last) if last else image
    strange = image.as_strided(image.shape, (batch, *image.stride()[1:]))
    assert as_dense(strange, last).stride() == image.stride()
    assert layout(strange) == layout(image) == (Layout(True, 192, 8) if last else Layout(False, 192, 24))
    assert layout_of("op", strange) == layout_of("op", image)


def test_a_single_channel_is_dense_in_either_order() -> None:
    image = odd(torch.randn(2, 1, 4, 6))
    assert layout(image) == Layout(False, 24, 24)
    assert as_dense(image, False).stride() == (24, 24, 6, 1) and as_dense(image, True).stride() == (24, 1, 6, 1)
