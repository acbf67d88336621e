"""The native kernels' NEON build, cross-compiled and run under emulation: bit for bit the portable build's results."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fused_rect.kernels.cpu import build

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
absent = [program for program in (CROSS, EMULATOR) if shutil.which(program) is None]
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(bool(absent), reason=f"{absent} missing: apt install g++-aarch64-linux-gnu qemu-user"),
]


def printed(folder: Path, compiler: list[str], *runner: str) -> list[str]:
    flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
    program, source = folder / Path(compiler[0]).name, Path(__file__).with_name("cross.cpp")
    headers = f"-I{build.SOURCES[build.KERNELS].parent}"
    command = [*compiler, *flags, "-static", headers, str(source), "-o", str(program), *build.LIBRARIES]
    subprocess.run(command, check=True)
    done = subprocess.run([*runner, str(program)], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_neon_equals_the_portable_build(tmp_path):
    ours, neon = printed(tmp_path, build.compiler()), printed(tmp_path, [CROSS], EMULATOR)
    assert len(ours) == 20 and neon == ours
