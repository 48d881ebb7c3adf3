"""patch_unet on a tiny random SDXL UNet with LoRA: outputs, gradients, toggles, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tolerances import assert_close

from fastpref_kernels import PatchCounts, patch_unet, unpatch_unet

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

# 8 residual blocks with two norms each, and the last norm; 4 transformer blocks with two attentions of four layers
COUNTS = PatchCounts(group_norm_silu=17, geglu=4, lora_linear=32)


ONE_LEVEL = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (16,),
    "mid_block_type": None,
}


def make_unet(lora: bool = True, **config: object) -> torch.nn.Module:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 6 * 4,
        "use_linear_projection": True,
    }
    unet = diffusers.UNet2DConditionModel(**(settings | config)).requires_grad_(False)
    if lora:
        add_lora(unet, "default")
    return unet.train()


def add_lora(unet: torch.nn.Module, name: str, **config: object) -> None:
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False, **config), name
    )


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, object]:
    torch.manual_seed(1)
    added = {"text_embeds": torch.randn(2, 8).to(dtype), "time_ids": torch.arange(12.0).view(2, 6).to(dtype)}
    return {
        "sample": torch.randn(2, 4, 8, 8).to(dtype),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(1, 5, 12).to(dtype).expand(2, -1, -1),  # strides that rows() refuses
        "added_cond_kwargs": added,
    }


def run(unet: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return unet(**inputs(dtype)).sample


def run_with_gradients(unet: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    unet.zero_grad()
    out = run(unet)
    torch.manual_seed(2)
    (out * torch.randn(out.shape)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def assert_same(unet: torch.nn.Module, expected: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    out, gradients = run_with_gradients(unet)
    assert_close(out, expected[0], scale=10.0)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[1][name], scale=10.0 * max(1.0, float(expected[1][name].abs().max())))


def spy(unet: torch.nn.Module) -> Callable[[], set[str]]:
    """Names of this package's ops that a run of the UNet calls."""

    def names() -> set[str]:
        with torch.profiler.profile() as profile:
            run(unet)
        return {e.name.split("::")[1] for e in profile.events() if e.name.startswith("fastpref_kernels::")}

    return names


def test_output_and_gradients_of_the_whole_unet() -> None:
    unet = make_unet()
    expected = run_with_gradients(unet)
    assert any("lora_A" in name for name in expected[1])
    assert patch_unet(unet) == COUNTS
    assert_same(unet, expected)
    assert spy(unet)() == {"group_norm_silu", "geglu", "lora_linear"}


def test_a_module_without_anything_to_fuse_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="nothing in Sequential can be fused"):
        assert patch_unet(torch.nn.Sequential(torch.nn.Linear(2, 2))) == PatchCounts(0, 0, 0)


def test_full_fine_tuning_and_channels_last() -> None:
    unet = make_unet(lora=False).requires_grad_(True).to(memory_format=torch.channels_last)
    expected = run_with_gradients(unet)
    assert {"conv_norm_out.weight", "down_blocks.0.resnets.0.norm1.bias"} <= expected[1].keys()
    assert patch_unet(unet) == COUNTS._replace(lora_linear=0)
    assert_same(unet, expected)


def test_patching_changes_nothing_but_forward_and_is_undone_exactly() -> None:
    unet = make_unet()
    before = run_with_gradients(unet)
    types = {name: type(module) for name, module in unet.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in unet.named_modules()}
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    assert patch_unet(unet) == patch_unet(unet) == COUNTS
    assert {name: type(module) for name, module in unet.named_modules()} == types
    assert list(unet.state_dict()) == list(state)
    assert unpatch_unet(unet) == COUNTS and unpatch_unet(unet) == PatchCounts(0, 0, 0)
    assert {name: set(module.__dict__) for name, module in unet.named_modules()} == attributes
    assert all(torch.equal(unet.state_dict()[name], value) for name, value in state.items())
    after = run_with_gradients(unet)
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[1][name], gradient) for name, gradient in before[1].items())


def test_gradient_checkpointing() -> None:
    unet = make_unet()
    unet.enable_gradient_checkpointing()
    expected = run_with_gradients(unet)
    patch_unet(unet)
    assert_same(unet, expected)


