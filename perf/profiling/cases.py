"""From the options of `fused-rect profile` to the cases that it measures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from fused_rect import backends

from . import peers, scaling
from .measure import Case
from .records import work
from .workloads import RECTIFIERS, WORKLOADS, Layer, within

# Where no batch is asked for, a CPU gets batches whose convolution stays within this: about 2 ms on two cores.
CPU_FLOPS = 2e8
PEERS = f"{peers.__name__}:"


def asked(options: argparse.Namespace) -> list[Case]:
    """Everything to measure, the machine's ceilings first. Raises ValueError for options that name nothing."""
    made = [_machine(options)]
    if options.model:
        made += [_model(options, mode) for mode in options.mode]
    elif options.scaling:
        made += [_layer(options, layer, f"scaling {options.scaling}", "epilogue", mode, threads)
                 for layer, threads in scaling.points(options.scaling, options.threads)
                 for layer in _with_rectifiers(options, layer)
                 for mode in options.mode]  # fmt: skip
    else:
        made += [_layer(options, layer, workload, part, mode, options.threads)
                 for workload, layer in _layers(options)
                 for mode in options.mode
                 for part in options.part or ("layer", "epilogue")]  # fmt: skip
    return made


def _layers(options: argparse.Namespace) -> Iterator[tuple[str, Layer]]:
    if options.shape:
        rank = len(options.shape) - 2
        kernel = (options.kernel or 3,) * rank
        channels = options.out_channels or options.shape[1]
        layer = Layer("shape", options.shape, channels, kernel, "relu", (options.stride or 1,) * rank)
        yield from (("shape", one) for one in _with_rectifiers(options, layer, every=True))
        return
    for name in options.workload or ["default"]:
        layers = WORKLOADS[name].layers
        for layer in layers[:2] if options.quick else layers:
            sized = layer if options.batch is None else replace(layer, shape=(options.batch, *layer.shape[1:]))
            if options.batch is None and torch.device(options.device).type == "cpu":
                sized = within(layer, CPU_FLOPS)
            yield from ((name, one) for one in _with_rectifiers(options, sized, every=name == "default"))


def _with_rectifiers(options: argparse.Namespace, layer: Layer, every: bool = False) -> list[Layer]:
    """The network's own rectifier; all four where there is no network, or where they are asked for."""
    if options.rectifier:
        return [replace(layer, rectifier=name) for name in options.rectifier]
    if every:
        return [replace(layer, rectifier=name) for name in RECTIFIERS]
    return [layer]


def _common(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    return {
        "device": options.device,
        "implementation": backends.name(options.device),
        "dtype": options.dtype,
        "layout": options.layout,
        "threads": threads or torch.get_num_threads(),
    }


def _call(options: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": options.dtype, "layout": options.layout, "device": options.device, "compiled": options.compile}


def _layer(options: argparse.Namespace, layer: Layer, workload: str, part: str, mode: str, threads: int) -> Case:
    moved, computed = work(layer, part, mode, getattr(torch, options.dtype).itemsize)
    arguments = {"layer": layer.arguments(), "part": part, "mode": mode, **_call(options)}
    name = f"{workload} {layer.name}, {layer.rectifier}, {part}, {mode}"
    about = {
        "workload": workload, "layer": layer.name, "part": part, "rectifier": layer.rectifier, "mode": mode,
        "shape": _times(layer.shape), "output": _times(layer.output), "kernel": _times(layer.kernel),
        "bytes": moved, "flops": computed, **_common(options, threads),
    }  # fmt: skip
    return Case(name, f"{PEERS}layer", arguments, options.device, threads, part == "layer", about)


def _model(options: argparse.Namespace, mode: str) -> Case:
    shape = list(options.shape) if options.shape else None
    arguments = {"factory": options.model, "shape": shape, "mode": mode, **_call(options)}
    about = {
        "workload": "model", "layer": options.model, "part": "model", "rectifier": "", "mode": mode,
        "shape": _times(options.shape or ()), "output": "", "kernel": "", "bytes": 0, "flops": 0,
        **_common(options, options.threads),
    }  # fmt: skip
    name = f"{options.model}, {mode}"
    return Case(name, f"{PEERS}model", arguments, options.device, options.threads, True, about)


def _machine(options: argparse.Namespace) -> Case:
    """Ceilings: a copy larger than any cache, and a matrix product large enough to fill the device."""
    on_cpu = torch.device(options.device).type == "cpu"
    copied, side = (1 << 26, 1024) if on_cpu else (1 << 30, 8192)
    arguments = {"device": options.device, "copied": copied, "side": side, "dtype": options.dtype}
    about = {
        "workload": "machine", "layer": "ceilings", "part": "machine", "rectifier": "", "mode": "",
        "shape": "", "output": "", "kernel": "", "bytes": 2 * copied, "flops": 2 * side**3,
        **_common(options, options.threads),
    }  # fmt: skip
    name = "the machine's ceilings"
    return Case(name, f"{PEERS}machine", arguments, options.device, options.threads, about=about)


def _times(sizes: Any) -> str:
    return "x".join(map(str, sizes))
