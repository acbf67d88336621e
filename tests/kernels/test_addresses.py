"""Addresses past 2^31 elements and Philox counters past 2^32, without that memory.

The tensors are sparse files, of which only the touched pages exist; of the millions of programs only the first and the
last run, by an offset on their program ids.
"""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
import triton
from test_plan import partial_of

from fused_rect import reference
from fused_rect.kernels import launch, rectify
from fused_rect.kernels.plan import VECTOR
from fused_rect.rules import PRELU, Need, Parameters, rrelu

pytestmark = pytest.mark.ptx

BEYOND = 2**31


@pytest.fixture
def sparse(tmp_path):
    """Zeros of any size: pages that nobody writes take no memory and no disk."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("the files are host memory; the PTX machine runs the same code on it")

    def make(size, dtype):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.bin"
        kind = {torch.float16: np.float16, torch.uint8: np.uint8}[dtype]
        try:
            return torch.from_numpy(np.memmap(path, dtype=kind, mode="w+", shape=(size,)))
        except OSError as error:
            pytest.skip(f"no sparse file of {size} elements here: {error}")

    return make


@pytest.fixture
def run(monkeypatch):
    """run(call, first, count, **tensors): programs first .. first + count - 1 of a launch."""
    shifted = [0]
    if isinstance(rectify.rectify, triton.JITFunction):
        machine = sys.modules.get("ptxgpu.machine")
        if machine is None:
            pytest.skip("program ids can be shifted in the interpreter and in the PTX machine only")
        special = machine.Chunk.sreg
        monkeypatch.setattr(
            machine.Chunk,
            "sreg",
            lambda self, name: special(self, name) + np.uint32(shifted[0] if name == "ctaid.x" else 0),
        )
        monkeypatch.setattr(machine.config, "check_global_races", False)  # its maps hold every byte
    else:
        from triton.runtime import interpreter

        program_id = interpreter.InterpreterBuilder.create_get_program_id

        def shifted_id(self, axis):
            handle = program_id(self, axis)
            handle.data = handle.data + np.int32(shifted[0] if axis == 0 else 0)
            return handle

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", shifted_id)
        # It would copy each argument onto itself, every page of it.
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda self, *args: None)

    def launch_some(call, first, count, **tensors):
        shifted[0] = first
        names = "x", "grad", "out", "bits", "bias", "weight", "seed", "partials", "mean", "var", "norm_weight"
        dataclasses.replace(call, grid=(count,), compiled={})(*map(tensors.get, names))
        shifted[0] = 0

    return launch_some


def dense(flat, shape, layout):
    if layout == "contiguous":
        return flat.view(shape)
    n, c, *rest = shape
    return flat.view(n, *rest, c).movedim(-1, 1)


# An odd period in both layouts, so that there is a tail, and one row of more than 2^31 elements (64-bit places in it),
# with and without a vector of two channels in the last tiles.
LARGE = [
    ((6_900_000, 5, 9, 7), "contiguous"),
    ((6_900_000, 5, 9, 7), "channels_last"),
    ((1, 3, 2**30 + 5), "contiguous"),
    ((1, 240_002, 9001), "contiguous"),
]


def last_tiles(p):
    """(programs, first position) of the last chunk of rows, or of a single row's last two tiles."""
    if p.rows > 1:
        return p.columns, (p.chunks - 1) * p.depth * p.down * p.row * VECTOR
    return 2, (p.columns - 2) * p.beside * p.across * VECTOR


def untouched(flat, start, p):
    """Nothing was written just before ``start``, nor where 32-bit positions would have put it."""
    tile = p.depth * p.down * p.row * VECTOR if p.rows > 1 else p.beside * p.across * VECTOR
    places = {start - 2**18, start - BEYOND, start % BEYOND, start - 2**32}
    return not any(flat[place : place + 2**16].any() for place in places if place >= tile)


