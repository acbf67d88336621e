"""The specification in plain torch: what every kernel, on every path, is tested against.

`rectify` is differentiable to any order and keeps no secret about memory; `words` and `slopes` are the one rule for
random slopes (Philox4x32 with 7 rounds, Salmon et al. 2011), the same bits as the Triton and C++ kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import Norm, Parameters, Rule

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


def flat_slopes(seed: int, count: int, rule: Rule, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Slopes of the memory positions 0 .. count - 1, in float64 for float64 and else in float32 (``count``,)."""
    compute = computed_in(dtype)
    w = words(seed, 0, count, device).to(compute)
    # One rounding, as fma gives: float64 holds the product of two float32 exactly, and the sum to 2^-53.
    scale, middle = (torch.tensor(constant, dtype=compute).item() for constant in rule.constants)
    value = (w.to(torch.float64) * scale + middle).to(compute)
    return value.reciprocal() if rule.slope == "drawn divisor" else value


def slopes(seed: Tensor, like: Tensor, rule: Rule) -> Tensor:
    """The slope of each element of a dense tensor laid out as ``like``: shape and strides of ``like``."""
    out = torch.empty_like(like, dtype=computed_in(like.dtype))
    in_memory(out).copy_(flat_slopes(int(seed), like.numel(), rule, like.dtype, like.device))
    return out


# ---- one bit per element: bit i % 8 of byte i // 8 is set where the element at position i of the memory is negative


def is_negative(z: Tensor, rule: Rule) -> Tensor:
    """The negative side, with eager's choice for NaN: threshold and rrelu test z <= 0, leaky_relu and prelu z > 0."""
    return ~(z > 0) if rule.nan_is_negative else z <= 0


def pack_bits(negative: Tensor) -> Tensor:
    """A dense bool tensor as uint8 of (n + 7) // 8 bytes, in the order of its memory; unused bits are 0."""
    padded = F.pad(in_memory(negative).to(torch.uint8), (0, -negative.numel() % 8)).view(-1, 8)
    return (padded << _places(negative.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, like: Tensor) -> Tensor:
    """The bool tensor that `pack_bits` packed: shape and strides of the dense ``like``."""
    out = torch.empty_like(like, dtype=torch.bool)
    in_memory(out).copy_(((bits.view(-1, 1) >> _places(bits.device)) & 1).flatten()[: out.numel()])
    return out


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def in_memory(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory, as a view (n,)."""
    return tensor.as_strided((tensor.numel(),), (1,))


# ---- the function


def computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_bias(input: Tensor, bias: Tensor | None) -> Tensor:
    """input + bias along dim 1, in float32 for 16-bit inputs."""
    z = input.to(computed_in(input.dtype))
    return z if bias is None else z + along_channels(bias, z)


def normalize(input: Tensor, norm: Norm, bias: Tensor | None) -> Tensor:
    """norm(input) + bias as input * scale + shift, in float32 for 16-bit inputs. Ioffe and Szegedy 2015."""
    z = input.to(computed_in(input.dtype))
    scale = (along_channels(norm.var, z) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * along_channels(norm.weight, z)
    shift = (0 if bias is None else along_channels(bias, z)) - along_channels(norm.mean, z) * scale
    return z * scale + shift


def along_channels(parameter: Tensor, like: Tensor) -> Tensor:
    """A (C,) or (1,) tensor in the computation dtype of ``like``, shaped to broadcast along its dim 1."""
    parameter = parameter.to(computed_in(like.dtype))
    return parameter.view([-1] * like.dim()) if like.dim() < 2 else parameter.view(-1, *[1] * (like.dim() - 2))


def slope(z: Tensor, parameters: Parameters, rule: Rule) -> Tensor | float:
    """The negative side's slope of each element of the dense ``z``: broadcastable to it."""
    if rule.random:
        return slopes(parameters.seed, z, rule)
    return along_channels(parameters.weight, z) if rule.learned else rule.constants[0]


def rectify(input: Tensor, parameters: Parameters, rule: Rule, slopes: Tensor | None = None) -> Tensor:
    """y of the table in :mod:`fused_rect.rules`, rounded once, to the dtype of ``input``.

    slopes: a random rule's, where they are not those of the seed for ``input`` as it lies.
    """
    z = add_bias(input, parameters.bias)
    if rule.slope == "zero":
        return torch.relu(z).to(input.dtype)
    s = slope(z, parameters, rule) if slopes is None else slopes
    return torch.where(is_negative(z, rule), z * s, z).to(input.dtype)
