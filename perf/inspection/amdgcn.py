"""Reads AMD machine code: the assembly text that Triton keeps beside the binary, into `instructions.Code`."""

from __future__ import annotations

import re

from .instructions import Code, Instruction

# What the figures count an instruction as: the first prefix that fits.
KINDS = {
    "load": ("global_load", "buffer_load", "flat_load"),
    "store": ("global_store", "buffer_store", "flat_store", "global_atomic", "buffer_atomic"),
    "wide multiply": ("v_mad_u64_u32", "v_mad_i64_i32", "v_mul_hi_u32", "v_mul_hi_i32"),
    "local": ("scratch_",),
    "shuffle": ("ds_bpermute", "ds_permute", "ds_swizzle", "v_readlane", "v_readfirstlane", "v_writelane"),
    "shared": ("ds_",),
    "barrier": ("s_barrier",),
    "call": ("s_swappc", "s_call"),
    "control": ("s_cbranch", "s_branch", "s_endpgm", "s_setpc"),
    "padding": ("s_nop", "s_code_end", "s_waitcnt", "s_delay_alu"),
    "uniform": ("s_",),
    "convert": ("v_cvt",),
    "special": ("v_rcp", "v_rsq", "v_sqrt", "v_exp", "v_log"),
    "float": (
        *(
            f"v_{op}_{kind}"
            for op in ["add", "sub", "mul", "fma", "mac", "fmac", "max", "min", "div", "med3"]
            for kind in ("f32", "f16", "f64")
        ),
        "v_pk_",
        "v_cmp_",
        "v_div_",
    ),
    "move": ("v_mov", "v_cndmask", "v_perm", "v_alignbit", "v_bfi", "v_accvgpr"),
    "integer": ("v_",),
}

_LABEL = re.compile(r"^([.\w$]+):")
_LINE = re.compile(r"^\s+([a-z][\w]+)\s*(.*?)\s*(?:;.*)?$")
_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1, "ubyte": 1}


def parse(text: str, name: str, shared: int = 0) -> Code:
    """The kernel ``name`` of an assembly listing, with what its metadata says of registers and spills."""
    lines: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label, instruction = _LABEL.match(line), _LINE.match(line)
        if label:
            labels[label.group(1)] = len(lines)
        elif instruction and not line.lstrip().startswith((".", ";", "#")):
            lines.append((instruction.group(1), instruction.group(2)))
        if line.startswith(".Lfunc_end"):
            break
    instructions = tuple(_instruction(opcode, operands, labels) for opcode, operands in lines)
    # Scalar registers that are spilled go to lanes of a vector register: instructions, not memory.
    spills = _metadata(text, "private_segment_fixed_size")
    return Code(name, instructions, _metadata(text, "vgpr_count"), spills, shared)


def _instruction(opcode: str, operands: str, labels: dict[str, int]) -> Instruction:
    kind = next((kind for kind, prefixes in KINDS.items() if opcode.startswith(prefixes)), "other")
    branch = opcode.startswith(("s_cbranch", "s_branch"))
    return Instruction(
        opcode,
        operands,
        kind,
        "",
        _width(opcode) if kind in ("load", "store") else 0,
        labels.get(operands.split()[-1]) if branch else None,
        not opcode.startswith(("s_branch", "s_endpgm", "s_setpc")),
        opcode.startswith("s_endpgm"),
    )


def _width(opcode: str) -> int:
    return next((size for word in reversed(opcode.split("_")) if (size := _BYTES.get(word))), 4)


def _metadata(text: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s+(\d+)", text)
    return int(found.group(1)) if found else 0
