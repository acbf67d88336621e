"""`make test-versions`: the suite under other versions of Python and torch, an environment each.

    python tests/versions.py [--list] [--folder DIR] [version of torch ...] [-- pytest's options]

Each environment is made at first use below the user's cache (or ``--folder``), from pyproject.toml's extras with that
torch and the Triton that it brings: 3 to 7 GB on Linux, for torch comes with CUDA, of which nothing is used. By default
the oldest and the newest run; versions of torch name others, "all" all of them. Ends with a line for each: passed,
failed, skipped. A Python or torch that cannot be had is said, and is no failure.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "demo,models,perf,study,test"
# What of the environment would decide for the tests.
OWN = ("PYTHONPATH", "FUSED_RECT_BACKEND", "TRITON_INTERPRET", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Version:
    torch: str
    python: str

    def __str__(self) -> str:
        return f"torch {self.torch}, Python {self.python}"


VERSIONS = (
    Version("2.9.1", "3.10"),
    Version("2.11.0", "3.12"),
    Version("2.13.0", "3.11"),
    Version("2.14.1", "3.13"),
)


class Unavailable(RuntimeError):
    """The environment could not be made; the message says why."""


def environment(version: Version, folder: Path) -> Path:
    """The Python of ``version``'s environment, made at first use. Raises Unavailable."""
    place = folder / f"torch-{version.torch}-python-{version.python}"
    python, done = place / "bin" / "python", place / ".installed"
    if done.exists():
        return python
    base = shutil.which(f"python{version.python}")
    if base is None:
        raise Unavailable(f"there is no python{version.python} on PATH")
    shutil.rmtree(place, ignore_errors=True)  # of an installation that was interrupted
    for command in (
        [base, "-m", "venv", str(place)],
        [str(python), "-m", "pip", "install", "--quiet", "-e", f".[{EXTRAS}]", f"torch=={version.torch}"],
    ):
        made = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if made.returncode:
            raise Unavailable((made.stdout.strip().splitlines() or ["no word"])[-1])
    done.touch()
    return python


def run(python: Path, options: list[str]) -> str:
    """The suite's last line: how many passed, failed and were skipped. Its output is shown as it comes."""
    ours = {name: value for name, value in os.environ.items() if name not in OWN}
    command = [str(python), "-m", "pytest", "-n", "2", "-m", "not exhaustive", "-q", *options]
    with subprocess.Popen(command, cwd=ROOT, env=ours, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        last = ""
        for line in tests.stdout:
            print(line, end="", flush=True)
            last = line if re.search(r"\d (passed|failed|error)", line) else last
    return last.strip("= \n") or f"no result: pytest ended with status {tests.returncode}"


def installed(python: Path) -> str:
    asked = "import numpy, torch, triton; print('Triton', triton.__version__, 'numpy', numpy.__version__)"
    return subprocess.run([str(python), "-c", asked], capture_output=True, text=True).stdout.strip()


def chosen(names: list[str]) -> list[Version]:
    if names == ["all"]:
        return list(VERSIONS)
    known = {version.torch: version for version in VERSIONS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"torch {', '.join(unknown)}: not of {', '.join(known)}, or all")
    return [known[name] for name in names] or [VERSIONS[0], VERSIONS[-1]]


def main(arguments: list[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = given.index("--") if "--" in given else len(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_rect" / "versions"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="torch", help="versions of torch, or all")
    parser.add_argument("--list", action="store_true", help="the versions, and which have an environment")
    parser.add_argument("--folder", type=Path, default=cache, help=f"of the environments; {cache} by default")
    options = parser.parse_args(given[:at])
    lines = []
    for version in chosen(options.names):
        if options.list:
            place = options.folder / f"torch-{version.torch}-python-{version.python}"
            print(f"{version}: {place if place.exists() else 'not installed'}")
            continue
        print(f"{version}: 3 to 7 GB in {options.folder} at first use, then 15 minutes on two idle cores", flush=True)
        try:
            python = environment(version, options.folder)
        except Unavailable as reason:
            lines.append(f"{version}: not run: {reason}")
            continue
        result = run(python, given[at + 1 :])
        lines.append(f"{version}, {installed(python)}: {result}")
    print(*lines, sep="\n")
    return int(any(re.search(r"failed|error|no result", line) for line in lines))


if __name__ == "__main__":
    sys.exit(main())
