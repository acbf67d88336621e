"""A training step in a CUDA graph: what each replay must do again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fused_rect as fr

from ..profiling.clocks import captured

Capture = Callable[[Callable[[], None]], Callable[[], Any]]


def replays(device: str, capture: Capture = captured) -> Iterator[dict[str, Any]]:
    """A training step of convolution and RReLU, captured once and replayed.

    Every replay has to draw other slopes, use the same ones in forward and backward, and move the weights.
    """
    conv = nn.Conv2d(3, 8, 3, padding=1).to(device)
    assert conv.bias is not None
    bias = conv.bias
    optimizer = torch.optim.SGD(conv.parameters(), lr=1e-3)
    x = torch.randn(4, 3, 16, 16, device=device)
    y, z, slope = (torch.zeros(4, 8, 16, 16, device=device) for _ in range(3))

    def step() -> None:
        raw = F.conv2d(x, conv.weight, None, padding=1)
        out = fr.functional.bias_rrelu(raw, bias, training=True)
        slope.copy_(torch.autograd.grad(out.sum(), raw, retain_graph=True)[0])
        y.copy_(out.detach())
        z.copy_(raw.detach() + bias.detach().view(-1, 1, 1))
        conv.weight.grad, bias.grad = torch.autograd.grad(out.square().mean(), (conv.weight, bias))
        optimizer.step()

    replay = capture(step)
    slopes, weights, agree = [], [conv.weight.detach().clone()], []
    for _ in range(3):
        replay()
        slopes.append(slope.clone())
        weights.append(conv.weight.detach().clone())
        agree.append(torch.allclose(y, z * slope, rtol=1e-5, atol=1e-6))
    negative = [(a < 1) & (b < 1) for a, b in pairwise(slopes)]
    outcome = {
        "other slopes each replay": all(
            float((a != b)[both].float().mean()) > 0.99 for (a, b), both in zip(pairwise(slopes), negative)
        ),
        "same slopes in backward": all(agree),
        "weights move each replay": not any(torch.equal(a, b) for a, b in pairwise(weights)),
    }
    yield from ({"ok": kept, "case": name} for name, kept in outcome.items())
