"""Between a LoRA in normal form and a UNet: what an adapter holds, and whether a LoRA fits."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastpref.errors import UserError
from fastpref.models.lora_form import Lora
from fastpref.models.state_dict import core_shape


def lora_of(unet: torch.nn.Module, adapter: str = "default") -> Lora:
    """The LoRA that a UNet carries as a peft adapter, with the scale each layer really uses.

    Raises:
        UserError: no adapter of that name, or one that is more than a plain LoRA.
    """
    from peft.tuners.lora import LoraLayer

    state: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for module, layer in unet.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            if layer.lora_bias[adapter] or layer.use_dora.get(adapter):
                raise UserError(f"{module} has a LoRA with bias or a DoRA", adapter, "only plain LoRAs are written")
            state[f"{module}.lora_A.weight"] = layer.lora_A[adapter].weight.detach()
            state[f"{module}.lora_B.weight"] = layer.lora_B[adapter].weight.detach()
            rank, alpha, scale = layer.r[adapter], float(layer.lora_alpha[adapter]), float(layer.scaling[adapter])
            alphas[module] = alpha if alpha / rank == scale else scale * rank  # rsLoRA, or set_scale
    if not alphas:
        raise UserError(f"the UNet has no LoRA named '{adapter}'")
    return Lora(state, alphas)


def fitted(lora: Lora, unet: torch.nn.Module, where: str, part: str = "UNet") -> Lora:
    """The LoRA with the names and shapes of the UNet's layers (on any device, meta included), or of another ``part``'s.

    Factors of a linear layer that have the shape of a 1 x 1 convolution's are the same numbers, and the reverse.

    Raises:
        UserError: a module that the UNet does not have, or has in another size.
    """
    layers: dict[str, tuple[str, torch.Size]] = {}
    for name, module in unet.named_modules():
        layer = getattr(module, "base_layer", module)
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            # kohya's names do not tell underscores from dots
            layers.setdefault(name.replace(".", "_"), (name, layer.weight.shape))
    state: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for module, alpha in lora.alphas.items():
        down, up = lora.state[f"{module}.lora_A.weight"], lora.state[f"{module}.lora_B.weight"]
        name, shape = layers.get(module.replace(".", "_"), ("", None))
        if shape is None:
            raise UserError(
                f"the LoRA is for another {part}", where, f"{module} is not a linear or convolution layer here"
            )
        rank, ones = down.shape[0], (1,) * (len(shape) - 2)
        wanted = (rank, *shape[1:]), (shape[0], rank, *ones)
        if core_shape(down.shape) != core_shape(wanted[0]) or core_shape(up.shape) != core_shape(wanted[1]):
            sizes = f"{tuple(down.shape)} and {tuple(up.shape)}, the layer's weight is {tuple(shape)}"
            raise UserError(f"the LoRA is for another {part}", where, f"the factors of {module} are {sizes}")
        if name in alphas:
            raise UserError(f"the LoRA has weights for {name} twice", where, "the file is damaged")
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = down.reshape(wanted[0]), up.reshape(wanted[1])
        alphas[name] = alpha
    return replace(lora, state=state, alphas=alphas)
