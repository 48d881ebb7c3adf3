"""LLVM IR of an AMD kernel, as Triton compiled it, into a shared library of this CPU (written against triton 3.7.1).

The control flow, the arithmetic and the traffic through local memory stay as they were compiled for the GPU. Address
spaces and GPU attributes go, and each intrinsic becomes a function of lanes.c.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
from functools import cache
from pathlib import Path

from triton._C.libtriton import llvm

HERE = Path(__file__).parent
CACHE = HERE.parents[2] / ".cache" / "lanes"
_SLOTS = {"ptr": "ptr", "i64": "i64", "i32": "i32", "i16": "i16", "i8": "i8", "i1": "i1", "float": "float"}


def _compile(key: bytes, suffix: str, build: list[str]) -> Path:
    """The library that gcc makes, kept by the hash of what it is made from."""
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE.parent / ".gitignore").write_text("*\n")
    out = CACHE / (hashlib.sha256(key + " ".join(build).encode()).hexdigest()[:32] + ".so")
    if not out.exists():
        mine = f"{out.stem}.{os.getpid()}"  # another process may be making the same library
        part, source = out.with_name(f"{mine}.part"), out.with_name(f"{mine}{suffix}")
        source.write_bytes(key)
        command = ["gcc", *build, "-fPIC", "-shared", str(source), "-lm", "-o", str(part)]
        done = subprocess.run(command, capture_output=True, text=True)
        source.unlink()
        if done.returncode:
            raise RuntimeError(f"gcc: {done.stderr.strip()[:500]}")
        part.replace(out)
    return out


@cache
def runtime() -> ctypes.CDLL:
    """lanes.c, whose functions the kernels' libraries find by name."""
    return ctypes.CDLL(str(_compile((HERE / "lanes.c").read_bytes(), ".c", ["-O2"])), mode=ctypes.RTLD_GLOBAL)


def _matrix_product(declaration: re.Match[str]) -> str:
    """A definition of one llvm.amdgcn.mfma that hands its operands to lanes.c in memory, as fp32."""
    name, kind, size, depth = declaration["name"], declaration["operand"], declaration["size"], declaration["depth"]
    each = int(depth) * int(size) // 64
    lines = [f"define internal {declaration['result']} @{name}({kind} %a, {kind} %b, {declaration['result']} %c,"]
    lines += ["  i32 %x, i32 %y, i32 %z) noinline {", f"  %d = alloca {declaration['result']}, align 64"]
    lines.append(f"  store {declaration['result']} %c, ptr %d")
    for operand in "ab":
        lines.append(f"  %p{operand} = alloca [{each} x float], align 64")
        for e in range(each):
            at = f"{operand}{e}"
            if kind == "float":
                lines.append(f"  %f{at} = fadd float %{operand}, -0.0")
            else:
                lines.append(f"  %v{at} = extractelement {kind} %{operand}, i32 {e}")
                lines += _to_float(at, kind)
            lines.append(f"  %g{at} = getelementptr float, ptr %p{operand}, i32 {e}")
            lines.append(f"  store float %f{at}, ptr %g{at}")
    lines.append(f"  call void @gcn_mfma(i32 {size}, i32 {depth}, ptr %pa, ptr %pb, ptr %d)")
    lines += [f"  %r = load {declaration['result']}, ptr %d", f"  ret {declaration['result']} %r", "}"]
    return "\n".join(lines)


def _to_float(at: str, kind: str) -> list[str]:
    if "half" in kind:
        return [f"  %f{at} = fpext half %v{at} to float"]
    bits = f"  %b{at} = bitcast {'bfloat' if 'bfloat' in kind else 'i16'} %v{at} to i16"
    return [bits, f"  %w{at} = zext i16 %b{at} to i32", f"  %s{at} = shl i32 %w{at}, 16", *_bits_to_float(at)]


def _bits_to_float(at: str) -> list[str]:
    return [f"  %f{at} = bitcast i32 %s{at} to float"]


_MFMA = re.compile(
    r"^declare (?P<result><\d+ x float>) @(?P<name>gcn_mfma_f32_(?P<size>\d+)x\d+x(?P<depth>\d+)\w*)"
    r"\((?P<operand>float|<4 x \w+>)[^)]*\).*$",
    re.M,
)


def portable(ir: str) -> str:
    """The IR without what only a GPU knows."""
    lines = (line for line in ir.splitlines() if not re.match(r"!|attributes |target |\s*#dbg", line))
    text = "\n".join(lines)
    text = re.sub(r",? ![\w.]+ !(\d+|\{\})", "", text)
    text = re.sub(r" addrspace\(\d+\)", "", text)
    text = re.sub(r"\bamdgpu_kernel |\binreg |\bimmarg\b| inreg\b| syncscope\(\"[^\"]*\"\)", "", text)
    text = re.sub(r"(?m) #\d+(?=( \{)?\s*$|,)", "", text)
    text = re.sub(r"@llvm\.amdgcn\.([\w.]+)", lambda m: "@gcn_" + m[1].replace(".", "_"), text)
    text = re.sub(r"(?m)^  (tail )?call void @gcn_(s_waitcnt|sched|s_setprio|s_sched)\w*\(.*$", "", text)
    text = text.replace("tail call", "notail call")
    text, products = _MFMA.subn(_matrix_product, text)
    return text + ("\ndeclare void @gcn_mfma(i32, i32, ptr, ptr, ptr)\n" if products else "\n")


def with_entry(text: str, name: str) -> str:
    """Adds `entry(ptr slots)`, which takes the kernel's arguments from slots of 8 bytes."""
    found = re.search(rf"define [^@\n]*@{name}\(((?:[^()\n]|\([^()]*\))*)\)", text)
    if found is None:
        raise RuntimeError(f"{name}: no definition in the IR")
    kinds = [argument.split()[0] for argument in found[1].split(",")]
    unknown = set(kinds) - set(_SLOTS)
    if unknown:
        raise RuntimeError(f"{name}: arguments of type {sorted(unknown)}")
    body = []
    for i, kind in enumerate(kinds):
        body.append(f"  %p{i} = getelementptr i64, ptr %slots, i64 {i}")
        body.append(f"  %a{i} = load {kind}, ptr %p{i}")
    passed = ", ".join(f"{kind} %a{i}" for i, kind in enumerate(kinds))
    return (
        f"{text}\ndefine void @entry(ptr %slots) {{\n"
        + "\n".join(body)
        + f"\n  call void @{name}({passed})\n  ret void\n}}\n"
    )


def library(ir: str, name: str) -> ctypes.CDLL:
    """The kernel as a library with `entry(slots)`. Raises RuntimeError or OSError for IR that lanes.c does not know."""
    text = with_entry(portable(ir), name)
    runtime()
    llvm.init_targets()
    code = llvm.translate_to_asm(text, "x86_64-unknown-linux-gnu", "x86-64-v3", "", [], True, True)
    return ctypes.CDLL(str(_compile(code, ".o", [])))
