"""UNets with uneven or unusual blocks: their layers are numbered as they are built, and their LoRAs go everywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.evaluate.sample import load_policy_pipeline
from fastpref.models.export import run_export
from fastpref.models.lora_file import load_adapter, read_lora, save_lora
from fastpref.models.lora_naming import Numbering, kohya_name, module_name
from fastpref.models.lora_unet import lora_of
from fastpref.runs import run_training

CROSS = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
SHAPES: dict[str, dict[str, Any]] = {
    "lists": {"layers_per_block": (1, 2, 3)},
    "falling": {"layers_per_block": (3, 1, 2)},
    "two blocks": {
        "layers_per_block": (2, 1),
        "down_block_types": CROSS[:2],
        "up_block_types": UP[1:],
        "block_out_channels": (8, 8),
    },
    "uneven transformers": {
        "layers_per_block": (1, 2, 1),
        "transformer_layers_per_block": (1, 2, 1),
        "attention_head_dim": (2, 4, 8),
    },
    "reversed transformers": {
        "layers_per_block": (2, 2, 1),
        "transformer_layers_per_block": ((1, 1), (1, 2), (2,)),
        "reverse_transformer_layers_per_block": ((1, 2), (2, 1, 1), (1, 1, 2)),
    },
    "no middle": {"layers_per_block": (2, 1, 1), "mid_block_type": None},
    "plain middle": {"layers_per_block": (2, 1, 1), "mid_block_type": "UNetMidBlock2D"},
    "attention first": {
        "layers_per_block": (2, 1, 2),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "no attention": {
        "layers_per_block": (1, 2, 1),
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
    },
    "equal": {"layers_per_block": 2},
}


def _unet(name: str) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "down_block_types": CROSS,
        "up_block_types": UP,
        "block_out_channels": (8, 8, 8),
        "use_linear_projection": True,
    }
    with torch.device("meta"):
        return UNet2DConditionModel(**settings | SHAPES[name])


def _counted(unet: UNet2DConditionModel) -> dict[str, str]:
    """The place in Stability's UNet of every layer and resampler, by walking through the blocks as it is built."""
    found, number = {"conv_in": "input_blocks.0.0"}, 1
    for b, block in enumerate(unet.down_blocks):
        for n in range(len(block.resnets)):
            found[f"down_blocks.{b}.resnets.{n}"] = f"input_blocks.{number}.0"
            found[f"down_blocks.{b}.attentions.{n}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            found[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for b, block in enumerate(unet.up_blocks):
        attention = bool(getattr(block, "attentions", None))
        for n in range(len(block.resnets)):
            found[f"up_blocks.{b}.resnets.{n}"] = f"output_blocks.{number}.0"
            found[f"up_blocks.{b}.attentions.{n}"] = f"output_blocks.{number}.1"
            number += 1
        found[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{1 + attention}.conv"
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_names_are_those_of_the_unet_as_it_is_built(shape: str) -> None:
    unet = _unet(shape)
    numbering, counted = Numbering.of(unet.config), _counted(unet)
    layers = [m for m, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    names = {module: kohya_name(module, sgm=True, numbering=numbering) for module in layers}
    assert len(set(names.values())) == len(layers)
    for module, name in names.items():
        assert module_name(name, numbering=numbering) == module
        place = [block for block in counted if module == block or module.startswith(f"{block}.")]
        if place:
            assert name.startswith(f"lora_unet_{counted[place[0]].replace('.', '_')}"), module
        else:
            assert module.startswith(("mid_block", "time_embedding", "conv_out")), module


@pytest.mark.parametrize("name", ["input_blocks_9_0_in_layers_2", "output_blocks_12_0_in_layers_2", "input_blocks_x"])
def test_a_layer_that_is_not_there_is_said(name: str) -> None:
    with pytest.raises(ValueError, match=r"not the (name of a module of this UNet|LoRA name)"):
        module_name(f"lora_unet_{name}", numbering=Numbering.of(_unet("two blocks").config))


@pytest.mark.parametrize(
    "module", ["down_blocks.0.downsamplers.0.conv1", "mid_block.resnets.0.norm1", "encoder_hid_proj"]
)
def test_a_layer_that_stability_s_unet_does_not_have_has_no_name(module: str) -> None:
    with pytest.raises(ValueError, match="no place in Stability's UNet"):
        kohya_name(module, sgm=True)


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_an_uneven_unet_is_trained_sampled_and_exported(
    request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    model: Path = request.getfixturevalue(family)
    make: Callable[..., Config] = request.getfixturevalue(f"{family}_config")
    uneven = tmp_path / "model"
    shutil.copytree(model, uneven)
    config = UNet2DConditionModel.load_config(model / "unet") | {"layers_per_block": [1, 2]}
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).save_pretrained(uneven / "unet")
    settings = make(f"model={uneven}", "method=dpo", "steps=1", "name=a", "learning_rate=1e-2")
    run_training(settings)
    drawn = load_policy_pipeline(settings, lora=settings.run_dir).unet
    drawn.fuse_lora()
    drawn.unload_lora()
    wanted = drawn.state_dict()
    for layout in ("diffusers", "kohya"):
        lora = run_export(settings.run_dir, tmp_path / f"{layout}.safetensors", layout=layout)  # type: ignore[arg-type]
        merged = load_file(
            next((run_export(lora, tmp_path / layout, model=str(uneven)) / "unet").glob("*.safetensors"))
        )
        assert merged.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in merged.items())
    theirs = UNet2DConditionModel.from_pretrained(uneven / "unet")
    theirs.load_lora_adapter(tmp_path / "diffusers.safetensors", prefix="unet", use_safetensors=True)
    theirs.fuse_lora()
    theirs.unload_lora()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in theirs.state_dict().items())


def test_no_number_is_asked_for_where_no_name_has_one(tmp_path: Path) -> None:
    """A kohya file for another numbering is refused, one with diffusers' paths is read whatever the blocks are."""
    settings = {"down_block_types": CROSS[:2], "up_block_types": UP[1:], "block_out_channels": (8, 8)}
    common = {"sample_size": 8, "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16}
    unet = UNet2DConditionModel(**settings, **common, layers_per_block=[1, 2])
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["conv1", "to_q"]))
    file = save_lora(unet, tmp_path / "sd.safetensors", layout="kohya", family="sd15", unet_config=unet.config)
    assert read_lora(file).alphas == lora_of(unet).alphas
    numbered = save_lora(unet, tmp_path / "xl.safetensors", layout="kohya", family="sdxl", unet_config=unet.config)
    assert read_lora(numbered, unet_config=unet.config).alphas == lora_of(unet).alphas
    other = UNet2DConditionModel(**settings, **common, layers_per_block=1)
    with pytest.raises(UserError, match=r"another UNet|not the name of a module"):
        load_adapter(other, numbered)
