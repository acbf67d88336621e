"""What the steps work on: on a GPU, and small, on a CUDA device made of CPU memory where times mean nothing.

What is timed is told in arguments of `fused-rect profile`, which repeats it by hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..profiling import cases, cli
from ..profiling.measure import Case
from ..profiling.peers import COMPILED, COMPILERS, COPY, EAGER, FUSED, FUSED_COMPILED
from . import agreement, networks

Lines = tuple[str, ...]
BF16, FLOAT32 = "--dtype bfloat16", "--dtype float32"
LAST, BOTH = "--layout channels_last", "--layout contiguous channels_last"
STEPS = "--mode forward training"  # what remains of the second without the first is backward
ALL = "--mode training inference"
PASS = f"--part epilogue --compile {STEPS}"
NETWORKS = f"--compile {ALL} --model {networks.__name__}"


@dataclass(frozen=True)
class Size:
    """elements: of the largest tensor. kernels, layers, models, host: lines of arguments. tests: of the suite.

    graphs: whether CUDA graphs can be captured. rounds: samples of each call, of ``least`` seconds. patience: how many
    times its budget a step may take.
    """

    agreement: tuple[agreement.Case, ...]
    kernels: Lines
    layers: Lines
    models: Lines
    host: Lines
    tests: tuple[str, ...]
    elements: int
    graphs: bool = True
    rounds: int = 5
    least: float = 0.01
    patience: float = 1


FULL = Size(
    agreement=(
        *agreement.cases(agreement.SHAPES, agreement.DTYPES[:2]),
        *agreement.cases(agreement.SHAPES[1::3], agreement.DTYPES[2:]),
    ),
    kernels=(
        f"--workload gpu {BF16} {BOTH} {PASS}",
        f"--workload gpu {FLOAT32} {BOTH} {PASS}",
        f"--shape 8,64,56,56 --kernel 1 {BF16} {PASS}",
    ),
    layers=(
        f"--shape 32,64,64,64 --part layer --compile {ALL} {BF16} {LAST}",
        f"--shape 32,64,64,64 --part layer --compile --mode training {FLOAT32}",
    ),
    models=(
        f"{NETWORKS}:rrdbnet --shape 8,3,64,64 {BF16} {LAST}",
        f"{NETWORKS}:compact --shape 16,3,128,128 {BF16} {LAST}",
        f"{NETWORKS}:hifigan --shape 16,80,64 {BF16}",
        f"{NETWORKS}:resnet --shape 64,3,224,224 {BF16} {LAST}",
    ),
    host=(
        f"--shape 1,8,8,8 --kernel 1 --rectifier leaky_relu --compile {ALL} {BF16}",
        f"--shape 8,64,8,8 --kernel 1 --rectifier leaky_relu rrelu --compile {ALL} {BF16}",
    ),
    tests=("tests",),
    elements=2**31,
)
SMALL = Size(  # as much as fuse() takes: it leaves smaller outputs to torch
    agreement=tuple(agreement.cases(agreement.SHAPES[:1], agreement.DTYPES[:1])[::5]),
    kernels=(f"--shape 2,6,9,7 --kernel 1 --rectifier rrelu {BF16} {PASS}",),
    layers=(f"--shape 1,8,48,48 --rectifier prelu --part layer --compile --mode training {BF16} {LAST}",),
    models=(f"--compile --mode training --model {networks.__name__}:small_compact --shape 1,3,48,48 {BF16}",),
    host=(f"--shape 1,4,4,4 --kernel 1 --rectifier relu --part epilogue --mode inference {BF16}",),
    tests=("tests/kernels/test_philox.py",),
    elements=1 << 12,
    graphs=False,
    rounds=1,
    least=1e-4,
    patience=10,
)
SIZES = {"full": FULL, "small": SMALL}


def kernels(size: Size) -> list[Case]:
    """Bias and rectifier alone, the device's time, the machine's ceilings first where there is a device for them."""
    peers = FUSED, COMPILED, EAGER, COPY
    asked = list(_asked(size.kernels, "graph" if size.graphs else "call", peers))
    return [*(_machine(size) if size.graphs else []), *asked]


def layers(size: Size) -> list[Case]:
    return list(_asked(size.layers, "call", (FUSED, EAGER, COMPILED, FUSED_COMPILED, COPY)))


def models(size: Size) -> list[Case]:
    return list(_asked(size.models, "call", (FUSED, EAGER, COMPILED, FUSED_COMPILED)))


def host(size: Size) -> list[Case]:
    return list(_asked(size.host, "host", (FUSED, EAGER, COMPILED, FUSED_COMPILED)))


def _asked(lines: Sequence[str], clock: str, peers: tuple[str, ...]) -> Iterator[Case]:
    """The cases of the arguments ``lines``, without the machine's ceilings and with no other compiled peers."""
    for line in lines:
        for case in _parsed(line)[1:]:
            compiled = [name for name in case.arguments["compiled"] if name in peers]
            there = tuple(name for name in peers if name in compiled or name not in COMPILERS)
            yield replace(case, arguments={**case.arguments, "compiled": compiled}, clock=clock, peers=there)


def shape(text: str) -> tuple[int, ...]:
    """Of a record, which has it as "32x64x128x128"."""
    return tuple(map(int, text.split("x")))


def _machine(size: Size) -> list[Case]:
    return [replace(_parsed(size.kernels[0])[0], clock="graph")]


def _parsed(line: str) -> list[Case]:
    parser = argparse.ArgumentParser()
    cli.configure(parser)
    return cases.asked(parser.parse_args(["--device", "cuda", *line.split()]))
