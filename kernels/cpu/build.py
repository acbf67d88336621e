"""Builds the C++ sources when the first tensor asks for them, and keeps the libraries in the user's cache folder.

rectify.cpp is the kernels of CPU tensors; direct.cpp calls them, and those of CUDA tensors, without Python in between,
and may be missing.

A library's name holds a hash of all that makes it (source, compiler, flags with the CPU's features), so nothing is ever
out of date, and a hash of its own bytes: dlopen maps a file that was cut short by a power loss, and the process dies of
SIGBUS at the first page that is not there. It is compiled in a folder beside its final place, written to the disk and
renamed: a process that is killed half-way leaves nothing that another would load, and the next build clears it away. A
folder or a library that somebody else owns or can write is not loaded.

Whatever goes wrong is a BuildError with the cause and the remedy, once a process; the eager path serves then.
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
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

KERNELS, DIRECT = "rectify", "direct"
HERE = Path(__file__).parent
SOURCES = {KERNELS: HERE / "rectify.cpp", DIRECT: HERE.parent / "direct" / "direct.cpp"}
ENTRIES = {KERNELS: "fused_rect", DIRECT: "fused_rect_direct"}
HEADER = HERE / "call.h"
HEADERS = {KERNELS: [HEADER], DIRECT: [HEADER, *sorted(SOURCES[DIRECT].parent.glob("*.h"))]}
# Contraction would round the sums' products differently from those that are stored, and float32 differently from eager.
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-ffp-contract=off")
LIBRARIES = ("-ldl",)
# Against torch's and Python's headers; -O3 would take 3 s more, for code that runs once a call.
ABI = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
DIRECT_FLAGS = ("-std=c++20", "-O1", "-shared", "-fPIC", ABI)
DIRECT_LIBRARIES = ("-ltorch_python", "-ltorch_cpu", "-lc10", "-ldl")
# By torch's own detection, so that ATEN_CPU_CAPABILITY governs these kernels as it does torch's.
FEATURES = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": (
        "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"
    ),
}  # fmt: skip
# Seconds: a build takes 8 to 15, under emulation minutes; a compiler that asks a question or a network never ends.
BUILD_LIMIT, QUESTION_LIMIT = 600, 60
REMEDY = "install a C++17 compiler (`apt install g++`, `xcode-select --install`) or name one in CXX"
OWN_FOLDER = "set FUSED_RECT_CACHE to a folder of yours that can be written to"


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
    try:
        with ThreadPoolExecutor(len(SOURCES)) as pool:
            return dict(zip(SOURCES, pool.map(_attempt, SOURCES)))
    except RuntimeError:  # this process may not start another thread
        return {part: _attempt(part) for part in SOURCES}


def _attempt(part: str) -> ctypes.CDLL | BuildError:
    try:
        return _load(part)
    except BuildError as error:
        return error
    except Exception as error:  # of the file system, of a package that torch's headers need, of whatever else there is
        cause = f"{type(error).__name__}: {error}"
        return BuildError(f"the C++ kernels could not be built or loaded ({cause}); {OWN_FOLDER}, or {REMEDY}")


def _load(part: str) -> ctypes.CDLL:
    where, key = folder(), _key(part)
    _own(where)
    path = _whole(where, key)
    if path is None:
        with _one_at_a_time(where / f"{part}.lock") as alone:
            path = _whole(where, key) or _compile(part, where, key, alone)
    _refuse_foreign(path)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        remedy = f"delete it to have it built again, or {OWN_FOLDER}"
        raise BuildError(f"{path} cannot be loaded ({error}); {remedy}") from error
    if not hasattr(loaded, ENTRIES[part]):
        raise BuildError(f"{path} holds no function {ENTRIES[part]}, so CXX is no C++ compiler; delete it and {REMEDY}")
    return loaded


# ---- what it is built by, and where it is kept ----


def compiler() -> list[str]:
    """The compiler's command line: CXX, else the first of g++, clang++ and c++ that is there."""
    wanted = os.environ.get("CXX")
    try:
        names = [shlex.split(wanted)] if wanted else [["g++"], ["clang++"], ["c++"]]
    except ValueError as error:
        raise BuildError(f"CXX={wanted} is not a command line ({error}); {REMEDY}") from error
    for command in names:
        found = shutil.which(command[0]) if command else None
        if found:
            return [found, *command[1:]]
    missing = f"CXX={wanted} is not a program" if wanted else "g++, clang++ and c++ are not programs"
    raise BuildError(f"there is no C++ compiler ({missing}); {REMEDY}")


def version(command: list[str]) -> str:
    """What the compiler says it is; its first line is enough for people."""
    done = _run([*command, "--version"], QUESTION_LIMIT)
    if done.returncode:
        said = f"status {done.returncode}: {(done.stdout + done.stderr).strip()}"
        raise BuildError(f"the C++ compiler {shlex.join(command)} does not run ({said}); {REMEDY}")
    return done.stdout.strip()


