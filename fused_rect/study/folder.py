"""A study's folder: of one protocol, and of one study at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import filelock

from .. import files
from . import checkpoint
from .protocol import Protocol

SETTINGS = "study.json"


@contextlib.contextmanager
def claimed(folder: Path, protocol: Protocol, data_sha256: str, processes: int) -> Iterator[None]:
    """Holds ``folder`` for this process and this protocol; variants and seeds may be added to it later.

    Raises ValueError, before any run, where another study is in it or it holds a study with other settings. What
    killed studies left half-written is cleared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        mine = {**dataclasses.asdict(protocol), "data_sha256": data_sha256, "processes": processes}
        path = folder / SETTINGS
        if path.exists():
            _compare(path, mine)
        else:
            files.replace_json(path, checkpoint.sealed(mine))
        for left in folder.rglob(".*.part"):
            left.unlink(missing_ok=True)
        yield


def _compare(path: Path, mine: dict[str, object]) -> None:
    try:
        theirs = checkpoint.unsealed(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); name another folder with --out, or delete it") from error
    names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    if names:
        differing = "; ".join(f"{name}: {theirs.get(name)} there, {mine.get(name)} here" for name in names)
        raise ValueError(
            f"{path.parent} holds a study with other settings ({differing}); name another folder with --out"
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A lock that the system gives back when the process ends, however it ends; nothing where there are no locks."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        remedy = "wait for its end, or name another folder with --out"
        raise ValueError(f"another study is at work in {folder}; {remedy}") from error
    except (NotImplementedError, OSError):  # a network folder without locks
        pass
    try:
        yield
    finally:
        lock.release()
