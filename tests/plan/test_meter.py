"""The meter of peak memory and operations against sums by hand."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fastpref.plan.meter import Operations, PeakMemory

KB = 256  # fp32 values


def test_peak_of_lifetimes_by_hand() -> None:
    with FakeTensorMode():
        weight = torch.empty(4 * KB)
        with PeakMemory([weight]) as memory:
            a = torch.empty(2 * KB)
            b = a + 1  # 2 + 2
            del a
            c = torch.cat([b, b])  # 2 + 4
            view = c.view(2, -1)
            del b, c
            assert memory.live == 4096 and memory.peak == 6144
            view += 1
            weight.add_(1)
            assert memory.live == 4096 and memory.peak == 6144
            del view
            assert memory.live == 0


def test_gradients_are_told_from_the_rest() -> None:
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(KB))
        with PeakMemory([weight]) as memory:
            weight.register_post_accumulate_grad_hook(lambda p: memory.set_aside(p.grad))
            (weight * 2).sum().backward()
            assert memory.live == 1024 and memory.rest == 0
            kept = torch.empty(3 * KB)
            assert memory.rest_peak == 3072 and memory.peak == 4096
            del kept
            weight.grad = None
            assert memory.live == memory.rest == 0


def test_a_checkpoint_keeps_its_input_only() -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        return x.sin().sin().sin().sin()

    live = {}
    for checkpointed in (False, True):
        with FakeTensorMode():
            x = torch.empty(KB, requires_grad=True)
            with PeakMemory([x]) as memory:
                y = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
                live[checkpointed] = memory.live
                del y
    assert live == {False: 4096, True: 1024}


def test_counting_operations_keeps_nothing_alive() -> None:
    """Of checkpointed modules, whose recomputed activations have to go block by block."""
    peaks = {}
    for counter in (nullcontext(), Operations()):
        with FakeTensorMode():
            blocks = [torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4))) for _ in range(4)]
            known = [p for block in blocks for p in block.parameters()]
            x = torch.empty(1024, 16, requires_grad=True)
            with PeakMemory([*known, x]) as memory, counter:
                y = x
                for block in blocks:
                    y = checkpoint(block, y, use_reentrant=False)
                y.sum().backward()
            peaks[type(counter)] = memory.peak
    assert len(set(peaks.values())) == 1


def test_operations_by_hand() -> None:
    with FakeTensorMode(), Operations() as counter:
        a = torch.empty(3, 5, requires_grad=True)
        (a @ torch.empty(5, 7)).sum().backward()
        assert counter.total == 2 * (2 * 3 * 5 * 7)  # of the product and of a's gradient
    with FakeTensorMode(), Operations() as counter:
        q = torch.empty(2, 3, 16, 8)
        scaled_dot_product_attention(q, torch.empty(2, 3, 32, 8), torch.empty(2, 3, 32, 8))
        assert counter.total == 2 * (2 * 2 * 3 * 16 * 32 * 8)
