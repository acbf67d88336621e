"""From the options of `fused-rect profile` to the cases that it measures."""

from __future__ import annotations

import argparse
import itertools
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
PARTS = ("layer", "epilogue")


def asked(options: argparse.Namespace) -> list[Case]:
    """Everything to measure, the machine's ceilings first."""
    axes = itertools.product(options.dtype, options.layout, options.mode)
    make = _model if options.model else _sweep if options.scaling else _workloads
    hows = [dict(zip(("dtype", "layout", "mode"), how)) for how in axes]
    return [_machine(options), *(case for how in hows for case in make(options, how))]


def _model(options: argparse.Namespace, how: dict[str, str]) -> Iterator[Case]:
    arguments = {"factory": options.model, "shape": list(options.shape) if options.shape else None}
    about = {"workload": "model", "layer": options.model, "part": "model", "shape": _times(options.shape or ())}
    yield _case(options, options.model, "model", how, options.threads, arguments, about)


def _sweep(options: argparse.Namespace, how: dict[str, str]) -> Iterator[Case]:
    for point, threads in scaling.points(options.scaling, options.threads):
        for layer in _with_rectifiers(options, point):
            yield _layer(options, layer, f"scaling {options.scaling}", "epilogue", how, threads)


def _workloads(options: argparse.Namespace, how: dict[str, str]) -> Iterator[Case]:
    for workload, layer in _layers(options):
        for part in options.part or PARTS:
            if part == "layer" or layer.depth == 1:
                yield _layer(options, layer, workload, part, how, options.threads)


def _layers(options: argparse.Namespace) -> Iterator[tuple[str, Layer]]:
    if options.shape:
        rank = len(options.shape) - 2
        kernel = (options.kernel or 3,) * rank
        channels = options.out_channels or options.shape[1]
        layer = Layer("shape", options.shape, channels, kernel, "", (options.stride or 1,) * rank)
        yield from (("shape", one) for one in _with_rectifiers(options, layer))
        return
    for name in options.workload or ["default"]:
        workload = WORKLOADS[name]
        for layer in workload.layers[:2] if options.quick else workload.layers:
            sized = layer if options.batch is None else replace(layer, shape=(options.batch, *layer.shape[1:]))
            if workload.fit and options.batch is None and torch.device(options.device).type == "cpu":
                sized = within(layer, CPU_FLOPS)
            yield from ((name, one) for one in _with_rectifiers(options, sized))


def _with_rectifiers(options: argparse.Namespace, layer: Layer) -> list[Layer]:
    """Those asked for, else the network's own, else all of them."""
    own = [layer.rectifier] if layer.rectifier else RECTIFIERS
    return [replace(layer, rectifier=name) for name in options.rectifier or own]


def _layer(
    options: argparse.Namespace, layer: Layer, workload: str, part: str, how: dict[str, str], threads: int
) -> Case:
    moved, computed = work(layer, part, how["mode"], getattr(torch, how["dtype"]).itemsize)
    about = {
        "workload": workload, "layer": layer.name, "part": part, "rectifier": layer.rectifier,
        "shape": _times(layer.shape), "output": _times(layer.output), "kernel": _times(layer.kernel),
        "bytes": moved, "flops": computed,
    }  # fmt: skip
    name = f"{workload} {layer.name}, {layer.rectifier}, {part}"
    return _case(options, name, "layer", how, threads, {"layer": layer.arguments(), "part": part}, about)


def _case(
    options: argparse.Namespace, name: str, build: str, how: dict[str, str], threads: int,
    arguments: dict[str, Any], about: dict[str, Any],
) -> Case:  # fmt: skip
    compiled = peers.COMPILERS if options.compile else ()
    arguments = {**arguments, **how, "device": options.device, "compiled": compiled}
    about = {**_about(options, threads), **how, **about}
    name = f"{name}, {', '.join(how.values())}"
    return Case(name, f"{PEERS}{build}", arguments, options.device, threads, about["part"] != "epilogue", about)


def _about(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """What every record says, and what it says where there is nothing to say."""
    unsaid: dict[str, Any] = dict.fromkeys(("rectifier", "mode", "shape", "output", "kernel"), "")
    return unsaid | {
        "device": options.device, "implementation": backends.name(options.device),
        "threads": threads or torch.get_num_threads(), "allocator": options.allocator, "base": options.base,
        "bytes": 0, "flops": 0,
    }  # fmt: skip


def _machine(options: argparse.Namespace) -> Case:
    """Ceilings: a copy larger than any cache, and a matrix product large enough to fill the device."""
    on_cpu = torch.device(options.device).type == "cpu"
    copied, side = (1 << 26, 1024) if on_cpu else (1 << 30, 8192)
    dtype, layout = options.dtype[0], options.layout[0]
    arguments = {"device": options.device, "copied": copied, "side": side, "dtype": dtype}
    about = _about(options, options.threads) | {
        "workload": "machine", "layer": "ceilings", "part": "machine", "dtype": dtype, "layout": layout,
        "bytes": 2 * copied, "flops": 2 * side**3,
    }  # fmt: skip
    name = "the machine's ceilings"
    return Case(name, f"{PEERS}machine", arguments, options.device, options.threads, about=about)


def _times(sizes: Any) -> str:
    return "x".join(map(str, sizes))
