"""The Triton interpreter, mended for tests (written against triton 3.7.1).

As shipped it truncates fp32 to bf16 where a GPU rounds to nearest even, does bf16 arithmetic and matrix products on
the raw bits, reads and writes outside its tensors in silence, and runs programs one after the other, so that one may
read what another wrote. After `install()` the casts round as hardware does, `tl.dot` of bf16 has exact products and
fp32 sums as on tensor cores, other arithmetic or a reduction in bf16 is an error (kernels upcast on load), and so is
any unmasked access outside the tensors given to the launch (`OutOfBounds`), and any element that one program writes
and another program of the launch reads or writes (`Race`), unless an integer `tl.atomic_add` of each, acquire and
release, puts the one before the other whatever the order of programs. `traffic()` counts the bytes of every launch,
`only()` runs a few programs of a grid too large to interpret, `shuffled()` runs them in another order.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as shipped

Programs = Callable[[tuple[int, int, int]], bool]


class OutOfBounds(IndexError):
    """An access outside the tensors of the launch."""


class Race(RuntimeError):
    """Two programs of a launch meet in an element that at least one of them writes."""


class _Order:
    """Which of the programs' accesses come before others in every order of programs: vector clocks.

    The clock of a program counts its atomics. An atomic leaves with its counter all that its program has seen and takes
    what the programs before it left.
    """

    def __init__(self) -> None:
        self.clocks: dict[int, dict[int, int]] = {}  # of what each program has seen, itself too
        self.left: dict[int, dict[int, int]] = {}  # with a counter, by its address

    def clock(self, program: int) -> int:
        return self.clocks.get(program, {}).get(program, 0)

    def meet(self, program: int, address: int, ordered: bool) -> None:
        mine = self.clocks.setdefault(program, {})
        mine[program] = mine.get(program, 0) + 1
        left = self.left.setdefault(address, {})
        if not ordered:
            left[program] = mine[program]
            return
        for other, clock in left.items():
            mine[other] = max(clock, mine.get(other, 0))
        left.update(mine)

    def met_all(self, program: int, low: int, high: int, addresses: np.ndarray) -> bool:
        """Whether every atomic so far on one of the addresses comes before what the program does now."""
        seen = self.clocks.get(program, {})
        for address, left in self.left.items():
            late = low <= address < high and any(clock > seen.get(other, 0) for other, clock in left.items())
            if late and (addresses == np.uint64(address)).any():
                return False
        return True

    def before(self, others: np.ndarray, clocks: np.ndarray, program: int) -> bool:
        """Whether what those programs (0 none, -1 several) did at their clocks comes before what this one does now."""
        strange = (others != 0) & (others != program)
        if not strange.any():
            return True
        seen = self.clocks.get(program, {})
        pairs = {*zip(others[strange].tolist(), clocks[strange].tolist(), strict=True)}
        return all(clock < seen.get(other, 0) for other, clock in pairs)


class _Region:
    """Memory of tensors that overlap, and for each element the programs that wrote and read it: 0 none, -1 several; and
    their clocks then."""

    def __init__(self, first: int, end: int, width: int) -> None:
        self.first, self.end, self.width = first, end, width
        self.writer, self.reader = (np.zeros(-(-(end - first) // width), dtype=np.int32) for _ in range(2))
        self._clocks: dict[bool, np.ndarray] = {}  # of writers (True) and readers, once one is not 0

    def _clocks_at(self, places: np.ndarray, writes: bool) -> np.ndarray:
        clocks = self._clocks.get(writes)
        return np.zeros(places.shape, dtype=np.int32) if clocks is None else clocks[places]

    def _set_clock(self, places: np.ndarray, writes: bool, clock: int) -> None:
        if clock and writes not in self._clocks:
            self._clocks[writes] = np.zeros_like(self.writer)
        if writes in self._clocks:
            self._clocks[writes][places] = clock

    def note(self, addresses: np.ndarray, program: int, writes: bool, order: _Order) -> bool:
        """True if no other program is in the way of this one."""
        places = (addresses - np.uint64(self.first)) // np.uint64(self.width)
        reader = self.reader[places]
        free = order.before(self.writer[places], self._clocks_at(places, True), program)
        if writes:
            free = free and order.before(reader, self._clocks_at(places, False), program)
            self.writer[places] = program
        else:
            self.reader[places] = np.where((reader == 0) | (reader == program), program, -1)
        self._set_clock(places, writes, order.clock(program))
        return free

    def note_atomic(self, address: np.ndarray, program: int, order: _Order) -> bool:
        """True if no plain store is in the way."""
        place = (address - np.uint64(self.first)) // np.uint64(self.width)
        return order.before(self.writer[place], self._clocks_at(place, True), program)


@dataclass
class Launch:
    """What one launch moved, in bytes; every lane's unmasked access counts, whether or not another had the same."""

    kernel: str
    programs: int
    read: int = 0
    written: int = 0


