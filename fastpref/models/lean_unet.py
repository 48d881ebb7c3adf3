"""A UNet without the kernels that its layers launch for nothing, in plain torch.

What diffusers' and peft's layers do is kept; what they launch on a GPU is less, each a pass over a whole activation:

* divisions by 1.0 behind every attention and every residual block are left out;
* the residual blocks' SiLU of the time embedding, the same for all of them, is computed once;
* a convolution's bias, for which torch launches a kernel of its own on a GPU, is added to the time embedding (first
  convolution) or to the shortcut's bias (second), before that is added to the activation;
* the LoRA's product is added onto the weight's by BLAS, in the forward and in the gradient of the input, with the scale
  folded in (:func:`fastpref_kernels.lora_linear`), instead of by a product, a multiplication and an addition;
* GEGLU's backward writes both halves where they belong instead of joining them.

Sums are associated otherwise, never rounded more often. Only ``forward`` of single modules is overridden, on the
instance: parameters, their names, hooks and the state_dict stay. What a module cannot do exactly so (another class, a
hook, a merged or disabled adapter, DoRA, several adapters at once) takes its own forward, decided at every call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from fastpref.models.attention import Attention
from fastpref_kernels import lora_linear
from fastpref_kernels.patch import plain_adapter, untouched


def make_lean(unet: nn.Module) -> None:
    """Override forwards in a diffusers UNet, in place; those that somebody else has overridden stay."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.resnet import ResnetBlock2D
    from peft.tuners.lora.layer import Linear

    _activate_time_once(unet)
    _divide_no_attention(unet)
    forwards: dict[type, Callable[..., Tensor]] = {
        ResnetBlock2D: _resnet_forward,
        GEGLU: _geglu_forward,
        Linear: _lora_forward,
    }
    for module in unet.modules():
        forward = forwards.get(type(module))
        if forward is not None and "forward" not in module.__dict__:
            module.__dict__["forward"] = MethodType(forward, module)


def _activate_time_once(unet: Any) -> None:
    """Put the SiLU behind the sum of the embeddings, unless something else is there or somebody needs it without."""
    from diffusers.models.resnet import ResnetBlock2D

    readers = [module for module in unet.modules() if hasattr(module, "time_emb_proj")]
    own = [r for r in readers if type(r) is ResnetBlock2D and r.time_emb_proj is not None and not r.skip_time_act]
    holder = unet.time_embed_act if hasattr(unet.time_embed_act, "act") else unet
    name = "act" if holder is not unet else "time_embed_act"
    if (
        len(own) != len(readers)
        or getattr(holder, name) is not None
        or unet.config.resnet_time_scale_shift != "default"
    ):
        return
    if all(type(block.nonlinearity) is nn.SiLU for block in own):
        setattr(holder, name, nn.SiLU())
        for block in own:
            block.skip_time_act = True


def _divide_no_attention(unet: Any) -> None:
    """Our processor in place of diffusers' of the same arithmetic, which divides by 1."""
    from diffusers.models.attention_processor import Attention as Layer
    from diffusers.models.attention_processor import AttnProcessor2_0

    for layer in unet.modules():
        if type(layer) is Layer and type(layer.processor) is AttnProcessor2_0 and _is_plain(layer):
            layer.set_processor(Attention(scaled_dot_product_attention))


def _is_plain(layer: Any) -> bool:
    norms = layer.spatial_norm, layer.group_norm, layer.norm_q, layer.norm_k, layer.norm_cross
    return not any(norms) and not layer.residual_connection and layer.rescale_output_factor == 1.0


def _resnet_forward(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """A residual block with additive time embedding."""
    resampled = self.upsample is not None or self.downsample is not None
    if (
        args
        or kwargs
        or temb is None
        or self.time_emb_proj is None
        or resampled
        or self.time_embedding_norm != "default"
    ):
        return type(self).forward(self, input_tensor, temb, *args, **kwargs)
    hidden, bias = _without_bias(self.conv1, self.nonlinearity(self.norm1(input_tensor)))
    temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
    hidden = hidden + (temb if bias is None else temb + bias)[:, :, None, None]
    hidden = self.dropout(self.nonlinearity(self.norm2(hidden)))
    if self.conv_shortcut is None:
        out = input_tensor + self.conv2(hidden)
    else:
        hidden, bias = _without_bias(self.conv2, hidden)
        # a channels-last gradient of a 1x1 convolution has other strides than DDP's buckets expect
        given = input_tensor.contiguous() if self.training else input_tensor
        out = _with_bias(self.conv_shortcut, given, bias) + hidden
    return out if self.output_scale_factor == 1.0 else out / self.output_scale_factor


def _bare(conv: Any) -> bool:
    return type(conv) is nn.Conv2d and untouched(conv)


def _without_bias(conv: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(the convolution without its bias, the bias); (the whole, None) where its own forward is due."""
    return (conv._conv_forward(x, conv.weight, None), conv.bias) if _bare(conv) else (conv(x), None)


def _with_bias(conv: Any, x: Tensor, more: Tensor | None) -> Tensor:
    """The convolution with ``more`` (C,) added."""
    if more is None:
        return conv(x)
    if not _bare(conv):
        return conv(x) + more[:, None, None]
    return conv._conv_forward(x, conv.weight, more if conv.bias is None else conv.bias + more)


class _Gated(torch.autograd.Function):
    """value · gelu(gate) of (..., 2C), with the bits of the three ops one by one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        value, gate = hidden.chunk(2, dim=-1)
        activated = gelu(gate)
        ctx.save_for_backward(hidden, activated)
        return value * activated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        hidden, activated = ctx.saved_tensors
        value, gate = hidden.chunk(2, dim=-1)
        found = torch.empty_like(hidden)
        to_value, to_gate = found.chunk(2, dim=-1)
        torch.mul(grads[0], activated, out=to_value)
        torch.ops.aten.gelu_backward.grad_input(grads[0] * value, gate, grad_input=to_gate)
        return found


def _geglu_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or torch.compiler.is_compiling():  # a compiler fuses the plain form
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return _Gated.apply(self.proj(hidden_states))


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapter = None if args or kwargs or type(self.base_layer) is not nn.Linear else plain_adapter(self, x)
    if adapter is None:
        return type(self).forward(self, x, *args, **kwargs)
    base, a, b = self.base_layer, self.lora_A[adapter], self.lora_B[adapter]
    return lora_linear(x.contiguous(), base.weight, base.bias, a.weight, b.weight, self.scaling[adapter])