@pytest.mark.parametrize(("shape", "layout"), LARGE)
@pytest.mark.parametrize("rule", [PRELU, rrelu(0.125, 0.375, "slope")], ids=lambda rule: rule.name)
def test_past_two_to_the_31(sparse, run, shape, layout, rule):
    torch.manual_seed(0)
    size, channels = math.prod(shape), shape[1]
    parameters = Parameters(
        torch.randn(channels).half(),
        torch.randn(channels).half() if rule.learned else None,
        torch.tensor([77]) if rule.random else None,
    )
    x, out, grad, grad_input = (sparse(size, torch.float16) for _ in range(4))
    bits = None if rule.keeps_input else sparse(-(-size // 8), torch.uint8)
    like = shape, dense(x, shape, layout).stride(), torch.float16, rule
    weights = channels if rule.learned else 0
    forward = launch.rectify_call(*like, True, weights, Need())
    backward = launch.rectify_call(*like, rule.learned, weights, Need(torch.float16, rule.learned))
    p = forward.plan
    assert size > BEYOND and p.index_64 == (p.rows == 1)
    count, start = last_tiles(p)
    assert start > BEYOND
    for flat in (x, grad):
        flat[start:] = torch.randn(size - start).half()

    # In float32, as the kernels compute; the end of a tensor begins an image or lies in the last channel.
    position = torch.arange(start, size)
    channel = position // p.inner % channels
    z = x[start:].float() + parameters.bias.float()[channel]
    if rule.learned:
        slope = parameters.weight.float()[channel]
    else:
        slope = (reference.words(77, start, size - start).float().double() * (0.25 * 2.0**-32) + 0.25).float()

    first_and_last = ((0, 1), (p.programs - count, count))  # the first one does the tail
    for programs in first_and_last:
        run(forward, *programs, x=x, out=out, bits=bits, **parameters._asdict())
    assert torch.equal(out[start:], torch.where(z > 0, z, z * slope).half())
    assert untouched(out, start, p)
    if bits is not None:
        assert torch.equal(bits[start // 8 :], reference.pack_bits(z <= 0))
        assert not bits[start // 8 - 2**12 : start // 8].any()

    sums = 1 + rule.learned
    partials = torch.zeros(sums, p.partials)
    tensors = {"grad": grad, "out": grad_input, "partials": partials, **parameters._asdict()}
    tensors.update({"x": x} if rule.learned else {"x": None, "bits": bits, "bias": None})
    for programs in first_and_last:
        run(backward, *programs, **tensors)
    g = grad[start:].float()
    terms = torch.where(z > 0, g, g * slope)
    assert torch.equal(grad_input[start:], terms.half())
    assert untouched(grad_input, start, p)
    for which, summands in enumerate([terms, torch.where(z > 0, 0.0, g * z)][:sums]):
        whole = size - start - p.tail
        tiles = p.chunks * p.entries
        expected = np.zeros(tiles)
        np.add.at(expected, partial_of(p, position[:whole].numpy()), summands[:whole].double().numpy())
        torch.testing.assert_close(partials[which, :tiles].double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-3)
        assert torch.equal(partials[which, tiles:][: p.tail], summands[whole:])


def test_counters_past_two_to_the_32(sparse, run):
    """Past 2^34 elements the second counter word is 1; a counter that lost it would repeat the first slopes."""
    shape = (2**16 + 2, 64, 64, 64)
    size = math.prod(shape)
    x, out, bits = sparse(size, torch.float16), sparse(size, torch.float16), sparse(size // 8, torch.uint8)
    rule, seed = rrelu(0.0, 1.0, "slope"), torch.tensor([5])
    like = shape, dense(x, shape, "contiguous").stride(), torch.float16, rule
    call = launch.rectify_call(*like, False, 0, Need())
    tile = call.plan.beside * call.plan.across * VECTOR
    assert call.plan.rows == 1 and call.plan.counter_64
    start, stop = 2**34 - tile, 2**34 + tile
    x[start:stop:2], x[start + 1 : stop : 2] = -1, 1
    run(call, start // tile, 2, x=x, out=out, bits=bits, bias=None, weight=None, seed=seed)

    def slopes(first):
        return (reference.words(5, first, stop - start).float().double() * 2.0**-32 + 0.5).half()[::2]

    assert torch.equal(-out[start:stop:2], slopes(start))
    assert not torch.equal(-out[2**34 : stop : 2], slopes(0)[: tile // 2])
    assert not out[:tile].any() and not out[stop : stop + tile].any()
    assert (bits[start // 8 : stop // 8] == 0b01010101).all() and not bits[: tile // 8].any()

    back = launch.rectify_call(*like, False, 0, Need())
    run(back, start // tile, 2, x=None, grad=x, out=out, bits=bits, bias=None, weight=None, seed=seed)
    assert torch.equal(-out[start:stop:2], slopes(start))
    assert torch.equal(out[start + 1 : stop : 2], x[start + 1 : stop : 2])
