"""Pipelines in the original layout (LDM, SGM): diffusers' names undone by literal rules of our own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def original_unet(state: Mapping[str, Tensor], layers: int = 2) -> State:
    """``input_blocks.…``, without the prefix ``model.diffusion_model.``"""
    with_attention = {key.split(".")[1] for key in state if key.startswith("up_blocks") and ".attentions." in key}

    def place(name: str) -> str:
        top = re.fullmatch(r"(.+)\.(weight|bias)", name)
        assert top
        if top[1] in _TOP:
            return f"{_TOP[top[1]]}.{top[2]}"
        if name.startswith("mid_block"):
            _, kind, number, rest = name.split(".", 3)
            return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{_inner(kind, rest)}"
        side, block, kind, number, rest = name.split(".", 4)
        per = layers + 1
        if kind == "downsamplers":
            return f"input_blocks.{per * (int(block) + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{per * int(block) + layers}.{2 if block in with_attention else 1}.{rest}"
        first = int(block) * per + int(number) + (1 if side == "down_blocks" else 0)
        where = "input_blocks" if side == "down_blocks" else "output_blocks"
        return f"{where}.{first}.{1 if kind == 'attentions' else 0}.{_inner(kind, rest)}"

    return {place(name): tensor for name, tensor in state.items()}


def original_vae(state: Mapping[str, Tensor], levels: int, *, convolutions: bool = True) -> State:
    """``encoder.down.…``; the attention as 1x1 convolutions, as published, or as linear layers."""
    made = {}
    for name, tensor in state.items():
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0." in name:
            side, rest = name.split(".mid_block.attentions.0.")
            layer, kind = rest.rsplit(".", 1)
            name = f"{side}.mid.attn_1.{_VAE_ATTENTION[layer]}.{kind}"
            tensor = tensor[:, :, None, None] if convolutions and tensor.ndim == 2 else tensor
        made[name] = tensor
    return made


def original_clip(state: Mapping[str, Tensor], *, wrapped: bool = True) -> State:
    """``text_model.…``, or without it as old merges have it."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    return {f"text_model.{name}" if wrapped else name: tensor for name, tensor in plain.items()}


def original_open_clip(state: Mapping[str, Tensor]) -> State:
    """``transformer.resblocks.…`` with one projection of q, k and v, the text projection transposed."""
    made: State = {}
    for name, tensor in state.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            made["text_projection"] = tensor.T.contiguous()
        elif name.startswith("embeddings.token"):
            made["token_embedding.weight"] = tensor
        elif name.startswith("embeddings.position"):
            made["positional_embedding"] = tensor
        elif name.startswith("final_layer_norm"):
            made[name.replace("final_layer_norm", "ln_final")] = tensor
        else:
            number, inner = name.removeprefix("encoder.layers.").split(".", 1)
            layer, kind = inner.rsplit(".", 1)
            block = f"transformer.resblocks.{number}"
            if layer == "self_attn.q_proj":
                parts = [state[_sibling(state, number, f"self_attn.{p}_proj.{kind}")] for p in "qkv"]
                made[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
            elif layer in _OPEN_CLIP:
                made[f"{block}.{_OPEN_CLIP[layer]}.{kind}"] = tensor
    return made


def original_checkpoint(parts: Mapping[str, Mapping[str, Tensor]], levels: int = 4, **options: Any) -> State:
    """A whole checkpoint of a pipeline's parts: SDXL where there is a second text encoder."""
    sdxl = "text_encoder_2" in parts
    first = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
    named: dict[str, State] = {
        "model.diffusion_model.": original_unet(parts["unet"]),
        "first_stage_model.": original_vae(parts["vae"], levels, convolutions=options.get("convolutions", True)),
        first: original_clip(parts["text_encoder"], wrapped=options.get("wrapped", True)),
    }
    if sdxl:
        named["conditioner.embedders.1.model."] = original_open_clip(parts["text_encoder_2"])
    made = {prefix + name: tensor for prefix, part in named.items() for name, tensor in part.items()}
    return {name: tensor.contiguous() for name, tensor in made.items()}


def _inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    layer, what = rest.rsplit(".", 1)
    return f"{_RESNET[layer]}.{what}"


def _sibling(state: Mapping[str, Tensor], number: str, rest: str) -> str:
    name = f"encoder.layers.{number}.{rest}"
    return name if name in state else f"text_model.{name}"
