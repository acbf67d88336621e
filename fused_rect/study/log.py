"""A run's log: sealed JSON lines, one an event, appended as they happen; the same to TensorBoard where asked for."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

from . import checkpoint

LONGEST = 1 << 16  # bytes a line; ours have a few hundred


class Log:
    """Events of one run in ``folder``/log.jsonl; ranks other than the first write nothing.

    Raises ValueError, which names the line, where the log of an earlier process is damaged. A last line that its
    process did not finish is cut off.
    """

    def __init__(self, folder: Path, run: str, active: bool, tensorboard: bool) -> None:
        self.run, self.file, self.writer, self.start = run, None, None, time.monotonic()
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        _verify(self.path, run)
        self.file = self.path.open("ab", buffering=0)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder))

    def write(self, event: str, **values: Any) -> None:
        if self.file is None:
            return
        line = {"run": self.run, "event": event, "seconds": round(time.monotonic() - self.start, 3), **values}
        text = json.dumps(checkpoint.sealed(line)).encode() + b"\n"
        try:
            if self.file.write(text) != len(text):  # the disk took a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if self.writer is not None and event == "epoch":
            for name, value in values.items():
                self.writer.add_scalar(name, value, values["step"])

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()
        if self.writer is not None:
            self.writer.close()


def _verify(path: Path, run: str) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = number = 0
        while line := file.readline(LONGEST):
            if not line.endswith(b"\n") and len(line) < LONGEST:
                file.truncate(end)
                return
            number += 1
            try:
                if checkpoint.unsealed(line)["run"] != run:
                    raise ValueError("it is another run's")
            except ValueError as error:
                remedy = "delete the file: the run goes on from its checkpoint without it"
                raise ValueError(f"{path}, line {number}, is damaged ({error}); {remedy}") from error
            end += len(line)