def test_disabled_toggled_merged_and_second_adapters() -> None:
    unet, plain = make_unet(), make_unet()
    patch_unet(unet)
    with torch.no_grad():
        for model in (unet, plain):
            model.disable_adapters()
        reference = run(plain)
        assert_close(run(unet), reference, scale=10.0)
        assert spy(unet)() == {"group_norm_silu", "geglu"}
        for model in (unet, plain):
            model.enable_adapters()
        assert (run(plain) - reference).abs().max() > 1e-3
        assert_close(run(unet), run(plain), scale=10.0)
        for model in (unet, plain):
            torch.manual_seed(3)
            add_lora(model, "second")
            model.set_adapters(["default", "second"], [0.5, 2.0])
        assert_close(run(unet), run(plain), scale=10.0)
        assert "lora_linear" not in spy(unet)()  # two active adapters
        for model in (unet, plain):
            model.set_adapters(["second"], [2.0])
        assert_close(run(unet), run(plain), scale=10.0)
        assert "lora_linear" in spy(unet)()
        for model in (unet, plain):
            model.fuse_lora()
        assert_close(run(unet), run(plain), scale=10.0)
        assert "lora_linear" not in spy(unet)()
        for model in (unet, plain):
            model.unfuse_lora()
        assert_close(run(unet), run(plain), scale=30.0)


@pytest.mark.parametrize("config", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_other_kinds_of_lora_are_left_alone(config: dict) -> None:
    unet = make_unet(lora=False)
    add_lora(unet, "default", **config)
    assert patch_unet(unet) == COUNTS._replace(lora_linear=0)


def test_other_blocks_hooks_and_foreign_forwards_are_left_alone() -> None:
    assert patch_unet(make_unet(resnet_time_scale_shift="scale_shift")).group_norm_silu == 1
    assert patch_unet(make_unet(act_fn="gelu")).group_norm_silu == 0
    unet = make_unet()
    block = unet.mid_block.resnets[0]
    block.forward = foreign = block.forward
    assert patch_unet(unet).group_norm_silu == COUNTS.group_norm_silu - 2
    assert unpatch_unet(unet).group_norm_silu == COUNTS.group_norm_silu - 2 and block.__dict__["forward"] == foreign
    del block.forward
    patch_unet(unet)
    seen = []
    block.norm2.register_forward_hook(lambda module, args, out: seen.append(out))
    run(unet)
    assert len(seen) == 1 and (seen[0] < -0.3).any()  # the norm alone: SiLU is never below -0.28


def test_a_weight_in_training_takes_the_layer_s_own_forward() -> None:
    unet = make_unet()
    patch_unet(unet)
    unet.requires_grad_(True)
    _, gradients = run_with_gradients(unet)
    assert any(name.endswith("to_q.base_layer.weight") for name in gradients)
    assert spy(unet)() == {"group_norm_silu", "geglu"}


def test_a_copy_is_patched_and_independent() -> None:
    unet = make_unet()
    patch_unet(unet)
    twin = copy.deepcopy(unet)
    assert torch.equal(run(twin), run(unet))
    with torch.no_grad():
        for p in unet.parameters():
            p.zero_()
    assert run(twin).abs().max() > 0.1 and run(unet).abs().max() == 0
    assert unpatch_unet(twin) == COUNTS


def test_autocast_is_as_close_as_torch() -> None:
    unet = make_unet()
    exact = run(unet).double().detach()
    distances = []
    for step in (lambda: None, lambda: patch_unet(unet)):
        step()
        with torch.autocast("cpu", torch.bfloat16):
            distances.append((run(unet).double() - exact).square().mean().item())
    assert distances[1] <= 1.5 * distances[0]


def test_compiles_as_one_graph() -> None:
    """The whole UNet, of one level, with its gradients."""
    unet = make_unet(**ONE_LEVEL)
    expected = run_with_gradients(unet)
    patch_unet(unet)
    torch._dynamo.reset()
    unet.compile(fullgraph=True, backend="aot_eager")
    assert_same(unet, expected)


def test_with_the_kernels_interpreted(path: str) -> None:
    """group_norm_silu and geglu as kernels, the low-rank product by BLAS as in fp32 on a GPU."""
    if path == "cpu":
        pytest.skip("the other tests of this file")
    unet = make_unet(**ONE_LEVEL)
    expected = run_with_gradients(unet)
    patch_unet(unet)
    assert_same(unet, expected)
