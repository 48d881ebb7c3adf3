"""How a UNet computes attention: torch's own, xformers, flash-attn, or slice by slice where memory is short.

All of them are softmax(q·kᵀ/√d)·v; they differ in memory, speed and rounding. torch's stays the default: its fused
kernels need as little memory as the others, and it works everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fastpref.errors import UserError
from fastpref.memory import free_bytes

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]  # (N, heads, length, width) each, to the same
_SLICE_BYTES = 64 << 20  # of scores at a time
_PACKAGES = {"xformers": "xformers", "flash": "flash_attn"}


def set_attention(unet: Any, choice: str, device: torch.device, dtype: torch.dtype) -> None:
    """Make the attention layers of a diffusers UNet compute as ``choice`` says (see the key ``attention``).

    Raises:
        UserError: it is installed wrongly, not at all, or does not work on this device in this dtype.
    """
    if choice in _PACKAGES and (fault := attention_fault(choice, device, dtype)) is not None:
        raise UserError(f"attention {choice}: {fault}", "attention", "use attention=auto")
    if choice == "sdpa" or (choice == "auto" and _has_fused_kernel(device, dtype)):
        return  # diffusers' default
    unet.set_attn_processor(Attention({**_COMPUTES, "auto": _by_free_memory}[choice]))


def attention_fault(choice: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``choice`` cannot be used on ``device``, in one line; None if a small trial of it works."""
    import importlib

    package = _PACKAGES.get(choice)
    try:
        if package is not None:
            importlib.import_module(package)
        trial = torch.ones(1, 1, 8, 64, device=device, dtype=dtype)
        _COMPUTES[choice](trial, trial, trial)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == package else f"cannot be imported: {_first_line(error)}"
    except (ImportError, OSError) as error:
        return f"cannot be imported: {_first_line(error)}"
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        return f"does not work on {device.type} in {str(dtype).removeprefix('torch.')}: {_first_line(error)}"
    return None


def compute_of(choice: str) -> Compute:
    """softmax(q·kᵀ/√d)·v of (N, heads, length, width) as ``choice`` (sdpa, sliced, xformers, flash) computes it."""
    return _COMPUTES[choice]


class Attention:
    """The attention processor of a UNet2DConditionModel's layers, which have neither masks nor norms of their own."""

    def __init__(self, compute: Compute) -> None:
        self.compute = compute

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        found = self.compute(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)
        return attn.to_out[1](attn.to_out[0](found))


def sliced_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Some queries at a time; the backward computes the scores of a slice again instead of keeping them."""
    per_query = k.shape[0] * k.shape[1] * k.shape[2] * max(q.element_size(), 4)
    size = max(1, _SLICE_BYTES // per_query)
    return torch.cat([_again(part, k, v) for part in q.split(size, dim=2)], dim=2)


def _again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return checkpoint(_plain, q, k, v, use_reentrant=False, preserve_rng_state=False)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=wide).to(v.dtype) @ v


def _by_free_memory(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
    short = 4 * scores > free_bytes(q.device)
    return sliced_attention(q, k, v) if short else scaled_dot_product_attention(q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


_COMPUTES: dict[str, Compute] = {
    "sdpa": scaled_dot_product_attention,
    "sliced": sliced_attention,
    "xformers": _xformers,
    "flash": _flash,
}


def _has_fused_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's attention on ``device`` never holds all scores; its CPU kernel does not."""
    if device.type != "cuda":
        return True
    from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

    trial = torch.ones(1, 1, 8, 64, device=device, dtype=dtype)
    params = SDPAParams(trial, trial, trial, None, 0.0, False, False)
    return can_use_flash_attention(params) or can_use_efficient_attention(params)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:120]
