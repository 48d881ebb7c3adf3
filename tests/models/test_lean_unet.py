"""A lean UNet computes what the plain one does, in every state of its adapters, and launches less."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.models.half_pass import set_half_pass
from fastpref.models.lean_unet import make_lean
from fastpref.models.shared_prompt import share_prompts

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "ff.net.0.proj"]


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def tiny(targets: list[str] | None = None, dtype: torch.dtype = torch.float64, adapters: int = 1) -> Any:
    """A UNet with LoRA of scale 2 whose up matrices are not 0; without targets all weights train."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=16,
            use_linear_projection=True,
        )
        for name in ["default", "reference"][: adapters if targets else 0]:
            unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets), adapter_name=name)
        if targets:
            unet.set_adapter("default")
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(not targets or (".lora_" in name and ".default." in name))
            torch.nn.init.normal_(parameter, std=0.2)
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype)
    return unet.eval()


def result(unet: Any) -> list[torch.Tensor]:
    """The prediction for two pairs, and gradients of the input and of what is trained."""
    g = torch.Generator().manual_seed(1)
    dtype = next(unet.parameters()).dtype
    noisy, weight = (torch.randn(4, 4, 8, 8, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    prompts = torch.randn(2, 5, 16, generator=g, dtype=torch.float64).to(dtype).repeat(2, 1, 1)
    noisy.requires_grad_()
    out = unet(noisy, torch.tensor([7, 300, 7, 300]), prompts).sample
    trained = [p for p in unet.parameters() if p.requires_grad]
    found = torch.autograd.grad((out * weight).sum(), [noisy, *trained], allow_unused=True)
    return [out.detach(), *(x for x in found if x is not None)]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], bound: float = 1e-12) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


def merged(unet: Any) -> None:
    for module in unet.modules():
        if isinstance(module, Linear):
            module.merge()


def hooked(unet: Any) -> None:
    for name, module in unet.named_modules():
        if name.endswith(("conv1", "conv2", "base_layer", "conv_shortcut")):
            module.register_forward_hook(lambda _, __, output: output * 1.5)


STATES: dict[str, Callable[[Any], None]] = {
    "adapter on": lambda unet: None,
    "adapter off": lambda unet: unet.disable_adapters(),
    "the other adapter": lambda unet: unet.set_adapter("reference"),
    "both adapters": lambda unet: unet.set_adapter(["default", "reference"]),
    "merged": merged,
    "prompts shared": share_prompts,
    "recomputed": lambda unet: unet.enable_gradient_checkpointing(),
    "hooks": hooked,
}


TRAINED: dict[str, list[str] | None] = {"attention": ATTENTION, "all": ATTENTION + CONVOLUTIONS, "full": None}
OF_ADAPTERS = ("adapter off", "the other adapter", "both adapters", "merged")


def repeats(trained: str, state: str) -> bool:
    """The LoRA of all layers has that of attention in it, and without one the plain layers are those of all weights."""
    return trained == "attention" and state not in ("adapter on", "merged")


@pytest.mark.parametrize(
    ("trained", "state"),
    [
        pytest.param(t, s, marks=[pytest.mark.thorough] if repeats(t, s) else [])
        for t in TRAINED
        for s in STATES
        if t != "full" or s not in OF_ADAPTERS
    ],
)
def test_a_lean_unet_is_the_same_function(trained: str, state: str) -> None:
    targets = TRAINED[trained]
    plain = tiny(targets, adapters=2)
    lean = copy.deepcopy(plain)
    make_lean(lean)
    for unet in (plain, lean):
        STATES[state](unet)
        unet.train(state == "recomputed")  # diffusers recomputes only then
    assert_equal(result(lean), result(plain))
    assert list(lean.state_dict()) == list(plain.state_dict())


def test_a_gated_layer_has_the_bits_of_the_plain_one() -> None:
    unet = tiny(dtype=torch.float32)
    lean = copy.deepcopy(unet)
    make_lean(lean)
    layers = [next(m for m in model.modules() if type(m) is GEGLU) for model in (unet, lean)]
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    plain, ours = (
        [y, *torch.autograd.grad(y.square().sum(), [x, layer.proj.weight])]
        for layer in layers
        if (y := layer(x)) is not None
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def counted(unet: Any) -> tuple[Counter[str], Counter[str]]:
    """Ops of a forward, and of its backward."""
    forward, backward = Ops(), Ops()
    with forward:
        out = unet(torch.zeros(2, 4, 8, 8, dtype=unet.dtype), torch.tensor([7, 7]), torch.zeros(2, 5, 16)).sample
    with backward:
        out.backward(torch.ones_like(out))
    return forward.count, backward.count


def test_what_a_lean_unet_launches_less() -> None:
    plain = tiny(ATTENTION, torch.float32)
    lean = copy.deepcopy(plain)
    make_lean(lean)
    blocks = sum(hasattr(m, "time_emb_proj") for m in plain.modules())
    loras = sum(isinstance(m, Linear) for m in plain.modules())
    gates = sum(type(m) is GEGLU for m in plain.modules())
    (before, before_back), (after, after_back) = counted(plain), counted(lean)
    divisions = before["div"] - after["div"]
    assert divisions == blocks + loras // 4  # an attention has four
    assert before["silu"] - after["silu"] == blocks - 1
    assert after["lora_linear"] == loras == after_back["lora_linear_backward"]
    assert before["mul"] - after["mul"] == loras == before["add"] - after["add"] + blocks_with_shift(lean)
    assert before_back["cat"] - after_back["cat"] == gates
    assert before_back["div"] > 0 == after_back["div"]


def blocks_with_shift(unet: Any) -> int:
    """Small additions of a bias to a time embedding, or to a shortcut's bias, which the large ones made way for."""
    blocks = [m for m in unet.modules() if hasattr(m, "time_emb_proj")]
    return len(blocks) + sum(m.conv_shortcut is not None for m in blocks)


@pytest.mark.parametrize("narrowed", [False, True])
def test_the_time_embedding_is_activated_once_in_a_half_pass_too(narrowed: bool) -> None:
    unet = tiny(ATTENTION, torch.float32)
    if narrowed:
        set_half_pass(unet, torch.bfloat16)
    make_lean(unet)
    make_lean(unet)  # a second call changes nothing
    seen: list[torch.Tensor] = []
    for module in unet.modules():
        if hasattr(module, "time_emb_proj"):
            assert module.skip_time_act
            module.time_emb_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    embeddings: list[torch.Tensor] = []
    unet.time_embedding.register_forward_hook(lambda _, __, output: embeddings.append(output))
    with torch.no_grad():
        unet(torch.zeros(2, 4, 8, 8), torch.tensor([7, 300]), torch.zeros(2, 5, 16, dtype=seen_dtype(narrowed)))
    expected = torch.nn.functional.silu(embeddings[0]).to(seen_dtype(narrowed))
    assert seen and all(torch.equal(x, expected) for x in seen)


def seen_dtype(narrowed: bool) -> torch.dtype:
    return torch.bfloat16 if narrowed else torch.float32
