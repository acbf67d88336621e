"""A run's state on disk, written whole or not at all, so that a run killed at any moment goes on from the last one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .. import files


def save(path: Path, state: dict[str, Any]) -> None:
    files.replace(path, lambda file: torch.save(state, file))


def load(path: Path, identity: str) -> dict[str, Any] | None:
    """The state at ``path``, None where there is none. ValueError for another run's, or a damaged one."""
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways on a file that is not its own
        raise ValueError(
            f"{path} is not a readable checkpoint ({type(error).__name__}); delete it to start anew"
        ) from error
    if state["identity"] != identity:
        raise ValueError(
            f"{path} is the checkpoint of a run with other settings, data or number of processes; "
            "name another folder with --out, or delete it"
        )
    return state


def save_json(path: Path, value: Any) -> None:
    files.replace(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def load_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value
