"""Reads NVIDIA machine code: a cubin through the disassembler that Triton's wheel brings, into `instructions.Code`."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from .instructions import Code, Instruction

# What the figures count an opcode as, by what stands before its first dot. IMAD is split further in `_kind`.
KINDS = {
    "load": "LDG LD",
    "store": "STG ST RED REDG ATOM ATOMG",
    "float": "FADD FMUL FFMA FSETP FSEL FSET FMNMX FMNMX3 FCHK FADD2 FMUL2 FFMA2 FHADD HADD2 HMUL2 HFMA2 HSETP2 HSET2 "
    "HMNMX2 DADD DMUL DFMA DSETP DMNMX",
    "special": "MUFU",
    "convert": "F2F F2FP F2I F2IP I2F I2FP I2I I2IP FRND",
    "integer": "IMAD IADD IADD3 IABS LOP3 ISETP SHF SHL SHR LEA VIADD VIMNMX VIMNMX3 IMNMX SGXT BMSK POPC FLO BREV IDP",
    "move": "MOV SEL PRMT P2R R2P CS2R S2R PLOP3",
    "shared": "LDS STS LDSM STSM ATOMS LDGSTS",
    "shuffle": "SHFL VOTE REDUX MATCH",
    "barrier": "BAR DEPBAR SYNCS WARPSYNC MEMBAR ERRBAR",
    "local": "LDL STL",
    "call": "CALL",
    "control": "BRA JMP EXIT RET BSSY BSYNC BREAK KILL NANOSLEEP ACQBULK",
    "uniform": "LDC R2UR S2UR",  # and everything that starts with U
    "padding": "NOP",
}
_KIND = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}

# Execution units; what is not listed is bound by issue alone.
PIPES = {
    "alu": "LOP3 IADD IADD3 ISETP SHF SHL SHR LEA VIADD VIMNMX VIMNMX3 IMNMX IABS SGXT BMSK MOV SEL PRMT PLOP3 FSETP "
    "FSEL FMNMX FMNMX3 HSETP2 HMNMX2 F2FP I2FP",
    "fma": "FADD FMUL FFMA FHADD HADD2 HMUL2 HFMA2",
    "packed": "FADD2 FMUL2 FFMA2",
    "imad": "IMAD",
    "special": "MUFU F2F F2I I2F FRND POPC FLO BREV",
    "load-store": "LDG STG LDS STS LDSM STSM LDL STL SHFL",
}
_PIPE = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}

ENDS = ("EXIT", "RET", "KILL")

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;")
_REGISTER = re.compile(r"\bR(\d+)\b")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_BYTES = {".256": 32, ".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}


def tool() -> Path:
    """The disassembler of the Triton that is installed."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def read(cubin: bytes, name: str, shared: int) -> Code:
    """The kernel ``name`` of a cubin. ``shared``: bytes of shared memory, which Triton asks for at the launch."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool()), "-sass", "-res-usage", file.name]
        listing = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ).stdout
    return parse(listing, name, shared)


def parse(listing: str, name: str, shared: int = 0) -> Code:
    usage = _USAGE.search(listing)
    if usage is None:
        raise ValueError(f"no resource usage of {name} in the disassembler's listing: {listing[:200]!r}")
    registers, stack, _, local = map(int, usage.groups())
    lines = [m.groups() for m in map(_LINE.match, listing.splitlines()) if m]
    index = {int(address, 16): n for n, (address, *_) in enumerate(lines)}
    instructions = []
    for n, (_, predicate, opcode, operands) in enumerate(lines):
        target = _target(opcode, operands, index)
        if target == n:  # `BRA .` behind the code: what follows is padding
            break
        instructions.append(_instruction(opcode, operands, predicate or "", target))
    return Code(name, tuple(instructions), registers, stack + local, shared)


def _instruction(opcode: str, operands: str, predicate: str, target: int | None) -> Instruction:
    base = opcode.split(".")[0]
    # A branch may carry its condition among the operands: BRA.U !UP0, 0x120.
    conditional = predicate not in ("", "PT", "UPT") or (base == "BRA" and "P" in operands.split("0x")[0])
    kind = _kind(base, opcode)
    written, read = _registers(base, opcode, operands)
    return Instruction(
        opcode,
        operands,
        kind,
        _PIPE.get(base, ""),
        _width(opcode) if kind in ("load", "store") else 0,
        target,
        conditional or base not in ("BRA", "JMP", *ENDS),
        base in ENDS,
        written,
        read,
    )


def _kind(base: str, opcode: str) -> str:
    if opcode.startswith("IMAD.WIDE"):
        return "wide multiply"
    if opcode.startswith("IMAD.MOV"):
        return "move"
    return _KIND.get(base) or ("uniform" if base.startswith("U") or base == "LDCU" else "other")


def _width(opcode: str) -> int:
    return next((size for suffix, size in _BYTES.items() if suffix in opcode), 4)


def _target(opcode: str, operands: str, index: dict[int, int]) -> int | None:
    if opcode.split(".")[0] not in ("BRA", "JMP"):
        return None
    address = re.search(r"0x([0-9a-f]+)", operands)
    return index.get(int(address.group(1), 16)) if address else None


def _registers(base: str, opcode: str, operands: str) -> tuple[frozenset[str], frozenset[str]]:
    """(written, read). The first operand is written, unless it is an address or a predicate."""
    first, _, rest = operands.partition(",")
    writes = _REGISTER.fullmatch(first.strip().removesuffix(".reuse"))
    if writes is None:
        return frozenset(), frozenset(_REGISTER.findall(operands))
    start = int(writes.group(1))
    count = max(1, _width(opcode) // 4) if base in ("LDG", "LDS", "LDL") else 2 if ".WIDE" in opcode else 1
    return frozenset(str(r) for r in range(start, start + count)), frozenset(_REGISTER.findall(rest))
