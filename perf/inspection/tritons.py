"""Other Triton versions, each in a folder of its own below the user's cache, beside the torch that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

VERSIONS = ("3.6.0", "3.7.0", "3.8.0", "3.9.0")


class Unavailable(RuntimeError):
    """The version could not be installed; the message says why."""


def folder(version: str) -> Path:
    """Where ``version`` is installed; installs it with pip at first use. Raises Unavailable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = cache / "fused_rect" / f"triton-{version}"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as staging:
        pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", staging, f"triton=={version}"]
        done = subprocess.run(
            [sys.executable, *pip], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
        )
        if done.returncode:
            raise Unavailable(f"pip could not install triton=={version}: {done.stdout.strip().splitlines()[-1]}")
        if not place.exists():  # another process may have been faster
            os.rename(staging, place)
            os.mkdir(staging)  # for the context manager to remove
    return place


def run(version: str, arguments: Sequence[str]) -> int:
    """Python with ``arguments`` and that Triton first on its path; its exit status."""
    return subprocess.run([sys.executable, *arguments], env=environment(version)).returncode


def environment(version: str) -> dict[str, str]:
    path = [str(folder(version)), str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
