"""A GPU for machines without one: tensors that say ``cuda:0``, are computed on the CPU and don't mix with its tensors.

What a GPU would refuse raises (:class:`MixedDevices`): tensors of two devices in one op, but for a CPU scalar in
pointwise arithmetic and an upload; a generator of the other device. What would make the host wait for a GPU is counted
(:attr:`StandInGpu.waits`): values read into Python, sizes that depend on values, and copies, but for those that are
``non_blocking`` and have pinned memory on the CPU's side: pageable memory the driver copies to its own first, and the
host waits for that.
torch's own FakeTensorMode does neither here: it stacks scalars of two devices, has no values to go on with, and a CPU
build of torch aborts when it builds a graph of its cuda tensors.
"""

from __future__ import annotations

import linecache
import os
import traceback
from collections import Counter
from contextlib import ExitStack, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from stand_in_graphs import Graph, Pool, Recording
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

import fastpref
import fastpref_kernels

if not torch.cuda.is_available():  # transformers imports DeepSpeed wherever it saves, and that asks once for its device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_OURS = tuple(f"{Path(str(module.__file__)).parent}{os.sep}" for module in (fastpref, fastpref_kernels))
# What autograd sees, which a CPU build of torch cannot run for cuda. The number tells it from meta tensors proper.
_CARRIER = torch.device("meta", 1)
# Of autocast, which torch decides by the carrier: what becomes half. Norms stay in the dtype they get.
_HALVED = ("mm", "addmm", "mv", "addmv", "bmm", "baddbmm", "convolution", "convolution_backward")
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "bincount", "is_nonzero")
_COPIES = ("_to_copy", "copy_", "_foreach_copy_")
_INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
# Whatever they are given: they may make the host wait, or are decided here
_WATCHED = frozenset((*_READS, *_COPIES, *_INDEXED, "_fused_sdp_choice"))
_CHOOSING = frozenset(("device", "generator", "pin_memory"))  # arguments that choose a device
_FOREACH_SCALARS = ("_foreach_add_", "_foreach_mul_", "_foreach_div_")
_PAGE_LOCKED: Any = WeakIdKeyDictionary()  # storages on the CPU


class MixedDevices(RuntimeError):
    """An op met tensors of the GPU and of the CPU."""


class GpuTensor(torch.Tensor):
    """Says that it is on the GPU; ``inner``, on the CPU, holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool | None = None) -> GpuTensor:
        """``requires_grad``: accelerate takes the class of a parameter for that of torch and calls it like that."""
        inner = _inner(inner)
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_CARRIER,
        )
        made.inner = inner.detach()
        if requires_grad is not None:
            made._is_param = True
            made.requires_grad_(requires_grad)
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda _: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda _: True)  # type: ignore[assignment]
    is_meta = property(lambda _: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA)  # torch's own would be on the carrier

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if not isinstance(value, GpuTensor):
            raise MixedDevices("the data of a tensor of the GPU is set to a tensor of the CPU")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    def __repr__(self, **_: Any) -> str:
        return f"GpuTensor({self.inner})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # modules then move by exchanging their parameters
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], *_: Any) -> GpuTensor:
        return GpuTensor(parts["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, dict(kwargs or {}), Counter())


class _Generator(torch.Generator):
    """Remembers the device it was made for."""

    kinds: ClassVar[dict[int, str]] = {}  # by address: an op gets a Python object of its own for it

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")
        cls.kinds[made._cdata] = torch.device(device).type
        return made


class _Autocast(torch.autocast):
    """Remembers what it was entered with, for torch hides that from what is below it."""

    dtypes: ClassVar[list[torch.dtype | None]] = []

    def __enter__(self) -> Any:
        if self.device == "cuda":
            self.dtypes.append(self.fast_dtype if self._enabled else None)
        return super().__enter__()

    def __exit__(self, *found: Any) -> Any:
        if self.device == "cuda":
            self.dtypes.pop()
        return super().__exit__(*found)


class _Event:
    """Of a GPU that is always done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorded = False

    def record(self, *_: Any) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded, "an event is waited for that nobody recorded"

    def query(self) -> bool:
        return self.recorded

    def elapsed_time(self, _: _Event) -> float:
        return 0.0


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


