"""A run's log: JSON lines, one an event, appended as they happen; the same numbers to TensorBoard where asked for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Log:
    """Events of one run in ``folder``/log.jsonl; ranks other than the first write nothing."""

    def __init__(self, folder: Path, run: str, active: bool, tensorboard: bool) -> None:
        self.run, self.file, self.writer, self.start = run, None, None, time.monotonic()
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "log.jsonl").open("a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder))

    def write(self, event: str, **values: Any) -> None:
        if self.file is None:
            return
        line = {"run": self.run, "event": event, "seconds": round(time.monotonic() - self.start, 3), **values}
        self.file.write(json.dumps(line) + "\n")
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
