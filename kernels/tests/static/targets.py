"""The architectures that every kernel is compiled for, their limits, and the theoretical occupancy.

Limits: CUDA C++ Programming Guide, "Compute Capabilities"; AMD CDNA 3 instruction set architecture, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One multiprocessor (NVIDIA) or compute unit (AMD); memory in bytes."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    max_warps: int
    max_blocks: int
    shared: int  # for all blocks together
    max_shared_block: int
    reserved_shared: int  # that a block takes on top of its own
    registers: int  # 32-bit, of each of the four partitions, per lane
    register_unit: int  # per lane


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 64, 32, 164 << 10, 163 << 10, 1 << 10, 512, 8),
        Target("sm_90", "cuda", 90, 32, 64, 32, 228 << 10, 227 << 10, 1 << 10, 512, 8),
        Target("sm_100", "cuda", 100, 32, 64, 32, 228 << 10, 227 << 10, 1 << 10, 512, 8),
        Target("gfx942", "hip", "gfx942", 64, 32, 32, 64 << 10, 64 << 10, 0, 512, 8),
    )
}


def occupancy(target: Target, registers: int, shared: int, num_warps: int) -> float:
    """Share of the threads of a multiprocessor that can be resident; `registers` a thread, `shared` bytes a block."""
    unit = target.register_unit
    warps = 4 * (target.registers // max(unit, -(-registers // unit) * unit))
    per_block = -(-(shared + target.reserved_shared) // 128) * 128
    by_shared = target.shared // per_block if per_block else target.max_blocks
    blocks = min(min(warps, target.max_warps) // num_warps, target.max_blocks, by_shared)
    return blocks * num_warps / target.max_warps