def _run(command: list[str], limit: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """The compiler's status and words, whatever their encoding; BuildError where it does not start or end."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=limit,
            env={**os.environ, **environment},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler {shlex.join(command)} does not run ({error}); {REMEDY}") from error


def folder() -> Path:
    """Where libraries are kept: FUSED_RECT_CACHE, else fused_rect in XDG_CACHE_HOME, else in ~/.cache."""
    chosen = os.environ.get("FUSED_RECT_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "fused_rect"
    except (OSError, RuntimeError) as error:  # no working directory; no HOME and no entry in passwd, no such user
        raise BuildError(f"there is no cache folder ({error}); {OWN_FOLDER}") from error


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

    includes = [*include_paths(), sysconfig.get_paths()["include"]]
    return [f"-I{path}" for path in includes] + [f"-L{path}" for path in library_paths()] + [*DIRECT_LIBRARIES]


def _key(part: str) -> str:
    """The name of all that makes the library of ``part``."""
    if os.name != "posix":
        raise BuildError(f"the native CPU kernels are built on Linux and macOS alone, not on {platform.system()}")
    sources = [path.read_text() for path in (SOURCES[part], *HEADERS[part])]
    against = (torch.__version__, str(torch.version.git_version), sys.version) if part == DIRECT else ()
    parts = (*sources, version(compiler()), *compiler()[1:], *flags(part), *against, platform.machine())
    return f"{part}-{_hash(chr(0).join(parts).encode())}"


def _own(where: Path) -> None:
    """Makes the folder; BuildError where it cannot be made or is somebody else's too."""
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"the cache folder {where} cannot be made ({error}); {OWN_FOLDER}") from error
    _refuse_foreign(where)


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


# ---- building, and what is left of builds ----


def _hash(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()[:32]


def _whole(where: Path, key: str) -> Path | None:
    """The library ``key`` if its bytes are those that its name says; damaged ones are removed as far as possible."""
    for path in sorted(where.glob(f"{key}-*.so")):
        with contextlib.suppress(OSError):
            if path.is_file() and path.stem == f"{key}-{_hash(path.read_bytes())}":
                return path
            path.unlink()
    return None


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[bool]:
    """Several processes that start at once compile once; yields whether this one holds the lock.

    Where there is no lock to be had (some network folders, something else of that name), each compiles for itself; so
    it does where the holder takes longer than a build may.
    """
    import fcntl

    with contextlib.ExitStack() as opened:
        alone = False
        with contextlib.suppress(OSError):
            # NONBLOCK: opening a pipe would wait for its other end.
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            opened.callback(os.close, lock)
            deadline = time.monotonic() + BUILD_LIMIT
            while stat.S_ISREG(os.fstat(lock).st_mode) and not alone and time.monotonic() < deadline:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    alone = True
                except BlockingIOError:
                    time.sleep(0.05)
        yield alone


def _compile(part: str, where: Path, key: str, alone: bool) -> Path:
    """Builds ``part``, and puts it into ``where`` when it is whole and on the disk."""
    prefix = f"build-{part}-"
    _clear(where, prefix if alone else None)
    try:
        with tempfile.TemporaryDirectory(dir=where, prefix=prefix, ignore_cleanup_errors=True) as scratch:
            out = Path(scratch) / f"{part}.so"
            command = [*compiler(), *flags(part), str(SOURCES[part]), "-o", str(out), *_against(part)]
            done = _run(command, BUILD_LIMIT, TMPDIR=scratch)
            if done.returncode or not out.is_file():
                what = f"failed (status {done.returncode})" if done.returncode else "wrote no file"
                said = f"{shlex.join(command)}\n{done.stdout}{done.stderr}".strip()
                raise BuildError(f"the C++ compiler {what}; {REMEDY}, or {OWN_FOLDER}. It said:\n{said}")
            out.chmod(0o700)
            _on_disk(out)
            path = where / f"{key}-{_hash(out.read_bytes())}.so"
            os.replace(out, path)
            _on_disk(where)
            return path
    except OSError as error:
        raise BuildError(f"nothing can be written into the cache folder {where} ({error}); {OWN_FOLDER}") from error


def _clear(where: Path, prefix: str | None) -> None:
    """Removes what killed builds left: ``prefix``, whose lock we hold, and whatever is older than a build can be."""
    for left in where.glob("build-*"):
        with contextlib.suppress(OSError):
            if (prefix and left.name.startswith(prefix)) or time.time() - left.stat().st_mtime > BUILD_LIMIT:
                shutil.rmtree(left)


def _on_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
