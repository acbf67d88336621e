"""A run's files: written whole or not at all, so that a run killed at any moment goes on from the last checkpoint, and
verified before they are read, so that a damaged one is refused by name and never resumed from.

Both kinds of files carry a CRC-32: of a checkpoint's bytes, as four more behind what `torch.save` writes, and of a JSON
object's text, as one more entry. (The CRC-32 of zip's own records, which `torch.load` does not look at, does not cover
the archive's directory: there is a bit in it that makes another tensor of an intact record.)
"""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import Any

import torch

from .. import files

_CHANGED = "its contents are not those that were written: another CRC-32"


def save(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()  # torch.save to a disk that is full says what its archive lacks, not what is wrong
    torch.save(state, buffer)
    contents = buffer.getvalue()
    files.replace(path, lambda file: file.write(contents + zlib.crc32(contents).to_bytes(4, "little")))


def load(path: Path, identity: str) -> dict[str, Any] | None:
    """The state at ``path``, None where there is none. ValueError for another run's, or a damaged one."""
    if not path.is_file():
        return None
    try:
        data = path.read_bytes()
        contents, crc = data[:-4], int.from_bytes(data[-4:], "little")
        if zlib.crc32(contents) != crc:
            raise ValueError(_CHANGED)
        state = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
        found = state["identity"]
    except Exception as error:  # torch.load fails in many ways on a file that is not its own
        raise ValueError(f"{path} is not a readable checkpoint ({_said(error)}); delete it to start anew") from error
    _refuse_another(path, "checkpoint", found, identity)
    return state  # type: ignore[no-any-return]


def _said(error: Exception) -> str:
    """The first line of an error: torch's go on with advice about other files."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _refuse_another(path: Path, what: str, found: Any, identity: str) -> None:
    if found != identity:
        raise ValueError(
            f"{path} is the {what} of a run with other settings, data or number of processes; "
            "name another folder with --out, or delete it"
        )


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """``value`` with the CRC-32 of its own JSON, for :func:`unsealed`."""
    return {**value, "crc32": _crc(value)}


def unsealed(text: bytes) -> dict[str, Any]:
    """The object that was sealed and written as ``text``; ValueError where anything has changed since."""
    try:
        value = json.loads(text)
        if value.pop("crc32") == _crc(value):
            return value  # type: ignore[no-any-return]
    except Exception as error:  # JSON of any other kind, nested too deeply, no text
        raise ValueError(_said(error)) from error
    raise ValueError(_CHANGED)


def _crc(value: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def save_result(path: Path, identity: str, result: dict[str, Any]) -> None:
    files.replace_json(path, sealed({"identity": identity, **result}))


def load_result(path: Path, identity: str) -> dict[str, Any] | None:
    """What :func:`save_result` wrote at ``path``, None where there is none. ValueError as for :func:`load`."""
    if not path.is_file():
        return None
    try:
        result = unsealed(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and the run is trained again") from error
    _refuse_another(path, "result", result.pop("identity", None), identity)
    return result
