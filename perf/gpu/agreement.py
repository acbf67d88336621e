"""The kernels on the device against the eager path on the CPU: values, gradients, sums, bits."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

import fused_rect as fr
from fused_rect import rules
from fused_rect.backends import eager
from fused_rect.rules import Need, Parameters, Rule

from .pool import pooled

# Rules, and whether they learn one slope for all channels. Slopes of either sign.
RULES = (
    *((Rule.default(name), False) for name in rules.RULES),
    *((Rule.default(name), True) for name, row in rules.RULES.items() if row.slope == "learned"),
    *((rule, False) for rule in (rules.leaky_relu(-0.5), rules.rrelu(-0.5, 0.5, "slope"))),
)
# Planes of whole vectors, of parts, and smaller than a vector; one row of tiles and several; ragged last vectors.
SHAPES = (
    *((2, 3, 5, 7), (5, 7, 13, 11), (40, 12, 5, 3), (24, 5, 6, 6), (12, 3, 24, 9)),
    *((6, 24, 16, 16), (3, 2, 64, 33), (4, 51, 29, 31), (33, 10)),
)
DTYPES = ("bfloat16", "float32", "float16", "float64")
LAYOUTS = ("contiguous", "channels_last")
Case = tuple[tuple[Rule, bool], str, str, tuple[int, ...]]
Report = dict[str, Any]
DIFFERENCES = ("forward", "grad_input", "sums")


def cases(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str]) -> list[Case]:
    """Each rule on each shape in each dtype and layout, the dtypes one after the other."""
    every = product(dtypes, LAYOUTS, shapes, RULES)
    return [(rule, dtype, layout, shape) for dtype, layout, shape, rule in every
            if layout == "contiguous" or len(shape) == 4]  # fmt: skip


def agreement(device: str, among: Sequence[Case]) -> Iterator[Report]:
    """A row for each case that is wrong, and one for each dtype and layout with the worst of its differences."""
    groups: dict[str, list[Report]] = {}
    for row in pooled(functools.partial(_tried, device=device), among, worth=20):
        groups.setdefault(f"{row['dtype']}, {row['layout']}", []).append(row)
        if not row["ok"]:
            yield row
    for name, rows in groups.items():
        compared = [row for row in rows if "raised" not in row]
        worst = {key: max((row[key] for row in compared), default=float("nan")) for key in DIFFERENCES}
        yield {
            "ok": all(row["ok"] for row in rows),
            "case": name,
            "cases": len(rows),
            "worst, in what is allowed": worst,
        }


def _tried(case: Case, device: str) -> Report:
    (rule, shared), dtype, layout, shape = case
    name = f"{rule.name} {rule.lower:.3g} {rule.upper:.3g}{', shared' if shared else ''}"
    about: Report = {"case": name, "dtype": dtype, "layout": layout, "shape": list(shape)}
    try:
        found = differences(*case, device=device)
    except Exception as error:
        return {"ok": False, **about, "raised": f"{type(error).__name__}: {error}"}
    return {"ok": max(found.values()) <= 1, **about, **found}


def differences(
    rule_and_shared: tuple[Rule, bool], dtype: str, layout: str, shape: tuple[int, ...], device: str
) -> dict[str, float]:
    """The largest differences over what is allowed: two roundings of the dtype, and for sums those of adding."""
    rule, shared = rule_and_shared
    number = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(shape, generator=generator, device="cpu").to(number) for _ in range(2))
    bias, weight = (torch.randn(shape[1], generator=generator, device="cpu").to(number) for _ in range(2))
    x[-1] = -bias.view(-1, *[1] * (x.dim() - 2))  # z = 0 in the last example; NaN and infinities in the first
    corner = (0,) * (x.dim() - 2)
    for channel, value in ((0, float("nan")), (shape[1] // 2, float("-inf")), (-1, float("inf"))):
        x[0, channel][corner] = value
    if layout == "channels_last":
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    weight = weight[:1] if shared else weight
    given = [x, g, bias, weight, torch.tensor([-1234567890123456789])]

    def call(module: Any, where: str) -> tuple[Tensor, list[Tensor]]:
        x, grad, bias, weight, seed = (t.to(where, copy=True) for t in given)
        parameters = Parameters(bias, weight if rule.learned else None, seed if rule.random else None)
        out, bits = x.clone(), torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=where)
        module.forward(out, parameters, rule, out, bits)
        kept, of_backward = (x, parameters) if rule.keeps_input else (bits, parameters._replace(bias=None))
        sums = module.backward(grad, kept, of_backward, rule, grad, Need(number, rule.learned))
        return bits.cpu(), [t.cpu() for t in (out, grad, *sums) if t is not None]

    with fr.backend("triton"):
        bits, fused = call(fr.backends.resolve(torch.device(device).type), device)
    expected_bits, expected = call(eager, "cpu")
    accumulated = 16 * torch.finfo(torch.promote_types(number, torch.float32)).eps
    counts = [0, 0, x.numel() // shape[1], x.numel() // weight.numel()]
    step = torch.finfo(number).eps
    bits_differ = not torch.equal(bits, expected_bits)
    over = [
        _over(a.double(), b.double(), 2 * step * b.double().abs() + step**2 + accumulated * count**0.5)
        for a, b, count in zip(fused, expected, counts)
    ]
    return dict(zip(DIFFERENCES, (float("inf") if bits_differ else over[0], over[1], max(over[2:]))))


def _over(a: Tensor, b: Tensor, allowed: Tensor) -> float:
    """The largest difference, in what is allowed; NaN where the other has none is infinitely wrong."""
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs() / allowed).nan_to_num(nan=float("inf")).max())
