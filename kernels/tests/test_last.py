"""Counters of the launches whose last program adds up: whose they are, and that they are zero."""

from __future__ import annotations

import pytest
import torch

from fastpref_kernels import implicit_reward
from fastpref_kernels.common import last

GPU = torch.device("cuda", 0)


class Device:
    """What torch says of a GPU that is not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, self.made = 7, False, []
        monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: self.capturing, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: self.stream, raising=False)
        monkeypatch.setattr(last, "_zeros", self.zeros)
        monkeypatch.setattr(last, "_of_stream", {})
        monkeypatch.setattr(last, "_for_graphs", {})

    def zeros(self, device: torch.device, count: int) -> torch.Tensor:
        self.made.append((count, self.capturing))
        return torch.zeros(count, dtype=torch.int32)


def overlap(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.data_ptr() < y.data_ptr() + 4 * len(y) and y.data_ptr() < x.data_ptr() + 4 * len(x)


def test_a_stream_has_its_own_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    first = last.counters(GPU, 2)
    made = list(device.made)
    assert last.counters(GPU, 128) is first and device.made == made
    assert len(last.counters(GPU, 5000)) >= 5000
    device.stream = 8
    assert not overlap(last.counters(GPU, 2), first)


def test_every_launch_of_a_graph_has_its_own_and_records_no_memset(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    eager = last.counters(GPU, 3)
    device.capturing = True
    found = [last.counters(GPU, count) for count in (1, 5, 3, 3)]
    assert [len(x) for x in found] == [1, 5, 3, 3] and not any(capturing for _, capturing in device.made)
    kept = [*found, eager]
    assert not any(overlap(x, y) for i, x in enumerate(kept) for y in kept[:i])
    assert all((x.data_ptr() - found[0].data_ptr()) % 16 == 0 for x in found)
    last.counters(GPU, 1 << 17)  # more than there are: the graph fills them with zeros itself
    assert device.made[-1] == (1 << 17, True)


def test_a_graph_recorded_before_any_call_fills_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    device.capturing = True
    last.counters(GPU, 3)
    assert device.made == [(3, True)]


def test_a_compiled_call_leaves_nothing_behind(triton_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile's CUDA graphs refuse tensors in their memory that outlive the call."""
    device = Device(monkeypatch)
    pred, target = torch.randn(2, 2, 300)
    expected = implicit_reward(pred, target)
    kept = dict(last._of_stream)
    registered = torch.ops.fastpref_kernels.implicit_reward(pred, target, *[None] * 5, False)
    assert torch.equal(registered[0], expected)
    assert device.made[-1] == (2, False) and last._of_stream == kept
