"""What the compiled code of a kernel says: registers, spills, and the width of each access to global memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;\n]*);", re.M)
_REGISTER = re.compile(r"%rd\d+")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.M)


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


def nvidia(cubin: bytes, tools: Path, disassemble: bool) -> dict[str, int]:
    """Registers a thread and bytes of local memory, which spills are a part of; `tools` is the folder of cuobjdump.

    Disassembled, also the instructions that touch local memory and the 16-byte ones that touch global memory.
    Raises RuntimeError if there is nothing to read.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            if flag == "-res-usage" or disassemble
            else ""
            for flag in ("-res-usage", "-sass")
        )
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    operations = _SASS.findall(sass)
    if numbers is None or (disassemble and "EXIT" not in operations):
        raise RuntimeError(f"cuobjdump: nothing to read in {usage[:200]!r}")
    registers, stack, local = map(int, numbers.groups())
    found = {"registers": registers, "local": stack + local}
    if disassemble:
        found["spills"] = sum(op.startswith(("LDL", "STL")) for op in operations)
        found["wide"] = sum(bool(re.match(r"(LDG|STG|LDGSTS)\..*\b(128|256)\b", op)) for op in operations)
    return found


def amd(assembly: str) -> dict[str, int]:
    """The same of a gfx kernel; spills are vector and scalar registers spilled, local memory is scratch."""

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"amdgcn: no .{key} in the assembly")
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "local": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
    }
