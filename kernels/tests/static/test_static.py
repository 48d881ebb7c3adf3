"""The gates hold for a spread of kernels and catch those that break them; the README's table is current.

All cases for all targets: `python kernels/tests/static/gates.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import readme

from static import binary, controls, gates
from static.targets import TARGETS, occupancy


def spread() -> list[gates.Job]:
    """One configuration of every kernel, in turn for one NVIDIA and for one AMD target."""
    first = {}
    for job in gates.jobs(targets=["sm_90"]):
        first.setdefault(gates.kernel_name(job.case), job)
    return [job._replace(target=("sm_90", "gfx942")[i % 2]) for i, job in enumerate(first.values())]


@pytest.fixture(scope="module")
def compiled() -> dict[str, gates.Result]:
    """The controls and the spread, compiled in one go."""
    jobs = [gates.Job("static.controls", case, "sm_90") for case in controls.cases()]
    return {result.name: result for result in gates.compile_jobs([*jobs, *spread()])}


def test_gates_hold_for_a_spread_of_every_kernel(compiled: dict[str, gates.Result]) -> None:
    names = {f"{job.case.name} for {job.target}" for job in spread()}
    assert len(names) >= len(gates.all_cases())
    assert [line for name in names for line in gates.broken_gates(compiled[name])] == []


@pytest.mark.parametrize(
    ("case", "complaints"),
    [
        ("copies", []),
        ("copies by 2 bytes", [r"x_ptr is accessed by \[2\] bytes", "no access of 16 bytes"]),
        ("spills", [r"\d+ spills", r"\d+ bytes of local memory", "occupancy 12% with 255 registers"]),
        ("crowds", ["occupancy 19% with"]),
        ("overflows", ["262144 bytes of shared memory, a block may have 232448", "occupancy 0%"]),
        ("aligned in vain", ["does not compile: ValueError: aligned: n_elements"]),
    ],
)
def test_gates_catch(compiled: dict[str, gates.Result], case: str, complaints: list[str]) -> None:
    broken = gates.broken_gates(compiled[f"{case} for sm_90"])
    assert len(broken) == len(complaints)
    for line, complaint in zip(broken, complaints, strict=True):
        assert re.match(rf"{case} for sm_90: {complaint}", line)


def test_a_block_of_32_waves_of_64_lanes_is_too_large() -> None:
    job = next(job for job in gates.jobs("geglu", ["gfx942"]))
    found = {"local": 0, "shared": 0, "registers": 32, "occupancy": 1.0}
    assert gates.broken_gates(gates.Result(job, found)) == []
    wide = job._replace(case=replace(job.case, num_warps=32))
    (complaint,) = gates.broken_gates(gates.Result(wide, found))
    assert complaint.endswith("2048 threads, a block may have 1024")


def test_readme_table_is_current() -> None:
    assert f"sources {gates.source_hash()} " in readme.written("aot"), "python kernels/tests/static/gates.py --write"


def test_readme_table_has_a_row_for_every_kernel() -> None:
    kernels = {gates.kernel_name(job.case) for job in gates.jobs(targets=["sm_90"])}
    assert set(re.findall(r"^\| `(\w+)` \|", readme.written("aot"), re.M)) == kernels


def test_source_hash_sees_code_and_not_comments(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "PACKAGE", tmp_path)
    hashes = []
    for text in (
        "_BLOCK = 256\n@jit\ndef f(x):\n    return x + 1\n",
        "# moved\n_BLOCK = 256\n@jit\ndef f(x):\n    '''What it does.'''\n    return x + 1  # why\n",
        "_BLOCK = 256\n@jit\ndef f(x):\n    return x + 2\n",
        "_BLOCK = 512\n@jit\ndef f(x):\n    return x + 1\n",
    ):
        (tmp_path / "op.py").write_text(text)
        hashes.append(gates.source_hash())
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, 1.0),  # 2048 threads of 32 registers are the whole file
        ("sm_90", 33, 0, 4, 0.75),  # 40 are allocated: 48 warps
        ("sm_80", 255, 0, 4, 0.125),
        ("sm_90", 32, 100 << 10, 4, 0.125),  # two blocks by shared memory
        ("sm_80", 32, 100 << 10, 4, 0.0625),
        ("gfx942", 128, 0, 4, 0.5),  # four waves on each of four units that hold eight
        ("gfx942", 64, 32 << 10, 4, 0.25),
    ],
)
def test_occupancy_worked_by_hand(target: str, registers: int, shared: int, warps: int, expected: float) -> None:
    assert occupancy(TARGETS[target], registers, shared, warps) == expected


def test_access_widths_follow_addresses_through_loops() -> None:
    ptx = """
        ld.param.b64 	%rd1, [k_param_0];
        ld.param.b64 	%rd2, [k_param_2];
        mul.wide.s32 	%rd3, %r1, 2;
        add.s64 	%rd4, %rd1, %rd3;
        @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
        add.s64 	%rd5, %rd2, %rd3;
        mov.b64 	%rd6, %rd5;
        add.s64 	%rd6, %rd6, 64;
        st.global.b16 [ %rd6 + 2 ], { %rs1 };
        cp.async.ca.shared.global [ %r9 + 0 ], [ %rd4 + 0 ], 0x8, %r5;
    """
    assert binary.access_widths(ptx, {"x_ptr": "*bf16", "n": "i32", "out_ptr": "*bf16", "y_ptr": "*fp32"}) == {
        "x_ptr": [8, 16],
        "out_ptr": [2],
        "y_ptr": [],
    }