class StandInGpu(TorchDispatchMode):
    """Inside, ``torch.device("cuda", 0)`` is there; ``waits`` counts by op what a real one would keep the host for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> StandInGpu:
        stack = self._stack
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes its values on the CPU, then moves them
        stream = _Stream()
        replaced = {
            "is_available": lambda: True,
            "_lazy_init": lambda: None,
            "is_current_stream_capturing": lambda: Recording.recorder is not None,
            "CUDAGraph": Graph,
            "graph": Recording.graph,
            "graph_pool_handle": Pool,
            "current_stream": lambda *_: stream,
            "stream": lambda *_: nullcontext(),
            "synchronize": lambda *_: None,
            "max_memory_allocated": lambda *_: 0,
            "reset_peak_memory_stats": lambda *_: None,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda *_: None,
            "get_device_properties": lambda *_: SimpleNamespace(total_memory=1 << 37, name="stand-in"),
            "get_device_capability": lambda *_: (9, 0),
            "mem_get_info": lambda *_: (1 << 36, 1 << 37),
            "is_bf16_supported": lambda *_: True,
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *_: None,
            "empty_cache": lambda: None,
            "Event": _Event,
            "Stream": _Stream,
        }
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch, "autocast", _Autocast))
        methods = {
            "to": _indexed(torch.Tensor.to),
            "record_stream": lambda *_: None,
            "pin_memory": _pinned,
            "is_pinned": lambda tensor, *_: _is_pinned(tensor),
        }
        for name, value in methods.items():  # other threads, where the mode is off, pin too
            stack.enter_context(mock.patch.object(torch.Tensor, name, value))
        super().__enter__()
        return self

    def __exit__(self, *found: Any) -> None:
        super().__exit__(*found)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, dict(kwargs or {}), self.waits)


def on_gpu(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, GpuTensor)


def _computed(func: Any, args: Any, kwargs: dict[str, Any], waits: Counter[str]) -> Any:
    name = _name(func)
    given = [x for value in (*args, *kwargs.values()) for x in _tensors(value)]
    wrappers = {id(x.inner): x for x in given if isinstance(x, GpuTensor)}
    if not wrappers and name not in _WATCHED and _CHOOSING.isdisjoint(kwargs):
        return func(*args, **kwargs)  # the CPU's own: most calls, of the noise above all
    _refuse_mixtures(func, name, given)
    target = kwargs.get("device")
    target = target and torch.device(target)
    there = bool(wrappers) if target is None else target.type == "cuda" or target == _CARRIER
    generator = kwargs.get("generator")
    if generator is not None and _Generator.kinds.get(generator._cdata, "cpu") != ("cuda" if there else "cpu"):
        raise MixedDevices(f"{func}: the generator is of the other device")
    if name in _WATCHED:
        _count_waits(name, given, there, kwargs, args, waits)
    if name == "_fused_sdp_choice":
        return 0  # the composite of plain ops: the fused ones differ by device
    if target is not None and there:
        kwargs["device"] = CPU
    page_locked = kwargs.get("pin_memory") and not there
    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = False
    inner_args = tuple(_mapped(_inner, value) for value in args)
    inner_kwargs = {key: _mapped(_inner, value) for key, value in kwargs.items()}
    if wrappers and name in _HALVED:
        inner_args = _autocast(inner_args)
    recorder = Recording.recorder if there else None
    if recorder is not None:
        _refuse_uploads(func, given)
        recorder.protect(func, inner_args, inner_kwargs)
    found = func(*inner_args, **inner_kwargs)
    if name == "_to_copy" and isinstance(found, torch.Tensor) and found is inner_args[0]:
        found = found.clone()
    if recorder is not None:
        recorder.note(func, inner_args, inner_kwargs, found)
    if page_locked or (name == "_to_copy" and wrappers and not there and kwargs.get("non_blocking")):
        _PAGE_LOCKED[found.untyped_storage()] = None  # torch downloads to page-locked memory then

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in wrappers:
            same = wrappers[id(value)]
            assert same.shape == value.shape, f"{func} changes the shape in place, which the stand-in cannot"
            return same
        return GpuTensor(value) if there else value

    return _mapped(outer, found)


@cache
def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")  # type: ignore[no-any-return]


def _tensors(value: Any) -> list[torch.Tensor]:
    """Of an argument, which may be a list: an op's are no deeper, and torch's trees take as long as the ops here."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for x in value if isinstance(x, torch.Tensor)] if isinstance(value, list | tuple) else []


def _mapped(change: Any, value: Any) -> Any:
    return type(value)(map(change, value)) if type(value) in (list, tuple) else change(value)


