"""Trained weights in fp32, beside the half-precision copies of them that a forward computes with.

The optimizer sees the masters only. Copies are refreshed once a step; their gradients, which arrive in half precision,
are added up in fp32. Where a module computes in the precision of its weights, a weight is its own master.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager

import torch

_MOST_WAITING = 64 << 20  # bytes of half-precision gradients at once, beside those in fp32


class Masters:
    """The masters of ``parameters``, whose data become ``half`` copies but for those named in ``wide``.

    Args:
        parameters: what is trained, by name: fp32, or ``half`` already.
        half: bf16 or fp16; None: every parameter is its own master.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        half: torch.dtype | None = None,
        wide: Container[str] = (),
    ) -> None:
        self.copies = dict(parameters)
        self.named: dict[str, torch.nn.Parameter] = {}
        self._pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []  # master, copy
        self._waiting: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        self._bytes = 0
        self._collected: Callable[[torch.Tensor], None] | None = None
        for name, copy in parameters.items():
            self.named[name] = copy
            if half is None or name in wide:
                continue
            self.named[name] = torch.nn.Parameter(copy.detach().to(torch.float32))
            copy.data = copy.data.to(half)
            self._pairs.append((self.named[name], copy))

    def watch(self, collected: Callable[[torch.Tensor], None] | None = None) -> None:
        """From now on copies' gradients move to the masters during the backward, whenever many are waiting.

        Args:
            collected: is given each new gradient of a master.
        """

        def noted(master: torch.nn.Parameter, copy: torch.nn.Parameter) -> None:
            self._waiting.append((master, copy))
            self._bytes += copy.nbytes
            if self._bytes > _MOST_WAITING:
                self.collect()

        self._collected = collected
        for master, copy in self._pairs:
            copy.register_post_accumulate_grad_hook(lambda _, master=master, copy=copy: noted(master, copy))

    @torch.no_grad()
    def collect(self) -> None:
        """Add what waits to the masters' gradients; the copies have none afterwards."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if not waiting:
            return
        found = [torch.empty_like(master) for master, _ in waiting]
        torch._foreach_copy_(found, [copy.grad for _, copy in waiting])
        together: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        for (master, copy), gradient in zip(waiting, found, strict=True):
            copy.grad = None
            if master.grad is not None:
                together[0].append(master.grad)
                together[1].append(gradient)
                continue
            master.grad = gradient
            if self._collected is not None:
                self._collected(gradient)
        if together[0]:
            torch._foreach_add_(*together)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters to their copies."""
        if self._pairs:
            torch._foreach_copy_([copy.data for _, copy in self._pairs], [master.data for master, _ in self._pairs])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module's parameters are the masters, for whoever reads its weights."""
        before = [copy.data for _, copy in self._pairs]
        for master, copy in self._pairs:
            copy.data = master.data
        try:
            yield
        finally:
            for (_, copy), data in zip(self._pairs, before, strict=True):
                copy.data = data
