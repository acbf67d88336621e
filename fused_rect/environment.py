"""`fused-rect env`: which implementation runs on each device here, and why, with the versions that a report needs."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import backends
from .kernels.cpu import build
from .version import __version__

VARIABLES = (
    "FUSED_RECT_BACKEND",
    "FUSED_RECT_CACHE",
    "XDG_CACHE_HOME",
    "CXX",
    "ATEN_CPU_CAPABILITY",
    "TRITON_INTERPRET",
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(options: argparse.Namespace) -> int:
    found = report()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    width = max(map(len, found))
    for name, value in found.items():
        if isinstance(value, dict):
            value = f"\n{'':{width}}  ".join(f"{key}: {entry}" for key, entry in value.items()) or "none"
        print(f"{name:{width}}  {value}")
    return 0


def report() -> dict[str, Any]:
    """Plain values by name. Builds the CPU kernels if they are not there, since that decides which path runs."""
    accelerators = _accelerators()
    facts = machine((accelerators or ["cpu"])[0])
    del facts["implementation"]  # paths has every device's
    return {
        **facts,
        "devices": _devices(),
        "paths": {device: backends.why(device) for device in ("cpu", *accelerators)},
        "calls": {device: backends.calls(device) for device in ("cpu", *accelerators)},
        "compiler": _or_why_not(_compiler),
        "cache": _or_why_not(build.folder),
        "cpu features": torch.backends.cpu.get_cpu_capability(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def machine(device: str = "cpu", threads: int = 0) -> dict[str, Any]:
    """What numbers measured on ``device`` depend on, for whatever reports them; ``threads`` 0 is torch's own choice.

    accelerator, target ("sm_90", "gfx942") and toolkit are there for a GPU alone.
    """
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
    }
    kind = torch.device(device).type
    if kind in ("cuda", "xpu"):
        facts["accelerator"] = torch.get_device_module(kind).get_device_name(device)
    if kind == "cuda":
        found: Any = torch.cuda.get_device_properties(device)
        facts["target"] = found.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"
        facts["toolkit"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return facts | {
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fused_rect": __version__,
        "implementation": _without_home(backends.why(device)),
    }


def _without_home(text: str) -> str:
    """``text`` with ~ for the home folder, if any: a container's user may have neither HOME nor an entry in passwd."""
    home = os.path.expanduser("~")
    return text.replace(home + os.sep, "~" + os.sep) if os.path.isabs(home) and home != os.sep else text


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [] if accelerator is None else [accelerator.type]


def _devices() -> dict[str, str]:
    names = {"cpu": f"{_processor()}, {os.cpu_count()} cores"}
    for kind in _accelerators():
        module = torch.get_device_module(kind)
        for index in range(torch.accelerator.device_count()):
            name = module.get_device_name(index) if hasattr(module, "get_device_name") else kind
            names[f"{kind}:{index}"] = name
    return names


def _compiler() -> str:
    command = build.compiler()
    return f"{' '.join(command)}: {build.version(command).splitlines()[0]}"


def _or_why_not(found: Callable[[], Any]) -> str:
    try:
        return str(found())
    except build.BuildError as error:
        return str(error)
