"""What is kept for the backward and what is computed again: bytes by hand, values by ``torch.equal``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.models.attention import sliced_attention
from fastpref.models.recompute import MODES, recomputed_region
from fastpref.plan.meter import PeakMemory
from fastpref_kernels import geglu, group_norm_silu

WIDTH, TOKENS = 64, 256
WEIGHT, SQUARE, NORM = torch.Size([WIDTH, 2 * WIDTH]), torch.Size([WIDTH, WIDTH]), torch.Size([WIDTH])


def norm_then_linear(x: Tensor, w: Tensor, *_: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,)) @ w


def chain(x: Tensor, w: Tensor, scale: Tensor, square: Tensor) -> Tensor:
    """What a linear layer keeps comes from an activation that comes from a norm."""
    hidden = F.silu(F.layer_norm(x, (WIDTH,), scale, None, 1e-6))
    return F.silu(F.layer_norm(hidden @ square, normalized_shape=(WIDTH,), weight=scale)).reshape(-1, WIDTH) @ w


def gate(x: Tensor, w: Tensor, _: Tensor, square: Tensor) -> Tensor:
    value, opening = (x @ w).chunk(2, dim=-1)
    return (value * F.gelu(opening)) @ square


def fused(x: Tensor, w: Tensor, scale: Tensor, square: Tensor) -> Tensor:
    image = x.T.contiguous().view(1, WIDTH, 16, 16)
    return geglu(group_norm_silu(image, 8, scale, scale).flatten(2)[0].T.contiguous() @ w) @ square


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = [torch.Size([TOKENS, WIDTH]), WEIGHT, NORM, SQUARE]
    return [torch.randn(size, generator=g, dtype=dtype).requires_grad_() for size in sizes]


def called(mode: str, function: Callable[..., Any], *arguments: Any) -> Any:
    region = recomputed_region(mode)
    return function(*arguments) if region is None else region(function, *arguments)


@pytest.mark.parametrize("function", [norm_then_linear, chain, gate, fused])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_the_same_bit_for_bit(function: Callable[..., Tensor], autocast: bool) -> None:
    found = {}
    for mode in MODES:
        given = inputs()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = called(mode, function, *given)
        out.float().square().sum().backward()
        found[mode] = [out, *(x.grad for x in given if x.grad is not None)]
    for mode in MODES[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found["none"], found[mode], strict=True)), mode


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (norm_then_linear, {"none": 1, "selective": 0}),  # in widths a token, beside the input: the norm's result
        (chain, {"none": 5, "selective": 1}),  # norm, silu; product; norm, silu
        (gate, {"none": 4, "selective": 2}),  # the product's two halves; gelu, value times gelu
    ],
)
def test_bytes_kept_by_hand(function: Callable[..., Tensor], kept: dict[str, int]) -> None:
    for mode, widths in (kept | {"full": 0}).items():
        with FakeTensorMode():
            given = [torch.empty(x.shape, requires_grad=True) for x in inputs()]
            with PeakMemory(given) as memory:
                out = called(mode, function, *given)
                statistics = 2 * 2 * 4 * TOKENS  # mean and deviation of at most two norms
                found = memory.live - out.nbytes - widths * TOKENS * WIDTH * 4
                assert 0 <= found <= statistics, (mode, found)
                del out
            assert memory.live == 0


class Calls(TorchDispatchMode):
    """How often each op is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


WORK = ("native_layer_norm", "gelu", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu")


def block_of(train: str) -> BasicTransformerBlock:
    torch.manual_seed(0)
    block: Any = BasicTransformerBlock(WIDTH, 2, WIDTH // 2, cross_attention_dim=WIDTH).requires_grad_(train == "full")
    if train == "lora":
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), block)
    return block.eval()


@pytest.mark.parametrize(
    ("train", "none", "selective", "norms"),
    [
        # widths a token. Kept in any case: the three inputs of norms, of which one is the block's; query, key, value
        # and result of self-attention; query and result of cross-attention; the eight of GEGLU's product.
        # LoRA: two norms' results and gelu's four besides. Full: the third norm's and the product with gelu too.
        ("lora", 17 + 2 + 4, 17, 2),
        ("full", 17 + 3 + 8, 17, 3),
    ],
)
def test_what_a_transformer_block_keeps_and_computes_again(train: str, none: int, selective: int, norms: int) -> None:
    block, kept = block_of(train), {}
    prompt = torch.randn(1, 4, WIDTH)
    for mode in MODES:
        x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
        with PeakMemory([x, prompt, *block.parameters()]) as memory, Calls() as forward:
            out = called(mode, block, x, None, prompt)
            # in full the region keeps its input, which is known
            kept[mode] = (memory.live - out.nbytes) / (TOKENS * WIDTH * 4) + 1
        with Calls() as backward:
            out.square().sum().backward()
        if mode == "selective":
            again = {name: count for name, count in backward.seen.items() if name in forward.seen and name in WORK}
            assert again == {"native_layer_norm": norms, "gelu": 1}
    # beside them logsumexps and, by head or token, statistics: 2 heads of 2 attentions and 2 of 3 norms; keys and
    # values of 4 tokens of prompt; LoRA's 4 of rank in 8 layers: less than one width
    for mode, widths in (("none", none), ("selective", selective), ("full", 1)):
        assert widths <= kept[mode] < widths + 1, (mode, kept)


def test_what_a_norm_is_computed_again_from_may_not_change() -> None:
    x = torch.randn(4, WIDTH, requires_grad=True)
    weight = torch.randn(WEIGHT, requires_grad=True)
    start = x * 1
    out = called("selective", norm_then_linear, start, weight)
    with torch.no_grad():
        start.add_(1)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
        out.sum().backward()


def test_what_is_changed_after_it_was_computed_is_kept() -> None:
    """A norm's result that is added to in place is no longer the norm's result."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,)).mul_(2.0).add_(1.0) @ w

    found = {}
    for mode in MODES:
        x, w, *_ = inputs()
        called(mode, function, x, w).square().sum().backward()
        found[mode] = [x.grad, w.grad]
    for mode in MODES[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found["none"], found[mode], strict=True)), mode


def test_random_states_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them breaks the capture of a CUDA graph."""
    for module in (torch, torch.random, torch.cuda):
        for name in ("get_rng_state", "set_rng_state"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *_: pytest.fail("a random state is looked at"))
    for mode in MODES:
        called(mode, chain, *inputs()).sum().backward()
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    sliced_attention(q, q, q).sum().backward()


def test_a_graph_of_the_whole_takes_every_mode() -> None:
    for mode in MODES:
        compiled = torch.compile(
            lambda *given, mode=mode: called(mode, chain, *given), backend="aot_eager", fullgraph=True
        )
        assert torch.equal(compiled(*inputs()), chain(*inputs())), mode
    torch._dynamo.reset()


def test_a_compiled_block_is_left_to_its_compiler() -> None:
    block = torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    block.compile(backend="aot_eager", dynamic=False)
    plain = torch.nn.Sequential(*block)
    x, *_ = inputs()
    for mode in MODES:
        out = called(mode, block, x)
        assert torch.equal(out, called("none", plain, x)), mode
    torch._dynamo.reset()
