"""The specification in plain torch: what every kernel, on every path, is tested against.

`rectify` is differentiable to any order and keeps no secret about memory; `words` and `slopes` are the one rule for
random slopes (Philox4x32 with 7 rounds, Salmon et al. 2011), the same bits as the Triton and C++ kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
# Counters a pass: 32768 int64 are 256 KB, so the rounds' temporaries stay in the second-level cache.
CHUNK = 32768


def philox(counters: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 of each 64-bit counter under the 64-bit ``seed``: four int64 tensors that hold uint32 words."""
    c0, c1 = counters & MASK, (counters >> 32) & MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        # The 64-bit products wrap in int64, which keeps their bits; the mask drops the copied sign of the high half.
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((b >> 32) & MASK) ^ c1 ^ k0, b & MASK, ((a >> 32) & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def words(seed: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random words of the memory positions start .. start + count - 1 as int32 (``count``,)."""
    first, last = start // 4, -(-(start + count) // 4)
    out = torch.empty(((last - first) * 4,), dtype=torch.int32, device=device)
    for chunk in range(first, last, CHUNK):
        counters = torch.arange(chunk, min(chunk + CHUNK, last), dtype=torch.int64, device=device)
        block = torch.stack(philox(counters, seed), dim=1).flatten()
        out[(chunk - first) * 4 : (chunk - first) * 4 + block.numel()] = block.to(torch.int32)
    return out[start - first * 4 : start - first * 4 + count]


def flat_slopes(
    seed: int, count: int, lower: float, upper: float, law: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Slopes of the memory positions 0 .. count - 1, in float64 for float64 and else in float32 (``count``,)."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    w = words(seed, 0, count, device).to(compute)
    # One rounding, as fma gives: float64 holds the product of two float32 exactly, and the sum to 2^-53.
    scale = torch.tensor((upper - lower) * 2.0**-32, dtype=compute).item()
    middle = torch.tensor((upper + lower) / 2, dtype=compute).item()
    value = (w.to(torch.float64) * scale + middle).to(compute)
    return value if law == "slope" else value.reciprocal()


def slopes(seed: Tensor, like: Tensor, lower: float, upper: float, law: str = "slope") -> Tensor:
    """The slope of each element of a dense tensor laid out as ``like``: shape and strides of ``like``."""
    out = torch.empty_like(like, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
    flat = flat_slopes(int(seed), like.numel(), lower, upper, law, like.dtype, like.device)
    out.as_strided((out.numel(),), (1,)).copy_(flat)
    return out


def add_bias(input: Tensor, bias: Tensor | None) -> Tensor:
    """input + bias along dim 1, in float32 for 16-bit inputs."""
    z = input if input.dtype == torch.float64 else input.float()
    return z if bias is None else z + along_channels(bias, z)


def along_channels(parameter: Tensor, like: Tensor) -> Tensor:
    """A (C,) or (1,) tensor in the computation dtype of ``like``, shaped to broadcast along its dim 1."""
    parameter = parameter.to(torch.float64 if like.dtype == torch.float64 else torch.float32)
    return parameter.view([-1] * like.dim()) if like.dim() < 2 else parameter.view(-1, *[1] * (like.dim() - 2))


def rectify(
    input: Tensor, bias: Tensor | None, weight: Tensor | None, slope: Tensor | None, op: str, lower: float, upper: float
) -> Tensor:
    """y of the table in :mod:`rectifiers`; ``slope`` holds RReLU's slopes. Rounded once, to the dtype of ``input``."""
    z = add_bias(input, bias)
    if op == "relu":
        y = torch.relu(z)
    elif op == "leaky_relu":
        y = torch.where(z > 0, z, z * torch.tensor(lower, dtype=z.dtype))
    elif op == "prelu":
        assert weight is not None
        y = torch.where(z > 0, z, z * along_channels(weight, z))
    else:
        assert slope is not None
        y = torch.where(z <= 0, z * slope, z)
    return y.to(input.dtype)
