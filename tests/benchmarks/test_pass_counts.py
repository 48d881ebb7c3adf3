"""Kernels and bytes of operators are counted as by hand; a policy's pass has no casts but autocast's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import pass_counts  # noqa: E402
import pass_inductor  # noqa: E402
import pass_meter  # noqa: E402

from fastpref.plan.count import Shapes  # noqa: E402
from fastpref_kernels import lora_linear  # noqa: E402

TINY: dict[str, Any] = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (16,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}


def counted(run: Any, *frozen: torch.Tensor) -> dict[tuple[str, str], tuple[int, int, int]]:
    meter = pass_meter.PassMeter().freeze(frozen)
    with meter:
        run()
    return {key: (tally.launches, tally.moved, tally.flops) for key, tally in meter.found.items()}


def test_operators_are_counted_as_by_hand() -> None:
    bf16 = torch.bfloat16
    with FakeTensorMode():
        x, w, low = torch.empty(6, 8, dtype=bf16), torch.empty(8, 4, dtype=bf16), torch.empty(8, 2, dtype=bf16)
        picture, kernel, bias = torch.empty(2, 3, 5, 5), torch.empty(4, 3, 1, 1), torch.empty(4)
        assert counted(lambda: x @ w, w) == {("matrix products", "mm"): (1, 2 * (48 + 32 + 24), 2 * 6 * 8 * 4)}
        assert counted(lambda: x @ low, w) == {("LoRA products", "mm"): (1, 2 * (48 + 16 + 12), 2 * 6 * 8 * 2)}
        assert counted(lambda: x.T.reshape(-1)[:8].float()) == {
            ("copies, cat", "clone"): (1, 2 * 2 * 48, 0),
            (pass_meter.CASTS, "_to_copy"): (1, 8 * (2 + 4), 0),
        }
        assert counted(lambda: x[:, :1].expand(6, 8) * x) == {("elementwise", "mul"): (1, 2 * (6 + 48 + 48), 0)}
        assert counted(lambda: x.copy_(w.T[:1].expand(6, 8))) == {("copies, cat", "copy_"): (1, 2 * (8 + 48), 0)}
        assert counted(lambda: functional.conv2d(picture, kernel, bias)) == {
            ("convolutions", "convolution"): (1, 4 * (150 + 12 + 200), 2 * 200 * 3),
            ("elementwise", "bias of a convolution"): (1, 4 * (200 + 200 + 4), 0),
        }
        assert counted(lambda: functional.group_norm(picture, 3)) == {
            ("norms", "native_group_norm"): (3, 4 * (3 * 150 + 2 * 6), 0)
        }


def test_a_lora_layer_is_counted_as_by_hand() -> None:
    with FakeTensorMode():
        x, weight, a, b = (torch.empty(*s, dtype=torch.bfloat16) for s in ((6, 8), (4, 8), (2, 8), (4, 2)))
        found = counted(lambda: lora_linear(x, weight, None, a, b, 1.0), weight)
    t, product, onto = 48 + 16 + 12, 48 + 32 + 24, 12 + 8
    assert found[("LoRA products", "lora_linear: t")] == (1, 2 * t, 2 * 6 * 8 * 2)
    assert found[("matrix products", "lora_linear")] == (1, 2 * product, 2 * 6 * 8 * 4)
    assert found[("LoRA products", "lora_linear: onto y")] == (1, 2 * (onto + 2 * 24), 2 * 6 * 2 * 4)


def test_inductor_makes_one_kernel_of_what_it_fuses() -> None:
    with FakeTensorMode() as mode:
        x = torch.empty(64, 32)
    graph = torch.fx.symbolic_trace(lambda x: torch.ops.aten.mul.Tensor(torch.ops.aten.add.Tensor(x, x), x))
    for node in graph.graph.nodes:
        node.meta["val"] = x
    with mode:
        assert pass_inductor._kernels(graph) == [2 * 64 * 32 * 4]


def test_only_autocast_casts_between_the_ends_of_a_forward() -> None:
    shapes = Shapes(TINY, (4, 8, 8), 5)
    found = {form: pass_counts.count(form, 4, shapes) for form in ("autocast", "one dtype", pass_counts.LEAN)}
    assert {form: meters["forward"].casts_in_blocks > 0 for form, meters in found.items()} == {
        "autocast": True,
        "one dtype": False,
        pass_counts.LEAN: False,
    }
    flops = [sum(t.flops for m in meters.values() for t in m.found.values()) for meters in found.values()]
    assert len(set(flops)) == 1, "the same arithmetic in every form"
    plain, lean = (
        {p: sum(t.launches for t in m.found.values()) for p, m in found[form].items()}
        for form in ("one dtype", pass_counts.LEAN)
    )
    assert all(lean[part] < plain[part] for part in plain)
