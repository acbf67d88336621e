"""What a report says of the machine and the software it ran on."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fused_rect import backends
from fused_rect.version import __version__


def environment(device: str, threads: int = 0) -> dict[str, str]:
    """Name and value of each thing that times depend on."""
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(threads or torch.get_num_threads()),
    }
    kind = torch.device(device).type
    if kind in ("cuda", "xpu"):
        facts["accelerator"] = getattr(torch, kind).get_device_name(device)
    facts |= {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fused_rect": __version__,
        "implementation": backends.why(device),
    }
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
