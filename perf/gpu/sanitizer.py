"""compute-sanitizer over small launches: memory, races in shared memory, reads of what nobody wrote."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

CHECKS = ("memcheck", "racecheck", "initcheck")
# The tool slows every launch a hundredfold: few and small cases.
CODE = """
from fused_rect.perf.gpu import agreement as a
rows = list(a.agreement("cuda", a.cases([(2, 3, 5, 7), (2, 24, 9, 8)], ["bfloat16"])[::5]))
assert all(row["ok"] for row in rows), rows
"""


def sanitizer() -> Iterator[dict[str, Any]]:
    """The three checks side by side: most of their time is one core's."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield {"ok": None, "case": "compute-sanitizer", "why": "it is not on the PATH"}
        return
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else the allocator's blocks hide overruns
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    program = ["--error-exitcode", "9", sys.executable, "-c", CODE]
    running = {check: subprocess.Popen([tool, "--tool", check, *program], **how) for check in CHECKS}
    for check, process in running.items():
        told, _ = process.communicate()
        print(f"---- {check}\n{told}", flush=True)
        summary = told.strip().splitlines()[-1:]
        yield {"ok": process.returncode == 0, "case": check, "exit status": process.returncode, "summary": summary}
