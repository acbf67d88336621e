"""The CPU path against eager torch: `python -m fused_rect.perf.cpu [part ...] [--compile] [--json FILE]`.

activation   the rectifier alone on a convolution's output, 16 x 64 x 56 x 56: forward, and training (forward, backward)
layer        convolution 1 x 1, 64 -> 64, with its rectifier on 16 x 64 x 56 x 56; eager / bare has the convolution
             alone below, without bias: what an epilogue that costs nothing would reach
memory       peak of live bytes of a training step of 8 such layers in a row
overhead     convolution 3 x 3, 8 -> 8, with its rectifier on 1 x 8 x 8 x 8: what a call costs besides arithmetic

Ratios are eager / fused (above 1, fused is faster), paired in interleaved rounds of fresh processes, with 95 %
intervals (:mod:`.profiling.measure`). Bandwidth counts once each tensor that a pass must read or write, beside a
copy's.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_rect as fr

from .profiling.measure import Case, Interval, Runs, Samples, measure
from .profiling.memory import peak_live_bytes

_MODULE = "fused_rect.perf.cpu"  # also where this file runs as __main__
SHAPE = (16, 64, 56, 56)
SLOPE = 0.1
RECTIFIERS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(SLOPE),
    "prelu": nn.PReLU,
    "rrelu": nn.RReLU,
}
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "relu": fr.nn.ConvReLU2d,
    "leaky_relu": lambda *a, **k: fr.nn.ConvLeakyReLU2d(*a, negative_slope=SLOPE, **k),
    "prelu": fr.nn.ConvPReLU2d,
    "rrelu": fr.nn.ConvRReLU2d,
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Tensors read or written: forward in place (PReLU in training out of place), backward grad, saved, grad_input.
STREAMS = {"forward": 2, "training": 5}


class _Output(torch.autograd.Function):
    """A convolution's output without its cost: ``buffer`` itself, as a tensor that autograd takes for a fresh one."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, buffer: Tensor) -> Tensor:
        return buffer.data

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, None]:
        return None, None


def activation(rectifier: str, dtype: str, layout: str) -> Runs:
    """Half of the elements positive, half zero: a fixed point, so that rewriting in place changes no later round."""
    torch.manual_seed(0)
    like: dict[str, Any] = {"dtype": getattr(torch, dtype), "memory_format": FORMATS[layout]}
    z = torch.randn(SHAPE).relu_().to(**like)
    grad = torch.randn(SHAPE).to(**like)
    leaf, eager = torch.zeros(1, requires_grad=True), RECTIFIERS[rectifier]().to(getattr(torch, dtype))
    weight: Any = getattr(eager, "weight", None)

    def fused(z: Tensor) -> Tensor:
        if rectifier == "prelu":
            run = fr.functional.bias_prelu if torch.is_grad_enabled() else fr.functional.bias_prelu_
            return run(z, None, weight)
        if rectifier == "rrelu":
            return fr.functional.bias_rrelu_(z, training=True)
        return fr.functional.bias_relu_(z) if rectifier == "relu" else fr.functional.bias_leaky_relu_(z, None, SLOPE)

    def forward(function: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.no_grad()(function)(z)

    def training(function: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: function(_Output.apply(leaf, z)).backward(grad)  # type: ignore[no-untyped-call]

    copy = torch.empty_like(z)
    runs: dict[str, Callable[[], Any] | str] = {"copy": lambda: copy.copy_(z)}
    for way, function in (("eager", eager), ("fused", fused)):
        runs |= {f"{way} forward": forward(function), f"{way} training": training(function)}
    try:
        eager(z[:1].clone())
    except NotImplementedError as missing:
        return {**runs, "eager forward": str(missing), "eager training": str(missing)}
    return runs


def layer(rectifier: str, small: bool, compiled: bool) -> Runs:
    """Convolution and rectifier: training step, and forward without gradients."""
    torch.manual_seed(0)
    shape, sizes = ((1, 8, 8, 8), (8, 8, 3)) if small else (SHAPE, (64, 64, 1))
    x = torch.randn(shape, requires_grad=True)
    modules: dict[str, Any] = {
        "eager": nn.Sequential(nn.Conv2d(*sizes, padding=int(small)), RECTIFIERS[rectifier]()),
        "fused": LAYERS[rectifier](*sizes, padding=int(small)),
    }
    if not small:
        modules["bare"] = nn.Conv2d(*sizes, bias=False)
    if compiled:
        modules["compiled"] = torch.compile(modules["eager"])
    runs: dict[str, Callable[[], Any] | str] = {}
    for way, module in modules.items():
        with torch.no_grad():
            direction = torch.randn_like(module(x))
        runs[f"{way} training"] = _step(module, x, direction)
        runs[f"{way} forward"] = functools.partial(torch.no_grad()(module.__call__), x)
    return runs


def _step(module: Any, x: Tensor, direction: Tensor) -> Callable[[], Any]:
    wanted = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x), wanted, direction)


