"""`make sanitize`: the C++ kernels under sanitizers, on random calls whose memory ends where they may touch no more.

    python tests/sanitize.py [--seed 0] [--count 1000] [--build address|thread ...]

address  AddressSanitizer and UndefinedBehaviorSanitizer, once for each vector length that this CPU has
thread   ThreadSanitizer, on the kernels' own threads (OpenMP's, which torch brings, know nothing of it)

A report, or a case whose results disagree, ends it with exit status 1 and the case's number: --first N --count 1 is
that case alone. tests/kernels/cpu/sanitize.cpp says what a case is.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fused_rect.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(__file__).parent / "kernels" / "cpu" / "sanitize.cpp"
KEPT = ROOT / "build" / "sanitize"  # programs by the hash of what makes them: building takes a minute of CPU time each
COMMON = ("-std=c++17", "-O1", "-g1", "-pthread", "-ffp-contract=off")
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
# Threads take a fifth of the cases: a call under ThreadSanitizer costs five times as much.
SHARE = {"address": 1.0, "thread": 0.2}


def lengths() -> list[str]:
    """The instruction sets whose kernels run here, narrowest first: each has vectors, and ends, of its own."""
    own = torch.backends.cpu.get_cpu_capability()
    known = ["DEFAULT", *build.FEATURES]
    return known[: known.index(own) + 1] if own in known else ["DEFAULT"]


def builds(names: list[str]) -> list[tuple[str, str]]:
    return [
        (sanitizer, features)
        for sanitizer in names
        for features in (lengths() if sanitizer == "address" else ["DEFAULT"])
    ]


def program(sanitizer: str, features: str) -> Path:
    """The built program; raises RuntimeError with the compiler's words where it cannot be built."""
    sources = [SOURCE, build.SOURCES[build.KERNELS], build.HEADER]
    flags = [*COMMON, *SANITIZERS[sanitizer], *build.FEATURES.get(features, ())]
    command = [*build.compiler(), *flags, f"-I{build.HEADER.parent}"]
    made_of = "\0".join([*command, build.version(build.compiler()), *(path.read_text() for path in sources)])
    path = KEPT / f"{sanitizer}-{features}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}"
    if not path.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*command, str(SOURCE), str(build.SOURCES[build.KERNELS]), "-o", str(partial), *build.LIBRARIES],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"no program for {sanitizer}, {features}:\n{done.stderr}")
        partial.replace(path)
    return path


def run(sanitizer: str, features: str, seed: int, first: int, count: int) -> tuple[bool, str]:
    """Whether the cases passed, and what the program said."""
    command = [str(program(sanitizer, features)), str(seed), str(first), str(count)]
    # ThreadSanitizer knows only address spaces that are laid out at the usual places.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    # GCC aligns the stacks of that check to 32 bytes, where vectors of 64 are stored (its bug 110027).
    returned = "detect_stack_use_after_return=" + ("0" if features == "AVX512" else "1")
    options = {"ASAN_OPTIONS": returned, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    done = subprocess.run([*fixed, *command], capture_output=True, text=True, env={**os.environ, **options})
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1000, help="cases for each vector length; a fifth for threads")
    parser.add_argument("--build", action="append", choices=list(SANITIZERS), help="of the two; by default both")
    options = parser.parse_args(arguments)
    chosen = builds(options.build or list(SANITIZERS))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda chosen: program(*chosen), chosen))
    failed = 0
    for sanitizer, features in chosen:
        count = max(1, int(options.count * SHARE[sanitizer]))
        start = time.monotonic()
        passed, said = run(sanitizer, features, options.seed, options.first, count)
        failed += not passed
        verdict = "no fault" if passed else "FAULT"
        print(f"{sanitizer}, {features}, seed {options.seed}: {said}: {verdict} ({time.monotonic() - start:.0f} s)")
        sys.stdout.flush()
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
