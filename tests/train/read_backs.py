"""What would make the host wait for a device."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class ReadBacks(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: values read into Python and sizes that depend on values."""

    WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        if name.startswith(self.WAITING):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))