def _autocast(args: Any) -> Any:
    """Arguments in the dtype autocast gives them. A backward, where it is off, meets what the forward made."""
    floats = [x.dtype for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    wanted = _Autocast.dtypes[-1] if _Autocast.dtypes else None
    halves = [dtype for dtype in floats if dtype.itemsize == 2]
    to = wanted or next(iter(halves), None)
    if to is None or torch.float64 in floats:
        return args
    return tuple(x.to(to) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, GpuTensor) else value


def _refuse_mixtures(func: Any, name: str, given: list[torch.Tensor]) -> None:
    host = [x for x in given if not isinstance(x, GpuTensor)]
    if not host or len(host) == len(given) or name in _COPIES:
        return
    if name in _INDEXED and isinstance(given[0], GpuTensor):
        return  # indices may lie on the CPU
    scalars = all(x.ndim == 0 for x in host)
    if scalars and (torch.Tag.pointwise in func.tags or name in _FOREACH_SCALARS):
        return
    shapes = [(str(x.device), tuple(x.shape)) for x in given]
    raise MixedDevices(f"{func} of tensors of two devices: {shapes}")


def _count_waits(
    name: str, given: list[torch.Tensor], there: bool, kwargs: dict[str, Any], args: Any, waits: Counter[str]
) -> None:
    devices = {isinstance(x, GpuTensor) for x in given}
    before = waits.total()
    _count_wait(name, given, there, kwargs, args, waits, devices)
    if waits.total() > before:
        Recording.refuse(f"the host waits for {name}, {_place()},")


def _refuse_uploads(func: Any, given: list[torch.Tensor]) -> None:
    """What lies on the CPU now will have changed when the graph is replayed; a scalar goes into the graph."""
    if any(not isinstance(x, GpuTensor) and x.ndim for x in given):
        Recording.refuse(f"{func} reads a tensor of the CPU, {_place()},")


def _count_wait(
    name: str,
    given: list[torch.Tensor],
    there: bool,
    kwargs: dict[str, Any],
    args: Any,
    waits: Counter[str],
    devices: set[bool],
) -> None:
    if name in _READS and True in devices:
        waits[f"{name}, {_place()}"] += 1
    elif name in _INDEXED and any(x is not None and x.dtype == torch.bool and on_gpu(x) for x in args[1]):
        waits[f"{name} by a mask, {_place()}"] += 1
    elif name in _INDEXED and devices == {True, False}:
        waits[f"{name} with indices of the CPU, {_place()}"] += 1
    elif name == "_to_copy" and given and on_gpu(given[0]) != there:
        _count_copy(given[0] if there else None, there, bool(kwargs.get("non_blocking")), waits)
    elif name in ("copy_", "_foreach_copy_") and devices == {True, False}:
        unblocked = bool(kwargs.get("non_blocking") or args[2:3] == (True,))
        for to, source in zip(*(x if isinstance(x, list | tuple) else [x] for x in args[:2]), strict=True):
            if on_gpu(to) != on_gpu(source):
                _count_copy(source if on_gpu(to) else to, on_gpu(to), unblocked, waits)


def _count_copy(here: torch.Tensor | None, up: bool, unblocked: bool, waits: Counter[str]) -> None:
    """``here``: the side on the CPU, None for one that torch makes. What is not contiguous torch makes so first, in
    pageable memory."""
    free = unblocked and (here is None or (_is_pinned(here) and here.is_contiguous()))
    if not free:
        pageable = " of pageable memory" if unblocked else ""
        waits[f"{'upload' if up else 'download'}{pageable}, {_place()}"] += 1


def _place() -> str:
    """The line of ours that waits."""
    for frame, number in traceback.walk_stack(None):
        if (file := frame.f_code.co_filename).startswith(_OURS):
            return f"{Path(file).name}:{number} {linecache.getline(file, number).strip()}"
    return "elsewhere"


def _indexed(to: Any) -> Any:
    """``Tensor.to`` that takes ``cuda`` for the only GPU: torch would ask its library, which isn't there, for one."""
    plain = torch.device("cuda")

    def chosen(value: Any) -> Any:
        return CUDA if isinstance(value, str | torch.device) and torch.device(value) == plain else value

    return lambda tensor, *args, **kwargs: to(
        tensor, *map(chosen, args), **{key: chosen(value) for key, value in kwargs.items()}
    )


def _is_pinned(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, GpuTensor) and tensor.untyped_storage() in _PAGE_LOCKED


def _pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    if isinstance(tensor, GpuTensor):
        raise MixedDevices("only tensors of the CPU can be pinned")
    if _is_pinned(tensor):
        return tensor
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    made.copy_(tensor)  # raises for an expanded one, as torch's own does
    _PAGE_LOCKED[made.untyped_storage()] = None
    return made
