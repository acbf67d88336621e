"""`fused-rect env`: which implementation runs on each device here, and why, with the versions that a report needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from . import backends
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
    return {
        "fused_rect": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "devices": _devices(),
        "paths": {device: backends.why(device) for device in ("cpu", *_accelerators())},
        "cpu calls": _calls(),
        "compiler": _compiler(),
        "cache": _cache(),
        "cpu features": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _accelerators() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [] if accelerator is None else [accelerator.type]


def _devices() -> dict[str, str]:
    names = {"cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    for kind in _accelerators():
        module = torch.get_device_module(kind)
        for index in range(torch.accelerator.device_count()):
            name = module.get_device_name(index) if hasattr(module, "get_device_name") else kind
            names[f"{kind}:{index}"] = name
    return names


def _calls() -> str:
    if backends.name("cpu") != "native":
        return "Python"
    from .kernels import cpu

    return cpu.calls()


def _compiler() -> str:
    from .kernels.cpu import build

    try:
        command = build.compiler()
        return f"{' '.join(command)}: {build.version(command).splitlines()[0]}"
    except build.BuildError as error:
        return str(error)


def _cache() -> str:
    from .kernels.cpu import build

    try:
        return str(build.folder())
    except build.BuildError as error:
        return str(error)
