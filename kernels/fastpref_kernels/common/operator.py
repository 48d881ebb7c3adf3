"""An op in two forms: registered with torch.library for whatever traces it, and called as it is by eager code.

torch.library's way to a function in Python costs tens of microseconds of host time a call, which a UNet with hundreds
of LoRA layers feels; `benchmarks/op_bench.py host` measures both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function

from .last import traced

REGISTERED: dict[str, Operator] = {}
_NAMESPACE = __name__.partition(".")[0]  # the package's name, which a kernel hub chooses


class Operator:
    """A function on tensors with a schema, made by :func:`operator`; arguments are given by position."""

    def __init__(self, name: str, schema: str, plain: Callable[..., Any]) -> None:
        self.label, self.plain = f"{_NAMESPACE}::{name}", plain
        self.registered = torch.library.custom_op(self.label, traced(plain), mutates_args=(), schema=schema)
        self._apply: Callable[..., Any] | None = None
        REGISTERED[name] = self

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """What the op returns for fake tensors."""
        self.registered.register_fake(fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Give the op its gradient, of the first order: a second derivative raises RuntimeError."""
        backward = _first_order(self.label, backward)
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = _function(self.label, self.plain, backward, setup_context)
        # the apply of C: the one of Python asks again for transforms, of which there are none here
        self._apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def __call__(self, *arguments: Any) -> Any:
        if has_torch_function(arguments):  # as torch's own functions do, so that a mode sees the op
            return handle_torch_function(self, arguments, *arguments)
        return self._form(arguments)(*arguments)

    def _form(self, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        if _is_traced():
            return self.registered
        differentiable = False
        for x in arguments:
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                differentiable = differentiable or x.requires_grad
            elif x is not None and isinstance(x, Tensor):  # a subclass has to see one op
                return self.registered
        form = self.plain
        if differentiable and torch.is_grad_enabled():
            # an op without a gradient says so when somebody asks for it
            form = self.registered if self._apply is None else self._apply
        return torch.profiler.record_function(self.label)(form) if torch.autograd._profiler_enabled() else form


class _Last(torch.autograd.Function):
    """The gradients `tensors[:count]`, which nobody may differentiate with respect to the other tensors or at all."""

    @staticmethod
    def forward(label: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.label = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.label} has no second derivative; its gradient is made of kernels that have none")


def _first_order(label: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward, whose results say that they cannot be differentiated where somebody tries (create_graph=True)."""

    def once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        gradients = (found,) if isinstance(found, Tensor) else found
        # the results require a gradient where what they depend on does: what came in, and what the op has saved
        return _Last.apply(label, len(gradients), *gradients, *grads, *ctx.saved_tensors)

    return once


def _function(
    label: str, plain: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    """The op for autograd. A setup_context of its own would make torch look up the signature at every call."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = plain(*inputs)
        setup_context(ctx, inputs, output)
        return output if isinstance(output, Tensor) else tuple(output)

    return type(
        label.replace("::", "_"),
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function the op ``name`` in the namespace of this package."""
    return lambda plain: Operator(name, schema, plain)


def _is_traced() -> bool:
    """Whether somebody has to see one op and not what it does: a compiler, a mode, a transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )
