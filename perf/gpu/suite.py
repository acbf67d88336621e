"""The tests that reach Triton kernels, compiled for the GPU, with tensors on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# One line a test, as it ends: what a run that is stopped has shown by then is not lost. With and without xdist.
OUTCOME = "(?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
ENDED = (re.compile(rf"\[gw\d+\] \[ *\d+%\] {OUTCOME} (?P<test>\S.*)"), re.compile(rf"(?P<test>tests/\S.*) {OUTCOME} "))
WORKERS = 12  # each has a context on the GPU


def suite(tests: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each test that fails, how far it is now and then, and one for all of them: not ok where none passed."""
    if not (ROOT / "tests").is_dir():
        yield {"ok": None, "case": "tests", "why": f"there are none beside the package in {ROOT}: a checkout has them"}
        return
    workers = min(WORKERS, os.cpu_count() or 1)
    pytest = ["-m", "pytest", "-v", "-m", "ptx", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command = [sys.executable, *pytest, *tests, *(["-n", str(workers)] if workers > 2 else [])]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"FUSED_RECT_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    counts: Counter[str] = Counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            found = next(filter(None, (pattern.match(line) for pattern in ENDED)), None)
            if found is None:
                continue
            counts[found["outcome"]] += 1
            if found["outcome"] in ("FAILED", "ERROR"):
                yield {"ok": False, "case": found["test"].strip()}
            if sum(counts.values()) % 100 == 0:
                yield {"so far": dict(counts)}
    passed = counts["PASSED"] > 0
    why = {} if passed else {"why": f"no test passed; {counts['SKIPPED']} skipped"}
    yield {"ok": running.returncode == 0 and passed, "case": "tests", "counts": dict(counts),
           "exit status": running.returncode, **why}  # fmt: skip
