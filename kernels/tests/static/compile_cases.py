"""Worker of the gates: compiles kernel cases for GPUs that are not there and says what came out, a JSON line each.

Reads [[module, case, target], ...] from standard input. Runs without TRITON_INTERPRET; results are kept in a cache
beside the repository's other caches, keyed by all that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import triton
from cases import KernelCase
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from static import binary
from static.targets import TARGETS, Target, occupancy

HERE = Path(__file__).parent
CACHE = HERE.parents[2] / ".cache" / "aot"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@cache
def _cases(module: str) -> dict[str, KernelCase]:
    return {case.name: case for case in import_module(module).cases()}


@cache
def _version() -> str:
    """Of triton and of what reads its output."""
    readers = b"".join((HERE / name).read_bytes() for name in ("binary.py", "compile_cases.py", "targets.py"))
    return triton.__version__ + hashlib.sha256(readers).hexdigest()


def _place(case: KernelCase, target: Target) -> Path:
    """The cache file of a result."""
    shape = (
        case.signature,
        case.constexprs,
        case.aligned,
        case.num_warps,
        case.num_stages,
        case.max_registers,
        target,
        _version(),
    )
    return CACHE / (hashlib.sha256(f"{case.kernel.cache_key}{shape}".encode()).hexdigest() + ".json")


def compile_case(case: KernelCase, target: Target) -> Any:
    """The compiled kernel, with its aligned arguments marked as multiples of 16.

    Raises ValueError if an aligned argument is one that a launch does not specialise on.
    """
    names = case.kernel.arg_names
    for name in case.aligned:
        parameter = case.kernel.params[names.index(name)]
        if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
            raise ValueError(f"aligned: {name} is never specialised")
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=case.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.max_registers and target.backend == "cuda":
        options["maxnreg"] = case.max_registers
    return triton.compile(source, GPUTarget(target.backend, target.arch, target.warp_size), options)


def describe(case: KernelCase, target: Target) -> tuple[dict[str, Any], bytes]:
    """Compile one case for one target and read the binary; also NVIDIA's cubin, whose instructions are yet to count."""
    began = time.monotonic()
    kernel = compile_case(case, target)
    found: dict[str, Any]
    cubin = b""
    if target.backend == "cuda":
        cubin = kernel.asm["cubin"]
        found = binary.nvidia(cubin, TOOLS)
        found["widths"] = binary.access_widths(kernel.asm["ptx"], case.signature)
    else:
        found = binary.amd(kernel.asm["amdgcn"])
    shared = kernel.metadata.shared
    found |= {
        "shared": shared,
        "occupancy": occupancy(target, found["registers"], shared, case.num_warps),
        "seconds": round(time.monotonic() - began, 3),
    }
    return found, cubin


def _keep(place: Path, found: dict[str, Any]) -> None:
    part = place.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(found))
    part.replace(place)


def main() -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE.parent / ".gitignore").write_text("*\n")
    uncounted: dict[str, list[tuple[list[str], Path, dict[str, Any], bytes]]] = {}
    for job in json.load(sys.stdin):
        module, name, target_name = job
        case, target = _cases(module)[name], TARGETS[target_name]
        place = _place(case, target)
        if place.exists():
            found, cubin = json.loads(place.read_text()), b""
        else:
            try:
                found, cubin = describe(case, target)
            except Exception as error:  # a case that does not compile is a result: the gate that it breaks
                found, cubin = {"error": f"{type(error).__name__}: {error}".replace("\n", " ")[:500]}, b""
            else:
                if cubin:
                    uncounted.setdefault(target_name, []).append((job, place, found, cubin))
                else:
                    _keep(place, found)
        if not cubin:
            print(json.dumps([*job, found]), flush=True)
    for target_name, kernels in uncounted.items():
        counts = binary.instructions([cubin for *_, cubin in kernels], TOOLS, target_name.replace("_", "").upper())
        for (job, place, found, _), count in zip(kernels, counts, strict=True):
            _keep(place, found | count)
            print(json.dumps([*job, found | count]), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        main()