def live_bytes(rectifier: str) -> dict[str, int]:
    """Peak of a training step of 8 layers in a row, each 1 x 1 with its rectifier."""
    eager = [nn.Sequential(nn.Conv2d(64, 64, 1), RECTIFIERS[rectifier]()) for _ in range(8)]
    fused = [LAYERS[rectifier](64, 64, 1) for _ in range(8)]
    return {"eager": _peak(nn.Sequential(*eager)), "fused": _peak(nn.Sequential(*fused))}


def _peak(net: nn.Module) -> int:
    x = torch.randn(SHAPE)

    def step() -> None:
        net(x).sum().backward()

    step()
    return peak_live_bytes(step)


def cases(parts: list[str], names: list[str], dtypes: list[str], layouts: list[str], compiled: bool) -> list[Case]:
    found: list[Case] = []
    if "activation" in parts:
        found += [
            Case(
                f"activation {name} {dtype} {layout}", f"{_MODULE}:activation",
                {"rectifier": name, "dtype": dtype, "layout": layout},
            )
            for layout in layouts for dtype in dtypes for name in names
        ]  # fmt: skip
    for part, small in (("layer", False), ("overhead", True)):
        if part in parts:
            arguments = {"small": small, "compiled": compiled and not small}
            found += [Case(f"{part} {n}", f"{_MODULE}:layer", {"rectifier": n, **arguments}) for n in names]
    return found


def rows(case: Case, samples: Samples) -> list[dict[str, Any]]:
    """One row a mode: times in ms, ratios, bandwidth in GB/s where the case has a copy to compare with."""
    found = []
    for mode in ("forward", "training"):
        row: dict[str, Any] = {"case": f"{case.name} {mode}"}
        for way in ("eager", "compiled", "fused"):
            if (name := f"{way} {mode}") in samples.seconds:
                row[f"{way} ms"] = round(samples.time(name).value * 1e3, 4)
                if way != "fused":
                    row[f"{way} / fused"] = _three(samples.ratio(name, f"fused {mode}"))
        if (bare := f"bare {mode}") in samples.seconds:
            row["eager / bare"] = _three(samples.ratio(f"eager {mode}", bare))
        if "copy" in samples.seconds:
            size = torch.empty(SHAPE, dtype=getattr(torch, case.arguments["dtype"]), device="meta").nbytes
            row["GB/s"] = round(size * STREAMS[mode] / samples.time(f"fused {mode}").value / 1e9, 1)
            row["copy GB/s"] = round(size * 2 / samples.time("copy").value / 1e9, 1)
        found.append(row)
    return found


def _three(ratio: Interval) -> list[float]:
    return [round(x, 3) for x in (ratio.value, ratio.low, ratio.high)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_rect.perf.cpu", description=__doc__.splitlines()[0])
    every = ("activation", "layer", "memory", "overhead")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(every)}; by default all")
    parser.add_argument("--rectifiers", nargs="+", choices=tuple(RECTIFIERS), default=list(RECTIFIERS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--layouts", nargs="+", default=["contiguous"], choices=tuple(FORMATS))
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="layers against torch.compile of the eager layer too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    options = parser.parse_args(arguments)
    parts = options.parts or list(every)
    if unknown := set(parts) - set(every):
        parser.error(f"part must be of {', '.join(every)}, got {', '.join(sorted(unknown))}")
    todo = cases(parts, options.rectifiers, options.dtypes, options.layouts, options.compile)
    measured = measure(todo, processes=options.processes, rounds=options.rounds)
    found = [row for case, samples in zip(todo, measured) for row in rows(case, samples)]
    if "memory" in parts:
        for name in options.rectifiers:
            peaks = live_bytes(name)
            mega = {f"{way} MB": round(peak / 1e6, 1) for way, peak in peaks.items()}
            found.append({"case": f"memory {name}", **mega, "fused / eager": round(peaks["fused"] / peaks["eager"], 3)})
    _print(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _print(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in found for key in row))
    table = Table(*columns)
    for row in found:
        values = (row.get(column, "") for column in columns)
        table.add_row(*(f"{v[0]:.2f} ({v[1]:.2f} to {v[2]:.2f})" if isinstance(v, list) else str(v) for v in values))
    Console(width=170).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
