"""A step in a process of its own: its rows come as it finds them, what it prints goes to the log."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

from ..profiling.measure import end

GRACE = 5.0  # seconds that a step which is over its budget has to come to the end of a case
CUT = {"cut": True}  # the last row of a step that had no time for all
OK, FAILED, NOT_RUN, SHORT = "ok", "FAILED", "not run", "out of time"


def run(name: str, size: str, seconds: float, log: IO[str]) -> dict[str, Any]:
    """The outcome of the step ``name``, its rows and its seconds; it is ended ``GRACE`` seconds past its budget."""
    start = time.monotonic()
    command = [sys.executable, "-m", __name__, name, size, str(start + seconds)]
    log.flush()
    rows: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True) as child:
        reader = threading.Thread(target=_read, args=(child.stdout, rows), daemon=True)
        reader.start()
        ended = False
        try:
            child.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            ended = True
        finally:
            end(child)  # and what it left running
        reader.join(GRACE)
        rows += [CUT | {"why": f"ended after {seconds + GRACE:.0f} s"}] if ended else []
    return {"outcome": outcome(rows, child.returncode), "seconds": round(time.monotonic() - start, 1),
            "exit status": child.returncode, "rows": rows}  # fmt: skip


def _read(lines: Any, rows: list[dict[str, Any]]) -> None:
    with contextlib.suppress(ValueError):  # the last line of one that was ended may be half a line
        for line in lines:
            rows.append(json.loads(line))


def outcome(rows: Sequence[dict[str, Any]], status: int) -> str:
    """Not ok without a row that is; nothing that failed is hidden by time that ran out."""
    cut = any(row.get("cut") for row in rows)
    said = [row["ok"] for row in rows if "ok" in row]
    if False in said or (status and not cut):
        return FAILED
    if cut:
        return SHORT
    return OK if True in said else NOT_RUN if None in said else FAILED


# ---- in the process ----


def main(arguments: Sequence[str]) -> None:
    """Results go to the real standard output alone; what a step prints there goes to the log."""
    name, size, end = arguments
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        from .sizes import SIZES
        from .steps import STEPS

        for row in STEPS[name].run(SIZES[size]):
            print(json.dumps(_plain(row)), file=results, flush=True)
            if time.monotonic() > float(end):
                print(json.dumps(CUT), file=results, flush=True)
                break


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: NaN is null, infinity a word."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


if __name__ == "__main__":
    main(sys.argv[1:])
