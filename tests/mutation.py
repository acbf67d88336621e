"""`make mutants`: breaks the code on purpose, one mutant of mutants.py at a time, and expects a test to fail.

Each mutant is applied to a copy of the tree, and the tests that are there for its file run until the first failure; if
none fails, all tests of `make test` that reach the kernels do. A mutant that survives makes the exit status 1, unless
mutants.py gives the reason why no test can tell.

    python tests/mutation.py [--processes 2] [word ...]        # words: of the mutants to run, by name or file
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutants import FOCUSED, MUTANTS, REST, Mutant

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("fused_rect", "kernels", "perf", "tests", "docs", "pyproject.toml")
OPTIONS = ("-m", "not exhaustive", "--hypothesis-profile", "without_shrinking")
LIMIT = 900  # seconds a run of tests; a mutant that hangs is noticed


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    killed_by: str  # the failing test; "" where none fails
    seconds: float

    def __str__(self) -> str:
        verdict = f"killed by {self.killed_by}" if self.killed_by else "SURVIVED"
        if not self.killed_by and self.mutant.equivalent:
            verdict = f"survived, as explained: {self.mutant.equivalent}"
        return f"{self.mutant.file}: {self.mutant.name}: {verdict} ({self.seconds:.0f} s)"


def check(mutant: Mutant, root: Path) -> None:
    """ValueError unless the text to replace stands in the file exactly once."""
    count = (root / mutant.file).read_text().count(mutant.old)
    if count != 1:
        raise ValueError(f"{mutant.file}: {mutant.name}: the text to replace occurs {count} times, expected once")


def copy(to: Path) -> None:
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=skipped)
        elif (ROOT / name).exists():  # an sdist holds kernels and perf inside the package, and no links
            shutil.copy(ROOT / name, to / name)


def run(mutant: Mutant | None) -> Outcome:
    """The tests on a copy of the tree with ``mutant`` applied; without one, the tests alone."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder)
        copy(copied)
        if mutant is None:
            stages = [sorted({test for tests in FOCUSED.values() for test in tests} | set(REST))]
        else:
            check(mutant, copied)
            file = copied / mutant.file
            file.write_text(file.read_text().replace(mutant.old, mutant.new))
            focused = FOCUSED[mutant.file]
            stages = [focused, [test for test in REST if test not in focused]]
        killed_by = next((test for stage in stages if stage and (test := _first_failure(copied, stage))), "")
    return Outcome(mutant or Mutant("", "none", "", ""), killed_by, time.monotonic() - start)


def _first_failure(folder: Path, tests: list[str]) -> str:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-rfE", *OPTIONS]
    try:
        done = subprocess.run(
            [*command, *tests], cwd=folder, env=environment, capture_output=True, text=True, errors="replace",
            timeout=LIMIT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"the limit of {LIMIT} s"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"a crash, signal {-done.returncode}"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed is None:
        raise RuntimeError(
            f"pytest exited with {done.returncode} and no failed test:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return failed.group(1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if all(word in f"{m.file} {m.name}" for word in options.words)]
    for mutant in chosen:
        check(mutant, ROOT)
    unharmed = run(None)
    if unharmed.killed_by:
        print(f"{unharmed.killed_by} fails without any mutant, so nothing could be learned")
        return 2
    outcomes = []
    with ThreadPoolExecutor(options.processes) as pool:
        for outcome in pool.map(run, chosen):
            print(outcome, flush=True)
            outcomes.append(outcome)
    survived = [o for o in outcomes if not o.killed_by]
    unexplained = [o for o in survived if not o.mutant.equivalent]
    print(f"{len(outcomes) - len(survived)} of {len(outcomes)} mutants killed, {len(unexplained)} survived unexplained")
    return int(bool(unexplained))


if __name__ == "__main__":
    raise SystemExit(main())
