"""What inductor makes of the compiled blocks of a UNet, from its own scheduler and without generating code.

Blocks are traced and differentiated as torch.compile does, then lowered and fused for inductor's Triton backend with
fake tensors in place of a GPU's. A node of the finished schedule is a kernel, its bytes are those that inductor counts
for it. Products, convolutions and attention stay calls of libraries and are counted as in eager code; a convolution's
bias is peeled off, as inductor does on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from pass_meter import FUSED, LIBRARIES, PassMeter
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import FusedSchedulerNode, SchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from fastpref.models import compiled


@contextmanager
def counted(meters: dict[str, PassMeter], mode: FakeTensorMode) -> Iterator[None]:
    """Inside, what :func:`fastpref.models.compiled.compile_unet` has compiled is counted where it is called."""
    backend = aot_autograd(
        fw_compiler=_compiler(meters["forward"], mode),
        bw_compiler=_compiler(meters["backward"], mode),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    with mock.patch.dict(compiled.OPTIONS, backend=backend):
        yield
    torch._dynamo.reset()


def _compiler(meter: PassMeter, mode: FakeTensorMode) -> Callable[..., Any]:
    def compile_graph(graph: torch.fx.GraphModule, _: Any) -> Any:
        _peel_biases(graph)
        kernels = _kernels(graph)

        def call(*arguments: Any) -> Any:
            inner = PassMeter().freeze(meter.frozen)
            with _disable_current_modes(), mode, inner:
                found = graph.forward(*arguments)
            for (group, name), tally in inner.found.items():
                if group in LIBRARIES:
                    meter.found[group, name].merge(tally)
            for moved in kernels:
                meter.found[FUSED, "kernels of inductor"].add(1, moved)
            return found

        return make_boxed_func(call)

    return compile_graph


def _kernels(graph: torch.fx.GraphModule) -> list[int]:
    """Bytes of each kernel that inductor would generate for ``graph``."""
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    mode = torch._guards.detect_fake_mode(inputs)
    with _disable_current_modes(), V.set_fake_mode(mode), config.patch(cpu_backend="triton"):
        view_to_reshape(graph)
        post_grad_passes(graph, False)
        lowering = GraphLowering(graph, example_inputs=inputs)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering._update_scheduler()
            nodes = [node for node in lowering.scheduler.nodes if isinstance(node, SchedulerNode | FusedSchedulerNode)]
            return [node.get_read_write_buffers_sizes() for node in nodes]


def _peel_biases(graph: torch.fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.target is not torch.ops.aten.convolution.default or node.args[2] is None:
            continue
        bias, plain = node.args[2], node.meta["val"]
        with graph.graph.inserting_after(node):
            column = graph.graph.call_function(torch.ops.aten.view.default, (bias, [1, -1, *[1] * (plain.ndim - 2)]))
        with graph.graph.inserting_after(column):
            added = graph.graph.call_function(torch.ops.aten.add.Tensor, (node, column))
        node.replace_all_uses_with(added, delete_user_cb=lambda user, added=added: user is not added)
        node.args = (*node.args[:2], None, *node.args[3:])
        with _disable_current_modes(), torch._guards.detect_fake_mode([plain]):
            column.meta["val"] = bias.meta["val"].view(1, -1, *[1] * (plain.ndim - 2))
        added.meta["val"] = plain
    graph.recompile()
