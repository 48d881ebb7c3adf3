"""Swaps the fused ops into a diffusers UNet and out again.

Only `forward` of single modules is overridden, on the instance: module types, parameters, their names, state_dict and
hooks stay as they are. Whatever a fused op cannot do exactly (a merged or disabled adapter, LoRA dropout, DoRA, several
active adapters, a weight in training, a hook on a module that would be skipped) takes the module's own forward, decided
at every call.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .common.memory_format import layout
from .common.operator import REGISTERED, Operator
from .geglu import geglu
from .group_norm_silu import group_norm_silu
from .lora_linear import lora_linear

# Of a patched UNet what multiplies no matrices, as a mode of torch.overrides sees it.
MEMORY_BOUND: frozenset[Operator] = frozenset(REGISTERED[name] for name in ("geglu", "group_norm_silu"))


class PatchCounts(NamedTuple):
    """Places of a UNet: pairs of GroupNorm and SiLU, GEGLU modules, LoRA layers."""

    group_norm_silu: int
    geglu: int
    lora_linear: int


def _loaded(module: str, name: str) -> type | None:
    """A class of a library that is not imported here; None if nobody imported it, for then no object has it."""
    return getattr(sys.modules.get(module), name, None)


def _is(module: nn.Module, library: str, name: str) -> bool:
    """Exactly that class: a subclass may mean something else."""
    return type(module) is _loaded(library, name)


def untouched(*modules: nn.Module) -> bool:
    """No hook and no forward of anybody else would be missed by not calling these modules."""
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)


def _norm_silu_forward(self: Any, x: Tensor) -> Tensor:
    """GroupNorm and the SiLU behind it."""
    x = x if layout(x) else x.contiguous()  # as torch's group_norm does
    return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


def _identity_forward(self: Any, x: Tensor) -> Tensor:
    """The SiLU that the normalisation before it has done."""
    return x


def _resnet_forward(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """A residual block with additive time embedding."""
    if args or kwargs or not untouched(self.norm1, self.norm2, self.nonlinearity):
        return type(self).forward(self, input_tensor, temb, *args, **kwargs)
    hidden = _norm_silu_forward(self.norm1, input_tensor)
    resample = self.upsample if self.upsample is not None else self.downsample
    if resample is not None:
        input_tensor, hidden = resample(input_tensor), resample(hidden)
    hidden = self.conv1(hidden)
    if self.time_emb_proj is not None:
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
    if temb is not None:
        hidden = hidden + temb
    hidden = self.conv2(self.dropout(_norm_silu_forward(self.norm2, hidden)))
    if self.conv_shortcut is not None:
        # a channels-last gradient of a 1x1 convolution has other strides than DDP's buckets expect
        input_tensor = self.conv_shortcut(input_tensor.contiguous() if self.training else input_tensor)
    out = input_tensor + hidden
    return out if self.output_scale_factor == 1.0 else out / self.output_scale_factor


def _geglu_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return geglu(self.proj(hidden_states).contiguous())


def _is_plain(layer: Any, adapter: str) -> bool:
    """B(A x) times a number: no variant such as DoRA, no bias, no dropout."""
    pair = layer.lora_A[adapter], layer.lora_B[adapter]
    dropout = layer.lora_dropout[adapter]
    return (
        adapter not in layer.lora_variant
        and all(type(m) is nn.Linear and m.bias is None for m in pair)
        and (isinstance(dropout, nn.Identity) or (isinstance(dropout, nn.Dropout) and dropout.p == 0))
    )


def plain_adapter(layer: Any, x: Tensor) -> str | None:
    """The adapter of a peft layer that `lora_linear` may apply to x, if there is one."""
    base = layer.base_layer
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or not _is_plain(layer, active[0]):
        return None
    a, b = layer.lora_A[active[0]], layer.lora_B[active[0]]
    frozen = not torch.is_grad_enabled() or not any(p.requires_grad for p in base.parameters(recurse=False))
    if not frozen or not untouched(base, a, b):
        return None
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    fits = autocast or base.weight.dtype == dtype
    return active[0] if fits and all(m.weight.dtype in (dtype, torch.float32) for m in (a, b)) else None


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapter = None if args or kwargs else plain_adapter(self, x)
    if adapter is None:
        return type(self).forward(self, x, *args, **kwargs)
    base, a, b = self.base_layer, self.lora_A[adapter], self.lora_B[adapter]
    return lora_linear(x.contiguous(), base.weight, base.bias, a.weight, b.weight, self.scaling[adapter])


_FORWARDS = (_norm_silu_forward, _identity_forward, _resnet_forward, _geglu_forward, _lora_forward)


def _forward(module: nn.Module) -> Callable[..., Any] | None:
    """Our forward on a module, if it has one."""
    function = getattr(module.__dict__.get("forward"), "__func__", None)
    return function if function in _FORWARDS else None


def _set(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Override `forward`; leaves a module alone whose forward somebody else has overridden."""
    if "forward" not in module.__dict__:
        module.__dict__["forward"] = MethodType(forward, module)
    return _forward(module) is forward


def _resnet_fits(module: Any) -> bool:
    return (
        _is(module, "diffusers.models.resnet", "ResnetBlock2D")
        and module.time_embedding_norm == "default"
        and type(module.nonlinearity) is nn.SiLU
        and type(module.norm1) is type(module.norm2) is nn.GroupNorm
    )


def _last_norm_fits(module: Any, root: nn.Module) -> bool:
    """conv_norm_out and conv_act of a UNet; conv_act must be used there only."""
    if not _is(module, "diffusers.models.unets.unet_2d_condition", "UNet2DConditionModel"):
        return False
    uses = sum(child is module.conv_act for parent in root.modules() for child in parent.children())
    return type(module.conv_norm_out) is nn.GroupNorm and type(module.conv_act) is nn.SiLU and uses == 1


def _lora_fits(module: Any) -> bool:
    return (
        _is(module, "peft.tuners.lora.layer", "Linear")
        and type(module.base_layer) is nn.Linear
        and any(_is_plain(module, name) for name in module.lora_A)
    )


def patch_unet(unet: nn.Module) -> PatchCounts:
    """Put `group_norm_silu`, `geglu` and `lora_linear` into a diffusers UNet, in place.

    unet: a UNet2DConditionModel of SD1.5, SDXL or alike, also with peft adapters or inside a wrapper. GroupNorms
        without a SiLU behind them, residual blocks with scale and shift, and layers that are no plain LoRA are left.

    Returns the places that are fused after the call. A second call, at any time, adds what is new since, such as
    adapters. While patched the UNet has the same modules, parameters and state_dict; it cannot be pickled whole.
    Warns where nothing of the module is fused: it is no UNet, or one of other blocks.
    """
    norms = gates = loras = 0
    for module in list(unet.modules()):
        if _resnet_fits(module):
            norms += 2 * _set(module, _resnet_forward)
        elif _is(module, "diffusers.models.activations", "GEGLU"):
            gates += _set(module, _geglu_forward)
        elif _lora_fits(module):
            loras += _set(module, _lora_forward)
        elif _last_norm_fits(module, unet):
            pair: Any = module.conv_norm_out, module.conv_act
            if all("forward" not in m.__dict__ or _forward(m) for m in pair):
                norms += _set(pair[0], _norm_silu_forward) and _set(pair[1], _identity_forward)
    counts = PatchCounts(norms, gates, loras)
    if not any(counts):
        what = f"patch_unet: nothing in {type(unet).__name__} can be fused, it has no layer of a diffusers UNet"
        warnings.warn(what, stacklevel=2)
    return counts


def unpatch_unet(unet: nn.Module) -> PatchCounts:
    """Undo `patch_unet`: every module has its class's forward again. Returns the places that were fused."""
    found = [(module, _forward(module)) for module in unet.modules()]
    for module, forward in found:
        if forward is not None:
            del module.__dict__["forward"]
    counts = [sum(forward is ours for _, forward in found) for ours in _FORWARDS]
    return PatchCounts(counts[0] + 2 * counts[2], counts[3], counts[4])
