"""Published weight files: opened without running code from them, and refused if they are of another layout."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastpref.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def read_state_dict(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """Name to tensor, on the CPU, of a safetensors file or of what ``torch.save`` wrote.

    Args:
        entry: the key under which a training checkpoint keeps its weights, used where it is there.

    Raises:
        UserError: no such file, a damaged one, or one that needs more than ``weights_only`` loading.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError("no such checkpoint", str(path), "scorers are not downloaded: give a file on disk")
    try:
        if path.suffix == ".safetensors":
            value: Any = load_file(path)
        else:
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        todo = "re-save its state dict as safetensors if you trust its source"
        raise UserError("the checkpoint is damaged or holds more than tensors", str(path), todo) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise UserError("cannot read the checkpoint", str(path), " ".join(str(error).split())[:200]) from error
    if entry is not None and isinstance(value, Mapping) and isinstance(value.get(entry), Mapping):
        value = value[entry]
    if not isinstance(value, Mapping) or not value or not all(isinstance(v, torch.Tensor) for v in value.values()):
        raise UserError("the checkpoint holds no state dict", str(path), "give the file as published")
    return {str(name).removeprefix("module."): tensor for name, tensor in value.items()}


def core_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a weight without a 1x1 (or length 1) kernel: such a convolution and a linear layer mean the same."""
    return tuple(shape[:2]) if all(side == 1 for side in shape[2:]) else tuple(shape)


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str, todo: str) -> None:
    """Raise :class:`UserError` if a named tensor holds NaN or an infinity."""
    for name, tensor in tensors:
        # 8-bit floats have no isfinite of their own
        wide = tensor.detach().float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor.detach()
        bad = wide.numel() - int(torch.isfinite(wide).sum())
        if bad:
            raise UserError(f"{name} has {bad} of {wide.numel()} numbers that are NaN or infinite", where, todo)


def refuse(
    path: Path, missing: Collection[str], unexpected: Collection[str] = (), mismatched: Collection[str] = ()
) -> None:
    """Raise :class:`UserError` if there is anything in the lists: other weights than the layout has."""
    for what, names in (("lacks", missing), ("has the wrong shape for", mismatched), ("has the unknown", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"the checkpoint {what} {min(names)}{more}", str(path), "give the file as published")
