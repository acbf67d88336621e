"""Tensors of more than 2^31 elements: every element against torch's own, a part of the memory after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_rect import backends, reference, rules
from fused_rect.rules import Need, Parameters, Rule

PART = 1 << 24  # elements that are compared at once: a random rule's words take 60 bytes each
SEED = 12345
SUMS = 1e-5  # of an element, on average: float32 sums of 2^29 of them


def large(device: str, elements: int) -> Iterator[dict[str, Any]]:
    """Each rule on ``elements`` and some more in bfloat16, one image of four channels with an odd plane."""
    plane = elements // 4 + 1 | 1
    for name in rules.RULES:
        rule = Rule.default(name)
        yield {"case": f"{name}, {4 * plane:,} elements", **_wrong(device, rule, plane)}


def _wrong(device: str, rule: Rule, plane: int) -> dict[str, Any]:
    shape, dtype = (1, 4, plane), torch.bfloat16
    bias, weight = (torch.tensor(v, device=device, dtype=dtype) for v in ([0.5, -1, 2, -3], [0.25, 0.5, -1, 2]))
    seed = torch.tensor([SEED], device=device) if rule.random else None
    parameters = Parameters(bias, weight if rule.learned else None, seed)
    x = torch.empty(shape, device=device, dtype=dtype).normal_()
    x[0, :, -1] = -5  # the last element of every plane counts in its sums
    grad = torch.ones(shape, device=device, dtype=dtype)
    out, bits = torch.empty_like(x), torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=device)
    module = backends.resolve(torch.device(device).type)
    module.forward(x, parameters, rule, out, bits)
    kept, of_backward = (x, parameters) if rule.keeps_input else (bits, parameters._replace(bias=None))
    grad_bias, _ = module.backward(grad, kept, of_backward, rule, grad, Need(torch.float32, rule.learned))
    wrong, sums = 0, torch.zeros(4, dtype=torch.float64, device=device)
    for start in range(0, x.numel(), PART):
        part = slice(start, start + PART)
        channel = torch.arange(start, min(start + PART, x.numel()), device=device) // plane
        forward, backward = _expected(x.view(-1)[part], channel, parameters, rule, start)
        wrong += int((out.view(-1)[part] != forward).sum()) + int((grad.view(-1)[part] != backward.to(dtype)).sum())
        sums.index_add_(0, channel, backward.double())
    assert grad_bias is not None
    error = float(((grad_bias.double() - sums).abs() / plane).max())
    return {"ok": wrong == 0 and error < SUMS, "wrong elements": wrong, "sums' error an element": error}


def _expected(x: Tensor, channel: Tensor, parameters: Parameters, rule: Rule, start: int) -> tuple[Tensor, Tensor]:
    """Output and, for a gradient of 1, the input's gradient before it is rounded; ``x`` lies from ``start`` on."""
    each = Parameters(*(None if p is None else p[channel] for p in parameters[:2]))  # every element its own channel
    x = x.view(1, -1)
    z = reference.add_bias(x, each.bias)
    slopes: Any = _slopes(rule, start, x) if rule.random else reference.slope(z, each, rule)
    forward, negative = reference.rectify(x, each, rule, slopes), reference.is_negative(z, rule)
    return forward.view(-1), torch.where(negative, slopes, 1.0).view(-1)


def _slopes(rule: Rule, start: int, x: Tensor) -> Tensor:
    """As :func:`reference.flat_slopes` has them, from the position ``start`` on, a multiple of 4."""
    counters = torch.arange(start // 4, -(-(start + x.numel()) // 4), device=x.device)
    words = torch.stack(reference.philox(counters, SEED), dim=1).flatten()[: x.numel()].to(torch.int32)
    scale, middle = (torch.tensor(constant).item() for constant in rule.constants)  # rounded to float32
    value = (words.double() * scale + middle).float()
    return value.reciprocal() if rule.slope == "drawn divisor" else value