@dataclass
class _Monitor:
    """The launch under way."""

    tensors: list[tuple[int, int]] = field(default_factory=list)  # [first byte, one past the last)
    regions: list[_Region] = field(default_factory=list)
    launch: Launch = field(default_factory=lambda: Launch("", 0))
    patched: set[int] = field(default_factory=set)  # modules, by the id of their globals
    counted: list[Launch] | None = None
    selected: Programs | None = None
    order: _Order = field(default_factory=_Order)
    seed: int | None = None  # of the order of programs
    grid: list[int] = field(default_factory=list)  # the programs in that order


_monitor = _Monitor()


@contextmanager
def traffic() -> Iterator[list[Launch]]:
    """Collects the launches made within this context, in order."""
    _monitor.counted, previous = [], _monitor.counted
    try:
        yield _monitor.counted
    finally:
        _monitor.counted = previous


@contextmanager
def only(selected: Programs) -> Iterator[None]:
    """Within this context only the programs (x, y, z) run that `selected` picks; the others leave their outputs."""
    _monitor.selected, previous = selected, _monitor.selected
    try:
        yield
    finally:
        _monitor.selected = previous


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Within this context the programs of a grid of one dimension run in an order of their own."""
    _monitor.seed, previous = seed, _monitor.seed
    try:
        yield
    finally:
        _monitor.seed = previous


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of x rounded to the nearest bf16, ties to even; NaN becomes the canonical quiet NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def _rounding_cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source != tl.bfloat16:
            return shipped.TensorHandle(fp32_to_bf16(src.data.astype(np.float32)), target)
        if source == tl.bfloat16 and target != tl.bfloat16:
            return shipped.TensorHandle(bf16_to_fp32(src.data).astype(shipped._get_np_dtype(target)), target)
        return original(self, src, dst_type)

    return cast_impl


def _refuse_bf16(original: Callable[..., Any]) -> Callable[..., Any]:
    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise TypeError("bf16 arithmetic: upcast with .to(tl.float32)")
        return original(self, lhs, rhs, op)

    return binary_op


def _bf16_products(original: Callable[..., Any]) -> Callable[..., Any]:
    def upcast(x: Any) -> Any:
        return shipped.TensorHandle(bf16_to_fp32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, upcast(a), upcast(b), *rest)

    return create_dot


def _refuse_bf16_reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_impl(self: Any, inputs: Any) -> Any:
        if inputs[0].handle.dtype.scalar == tl.bfloat16:
            raise TypeError("reduction in bf16: upcast with .to(tl.float32)")
        return original(self, inputs)

    return apply_impl


def _inside(access: str, addresses: np.ndarray, width: int) -> tuple[int, int]:
    """(first byte, one past the last) of what is accessed, in the tensors of the launch."""
    low, high = int(addresses.min()), int(addresses.max()) + width
    if not any(first <= low and high <= end for first, end in _monitor.tensors):
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, end in _monitor.tensors:
            inside |= (addresses >= first) & (addresses + np.uint64(width) <= end)
        if not inside.all():
            raise OutOfBounds(f"{access} of {int((~inside).sum())} elements outside the tensors of the launch")
    return low, high


def _watch(builder: Any, pointers: Any, mask: Any, writes: bool) -> None:
    """Check the bounds, count the bytes, and look for other programs."""
    access = "store" if writes else "load"
    width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    addresses, active = np.broadcast_arrays(pointers.data, mask.data)
    addresses = addresses[active.astype(bool)]
    if not addresses.size:
        return
    low, high = _inside(access, addresses, width)
    launch = _monitor.launch
    if writes:
        launch.written += addresses.size * width
    else:
        launch.read += addresses.size * width
    if launch.programs == 1 or _monitor.selected is not None:
        return
    program = _program(builder)
    if not _monitor.order.met_all(program, low, high, addresses):
        raise Race(f"{launch.kernel}: program {builder.grid_idx}: {access} of a counter that others have yet to reach")
    for region in _monitor.regions:
        here = addresses[(addresses >= region.first) & (addresses < region.end)]
        if here.size and not region.note(here, program, writes, _monitor.order):
            raise Race(f"{launch.kernel}: program {builder.grid_idx}: {access} of an element of another program")


def _program(builder: Any) -> int:
    """Its number, from 1."""
    (x, y, z), (columns, rows, _) = builder.grid_idx, builder.grid_dim
    return 1 + x + columns * (y + rows * z)


def _watched_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        _watch(self, ptrs, mask, writes=False)
        return original(self, ptrs, mask, *rest)

    return create_masked_load


def _watched_store(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _watch(self, ptrs, mask, writes=True)
        return original(self, ptrs, value, mask, *rest)

    return create_masked_store


def _refuse_atomics(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_atomic(self: Any, *args: Any) -> Any:
        raise TypeError("atomics: the order of programs would decide the result")

    return create_atomic


def _counting_atomics(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of integers, which add up to the same in any order: counters, by which programs wait for each other."""

    def create_atomic_rmw(self: Any, op: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        if op != ir.ATOMIC_OP.ADD or not value.dtype.scalar.is_int():
            raise TypeError("atomics: the order of programs would decide the result")
        if pointer.data.size != 1:
            raise TypeError("atomics: one counter at a time")
        address, program = pointer.data.astype(np.uint64).reshape(1), _program(self)
        _inside("atomic", address, 4)
        _monitor.launch.read += 4
        _monitor.launch.written += 4
        for region in _monitor.regions:
            if region.first <= int(address[0]) < region.end and not region.note_atomic(
                address, program, _monitor.order
            ):
                raise Race(f"{_monitor.launch.kernel}: program {self.grid_idx}: atomic on what another program stored")
        _monitor.order.meet(program, int(address[0]), sem == ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
        return original(self, op, pointer, value, mask, sem, scope)

    return create_atomic_rmw


def _permuted(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        size, *others = self.grid_dim
        if _monitor.seed is not None and others == [1, 1]:
            if len(_monitor.grid) != size:
                _monitor.grid = random.Random(_monitor.seed).sample(range(size), size)
            x = _monitor.grid[x]
        original(self, x, y, z)

    return set_grid_idx


def _span(x: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def _regions(tensors: list[torch.Tensor]) -> list[_Region]:
    """The tensors' memory, overlapping ones as one region."""
    merged: list[list[int]] = []
    for first, end, width in sorted((x.data_ptr(), x.data_ptr() + _span(x), x.element_size()) for x in tensors):
        if merged and first < merged[-1][1]:
            merged[-1][1:] = [max(merged[-1][1], end), min(merged[-1][2], width)]
        else:
            merged.append([first, end, width])
    return [_Region(*region) for region in merged]


def _watched_launch(original: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.numel()]
        programs = int(np.prod(self.grid)) if isinstance(self.grid, tuple) else 0
        _monitor.tensors = [(x.data_ptr(), x.data_ptr() + _span(x)) for x in tensors]
        _monitor.regions = _regions(tensors) if programs != 1 and _monitor.selected is None else []
        _monitor.launch, _monitor.patched = Launch(self.fn.__name__, programs), set()
        _monitor.order, _monitor.grid = _Order(), []
        if _monitor.counted is not None:
            _monitor.counted.append(_monitor.launch)
        if _monitor.selected is not None:
            self.fn = _selective(self.fn, _monitor.selected)
        with np.errstate(over="ignore"):  # unsigned words wrap by design
            return original(self, *args, **kwargs)

    return __call__


def _selective(kernel: Callable[..., Any], selected: Programs) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> None:
        if selected(shipped.interpreter_builder.grid_idx):
            kernel(*args, **kwargs)

    run.__name__, run.__signature__ = kernel.__name__, inspect.signature(kernel)  # type: ignore[attr-defined]
    run.__annotations__ = kernel.__annotations__
    return run


def _device_function(_: Callable[..., Any]) -> Callable[..., Any]:
    """As shipped, but triton.language is patched once a launch for each module, not in every call: a fifth of the
    time."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (module := id(self.fn.__globals__)) not in _monitor.patched:
            shipped._patch_lang(self.fn)
            _monitor.patched.add(module)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise shipped.InterpreterError(repr(error)) from error

    return __call__


def _remembered(original: Callable[..., Any]) -> Callable[..., Any]:
    """The shipped look-up makes a table of all types for every tensor."""
    known: dict[Any, np.dtype] = {}

    def np_dtype(type_: Any) -> np.dtype:
        scalar = type_.scalar
        if isinstance(scalar, tl.pointer_type):
            return original(type_)
        if scalar not in known:
            known[scalar] = original(scalar)
        return known[scalar]

    return np_dtype


_installed = False


def install() -> None:
    """Mend the interpreter of this process; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    _wrap(shipped.InterpreterBuilder, "cast_impl", _rounding_cast)
    _wrap(shipped.InterpreterBuilder, "binary_op", _refuse_bf16)
    _wrap(shipped.InterpreterBuilder, "create_dot", _bf16_products)
    _wrap(shipped.InterpreterBuilder, "create_masked_load", _watched_load)
    _wrap(shipped.InterpreterBuilder, "create_masked_store", _watched_store)
    _wrap(shipped.InterpreterBuilder, "create_atomic_rmw", _counting_atomics)
    _wrap(shipped.InterpreterBuilder, "set_grid_idx", _permuted)
    _wrap(shipped.InterpreterBuilder, "create_atomic_cas", _refuse_atomics)
    _wrap(shipped.ReduceOps, "apply_impl", _refuse_bf16_reduction)
    _wrap(shipped.GridExecutor, "__call__", _watched_launch)
    _wrap(shipped.InterpretedFunction, "__call__", _device_function)
    _wrap(shipped, "_get_np_dtype", _remembered)
