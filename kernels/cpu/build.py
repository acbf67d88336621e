"""Builds the C++ sources when the first CPU tensor asks for them, and keeps the libraries in the user's cache folder.

rectify.cpp is the kernels; direct.cpp, compiled beside it, calls them without Python in between, and may be missing.

A library's name is a hash of all that makes it (source, compiler, flags with the CPU's features), so nothing is ever
out of date. It is compiled beside its final name and renamed: a process that is killed half-way leaves nothing that
another would load. A folder or a library that somebody else owns or can write is not loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

KERNELS, DIRECT = "rectify", "direct"
SOURCES = {part: Path(__file__).with_name(f"{part}.cpp") for part in (KERNELS, DIRECT)}
HEADER = Path(__file__).with_name("call.h")
# Contraction would round the sums' products differently from those that are stored, and float32 differently from eager.
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-ffp-contract=off")
LIBRARIES = ("-ldl",)
# Against torch's headers; -O3 would take 3 s more, for code that runs once a call.
ABI = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
DIRECT_FLAGS = ("-std=c++20", "-O1", "-shared", "-fPIC", ABI)
DIRECT_LIBRARIES = ("-ltorch_cpu", "-lc10")
# By torch's own detection, so that ATEN_CPU_CAPABILITY governs these kernels as it does torch's.
FEATURES = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": (
        "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"
    ),
}  # fmt: skip
REMEDY = "install a C++17 compiler (`apt install g++`, `xcode-select --install`) or name one in CXX"
OWN_FOLDER = "set FUSED_RECT_CACHE to a folder of yours"


class BuildError(RuntimeError):
    """Why there is no library, in words for the user."""


def library(part: str = KERNELS) -> ctypes.CDLL:
    """The loaded library of ``part``, compiled if need be (about 10 s, once a machine).

    Raises BuildError with the reason.
    """
    found = _outcomes()[part]
    if isinstance(found, BuildError):
        raise found
    return found


@functools.cache
def _outcomes() -> dict[str, ctypes.CDLL | BuildError]:
    """The first attempt's, for the rest of the process: a compiler that fails takes seconds to do so."""
    with ThreadPoolExecutor(len(SOURCES)) as pool:
        return dict(zip(SOURCES, pool.map(_attempt, SOURCES)))


def _attempt(part: str) -> ctypes.CDLL | BuildError:
    try:
        return _load(part) if part == KERNELS else _load_once(part)
    except BuildError as error:
        return error


@functools.cache
def _load_once(part: str) -> ctypes.CDLL:
    """A library that registers ops with torch does so once a process."""
    return _load(part)


def _load(part: str) -> ctypes.CDLL:
    path = _target(part)
    if not path.exists():
        with _one_at_a_time(path.parent / f"{part}.lock"):
            if not path.exists():
                _compile(part, path)
    _refuse_foreign(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error}); delete it to have it built again") from error


def compiler() -> list[str]:
    """The compiler's command line: CXX, else the first of g++, clang++ and c++ that is there."""
    wanted = os.environ.get("CXX")
    names = [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]
    for command in names:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    missing = f"CXX={wanted} is not a program" if wanted else "g++, clang++ and c++ are not programs"
    raise BuildError(f"there is no C++ compiler ({missing}); {REMEDY}")


def version(command: list[str]) -> str:
    """What the compiler says it is; its first line is enough for people."""
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the C++ compiler {shlex.join(command)} does not run ({error}); {REMEDY}") from error


def folder() -> Path:
    """Where libraries are kept: FUSED_RECT_CACHE, else fused_rect in XDG_CACHE_HOME, else in ~/.cache."""
    chosen = os.environ.get("FUSED_RECT_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "fused_rect"


def flags(part: str = KERNELS) -> tuple[str, ...]:
    """All flags, the kernels' for this machine's CPU; NEON needs none."""
    if part == DIRECT:
        return DIRECT_FLAGS
    return *FLAGS, *FEATURES.get(torch.backends.cpu.get_cpu_capability(), ())


def _against(part: str) -> list[str]:
    """What ``part`` is compiled and linked against."""
    if part == KERNELS:
        return list(LIBRARIES)
    from torch.utils.cpp_extension import include_paths, library_paths

    return [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()] + [*DIRECT_LIBRARIES]


def _target(part: str = KERNELS) -> Path:
    if os.name != "posix":
        raise BuildError(f"the native CPU kernels are built on Linux and macOS alone, not on {platform.system()}")
    sources = (SOURCES[part].read_text(), HEADER.read_text())
    torch_build = (torch.__version__, str(torch.version.git_version)) if part == DIRECT else ()
    parts = (*sources, version(compiler()), *flags(part), *torch_build, platform.machine())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    where = folder()
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"the cache folder {where} cannot be made ({error}); {OWN_FOLDER}") from error
    _refuse_foreign(where)
    return where / f"{part}-{key}.so"


def _refuse_foreign(path: Path) -> None:
    """What somebody else could have put there would run with this user's rights."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) and found.st_uid == os.geteuid():
        found = path.stat()
    if found.st_uid != os.geteuid():
        whose = f"belongs to user {found.st_uid}, not to you ({os.geteuid()})"
        raise BuildError(f"{path} {whose}, so it is not used; remove it, or {OWN_FOLDER}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        remedy = f"`chmod go-w {shlex.quote(str(path))}`"
        raise BuildError(f"{path} can be written by other users, so it is not used; {remedy}, or {OWN_FOLDER}")


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Several processes that start at once compile once; where there are no locks (some network folders), each does."""
    import fcntl

    with open(path, "w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(part: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        out = Path(scratch) / path.name
        command = [*compiler(), *flags(part), str(SOURCES[part]), "-o", str(out), *_against(part)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            said = f"{shlex.join(command)}\n{done.stdout.strip()}"
            raise BuildError(f"the C++ compiler failed (status {done.returncode}):\n{said}")
        out.chmod(0o700)
        os.replace(out, path)
