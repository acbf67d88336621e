"""Our calls in a user's own `torch.profiler` trace, with the bytes and operations that they had to move and compute.

    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    print(fused_rect.perf.trace.table(profile))

They stand in the trace as `fused_rect::rectify`, `fused_rect::rectify_` (in place) and `fused_rect::rectify_backward`,
on a GPU with the kernels that they launch below them. Bytes and operations follow from the recorded shapes by the
kernels' own declaration, :mod:`fused_rect.kernels.traffic`, which Proton shows too.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch

from fused_rect.kernels import traffic
from fused_rect.rules import Need, Rule

ITEM_SIZES = {"float": 4, "double": 8, "c10::Half": 2, "c10::BFloat16": 2}
PREFIX = "fused_rect::"


def table(profile: torch.profiler.profile) -> pd.DataFrame:
    """A row for each kind of call: name, rectifier, calls, seconds, bytes, flops and GB/s, the costliest first.

    seconds are the device's where there is one, else the CPU's. Raises ValueError for a profile without shapes.
    """
    events = [event for event in profile.events() or [] if _innermost(event)]
    dtypes = _dtypes(profile) if events else {}
    rows = [_row(event, dtypes[event.id]) for event in events]
    if not rows:
        return pd.DataFrame(columns=["name", "rectifier", "calls", "seconds", "bytes", "flops", "GB/s"])
    frame = pd.DataFrame(rows).groupby(["name", "rectifier"], as_index=False).sum()
    frame["GB/s"] = frame.bytes / frame.seconds / 1e9
    return frame.sort_values("seconds", ascending=False, ignore_index=True)


def _dtypes(profile: Any) -> dict[int, list[str]]:
    """Of the arguments of each of our calls, by its id: before torch 2.12 only what an event is made of has them."""
    recorded = profile.profiler.kineto_results.events()
    return {event.correlation_id(): event.dtypes() for event in recorded if event.name().startswith(PREFIX)}


def _innermost(event: Any) -> bool:
    """The dispatcher enters an op twice, at its autograd key and below it: the inner call has no autograd in it."""
    return event.name.startswith(PREFIX) and not any(_ours(child) for child in event.cpu_children)


def _ours(event: Any) -> bool:
    return event.name.startswith(PREFIX) or any(_ours(child) for child in event.cpu_children)


def _row(event: Any, dtypes: list[str]) -> dict[str, Any]:
    if not event.input_shapes:
        raise ValueError("profile has no shapes: make it with torch.profiler.profile(record_shapes=True)")
    backward = event.name.endswith("_backward")
    # Whether a forward call makes bits, too, a trace does not record: an eighth of a byte per element is left out.
    bits = "_bits" in event.name or (backward and dtypes[1] == "unsigned char")
    # (grad,) input or what was kept, bias, weight, seed; the rule's name, which a trace does not record; its bounds;
    # in backward the bias's dtype and whether the weight's gradient is wanted.
    shapes, values = event.input_shapes[backward:], event.concrete_inputs[backward:]
    bias, weight, seed = (math.prod(shape) if shape else 0 for shape in shapes[1:4])
    name = "prelu" if weight else "rrelu" if seed else "leaky_relu" if float(values[5]) else "relu"
    shape = event.input_shapes[0]
    need = Need()
    if backward:
        need = Need(values[7], bool(values[8]))
        bias = shape[1] if need.bias is not None else bias
    elif values[7]:  # by the map before
        bias = 0
    call = traffic.rectify(
        Rule.default(name),
        math.prod(shape),
        ITEM_SIZES[dtypes[0]],
        backward=backward,
        bits=bits,
        bias=bias,
        weight=weight,
        need=need,
    )
    seconds = (event.device_time_total or event.cpu_time_total) * 1e-6
    return {
        "name": event.name, "rectifier": name, "calls": 1, "seconds": seconds, "bytes": call.bytes, "flops": call.flops,
    }  # fmt: skip
