"""What the compiled code of a kernel says: registers, spills, and the width of each access to global memory."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;\n]*);", re.M)
_REGISTER = re.compile(r"%rd\d+")
_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.M)


def _width(operation: str, operands: str) -> int:
    """Bytes that a lane moves."""
    if operation.startswith("cp.async"):
        return int(operands.split("],")[-1].split(",")[0], 0)
    vector = re.search(r"\.v(\d)", operation)
    bits = int(re.search(r"\.[a-z](\d+)$", operation)[1])  # type: ignore[index]
    return bits // 8 * (int(vector[1]) if vector else 1)


def _roots(addresses: Iterable[str], sources: dict[str, set[str]], parameters: dict[str, int]) -> set[int]:
    """Numbers of the kernel's parameters that the address registers are computed from."""
    seen, waiting = set(), list(addresses)
    while waiting:
        register = waiting.pop()
        if register not in seen:
            seen.add(register)
            waiting.extend(sources.get(register, ()))
    return {parameters[register] for register in seen if register in parameters}


def access_widths(ptx: str, arguments: dict[str, str]) -> dict[str, list[int]]:
    """Pointer argument -> the widths in bytes, each once, of the loads and stores through it.

    `arguments` is the kernel's signature in order. An address is followed back through 64-bit registers to the
    parameters it comes from, over every assignment, so loops count too.
    """
    names = list(arguments)
    parameters: dict[str, int] = {}
    sources: dict[str, set[str]] = {}
    accesses: list[tuple[list[str], int]] = []
    for operation, operands in _INSTRUCTION.findall(ptx):
        if operation.startswith("ld.param"):
            number = re.search(r"_param_(\d+)", operands)
            if number and int(number[1]) < len(names):
                parameters[operands.split(",")[0].strip()] = int(number[1])
        elif re.match(r"(ld|st|cp\.async\.\w+\.shared)\.global|(red|atom)\.global", operation):
            address = re.findall(r"\[([^\]]*)\]", operands)[-1]
            accesses.append((_REGISTER.findall(address), _width(operation, operands)))
        else:
            first, _, rest = operands.partition(",")
            for register in _REGISTER.findall(first):
                sources.setdefault(register, set()).update(_REGISTER.findall(rest))
    widths: dict[str, set[int]] = {name: set() for name, kind in arguments.items() if kind.startswith("*")}
    for registers, width in accesses:
        for root in _roots(registers, sources, parameters):
            if names[root] in widths:
                widths[names[root]].add(width)
    return {name: sorted(found) for name, found in widths.items()}


def nvidia(cubin: bytes, tools: Path) -> dict[str, int]:
    """Registers a thread and bytes of local memory, which spills are a part of; `tools` is the folder of cuobjdump.

    Raises RuntimeError if there is nothing to read.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if numbers is None:
        raise RuntimeError(f"cuobjdump: nothing to read in {usage[:200]!r}")
    registers, stack, local = map(int, numbers.groups())
    return {"registers": registers, "local": stack + local}


def machine_code(cubin: bytes) -> bytes:
    """The instructions in a cubin, an ELF file of 64 bits: its .text sections."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    name_of = headers[names][4]
    return b"".join(
        cubin[start : start + length]
        for name, _, _, _, start, length in headers
        if cubin[name_of + name :].startswith(b".text.")
    )


def instructions(cubins: list[bytes], tools: Path, architecture: str) -> list[dict[str, int]]:
    """Of each cubin, how many instructions touch local memory, how many touch global memory by 16 bytes or more, and
    how many multiply matrices.

    All code is disassembled in one go, since the disassembler takes longer to start than to work.
    Raises RuntimeError if a kernel has no end.
    """
    code = [machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(code))
        file.flush()
        sass = _output(tools / "nvdisasm", "--no-dataflow", "--binary", architecture, file.name) if code else ""
    found, lines, end = [], _SASS.findall(sass), 0
    for part in code:
        start, end = end, end + len(part)
        operations = [name for address, name in lines if start <= int(address, 16) < end]
        if "EXIT" not in operations:
            raise RuntimeError(f"nvdisasm: nothing to read in {sass[:200]!r}")
        wide = sum(bool(re.match(r"(LDG|STG|LDGSTS)\..*\b(128|256)\b", name)) for name in operations)
        matrix = sum(bool(re.match(r"[HQUIDO]\w*MMA\b", name)) for name in operations)
        spills = sum(name.startswith(("LDL", "STL")) for name in operations)
        found.append({"spills": spills, "wide": wide, "matrix": matrix})
    return found


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def amd(assembly: str) -> dict[str, int]:
    """The same of a gfx kernel: spills are vector registers in memory, local memory is scratch, and scalars are scalar
    registers spilled, to lanes of vector registers unless there is local memory."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"amdgcn: no .{key} in the assembly")
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "local": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "scalars": number("sgpr_spill_count"),
        "matrix": len(re.findall(r"^\s*v_mfma_", assembly, re.M)),
    }
