"""Files that are whole under their names, whatever stops the process that writes them: a kill, a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


def replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """``write`` to a file beside ``path`` that takes its name once it is on the disk: readers see the old or the new.

    Makes the folder. A link is followed; a device or a pipe (/dev/stdout) is written to as it is. OSErrors name the
    file.
    """
    path = Path(os.path.realpath(path))
    with _naming(path):
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                write(file)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{secrets.token_hex(8)}.part")
        try:
            with partial.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """:func:`replace` by ``text`` as UTF-8; what is no text (a path may hold it) becomes an escape."""
    replace(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def replace_json(path: Path, value: Any) -> None:
    replace_text(path, json.dumps(value, indent=1) + "\n")


def check(path: Path) -> None:
    """Raises the OSError that :func:`replace` would, for a file that cannot be written; the folder must be there."""
    path = Path(os.path.realpath(path))
    with _naming(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if path.is_file() or not path.exists():
            tempfile.TemporaryFile(dir=path.parent).close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
