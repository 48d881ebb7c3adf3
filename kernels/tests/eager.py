"""What eager torch moves: the bytes of every operator, counted like those of the interpreted kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_VIEWS = {"view", "expand", "unsqueeze", "squeeze", "reshape", "_unsafe_view", "alias", "detach", "permute", "t"}
_VIEWS |= {"transpose", "as_strided", "slice", "select", "split", "empty_like", "empty", "new_empty"}


class Eager(TorchDispatchMode):
    """Bytes that each operator reads and writes, an expanded dimension counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in _VIEWS:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.moved += sum(map(_distinct_bytes, tensors))
            self.launches += 1
        return out


def _distinct_bytes(x: torch.Tensor) -> int:
    count = 1 if x.numel() else 0
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()
