"""RReLU's seeds and slopes, as tensors that a user can keep, repeat and look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference, rules


def new_seed(device: torch.device | str = "cpu") -> Tensor:
    """A fresh 64-bit seed from torch's generator of ``device``: int64, shape (1,).

    ``torch.manual_seed`` repeats it, activation checkpointing restores it, CUDA graphs and ``fullgraph=True`` capture
    it: nothing is read back to the host.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def slopes(
    seed: Tensor,
    shape: Sequence[int],
    lower: float | None = None,
    upper: float | None = None,
    law: str = "slope",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The slopes that RReLU uses for a contiguous tensor of ``shape`` under ``seed``, whichever path computes it.

    seed: int64 tensor (1,). lower, upper: bounds of the law, by default (1/8, 1/3) for "slope" and (3, 8) for
    "divisor". dtype: torch.float64 for the slopes of float64 tensors; any other gives the float32 slopes that all
    narrower dtypes use. Returns a tensor of ``shape`` on the seed's device.
    """
    rule = rules.rrelu(lower, upper, law)
    like = torch.empty(tuple(shape), dtype=dtype, device=seed.device)
    return reference.slopes(seed, like, rule)
