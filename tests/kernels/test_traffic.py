"""Bytes and flops by hand, and what a profiler's hook is told of each launch."""

import pytest
import torch
import triton

from fused_rect.kernels import launch, rectify, traffic, variants


@pytest.mark.parametrize(
    ("rule", "lower", "parameters", "read", "written", "saved"),
    [
        ("relu", 0.0, {"bias": 64}, 2000 + 128, 2000, 2000),
        ("leaky_relu", 0.1, {"bias": 64}, 2000 + 128, 2000, 2000),
        ("leaky_relu", -0.1, {"bias": 64}, 2000 + 128, 2000, 2000 + 128),  # the bias is added again
        ("prelu", 0.0, {"bias": 64, "weight": 1}, 2000 + 130, 2000, 2000 + 130),
        ("rrelu", 0.1, {"bias": 64}, 2000 + 128 + 8, 2000, 2000 + 8),
        ("rrelu_divisor", 3.0, {}, 2000 + 8, 2000, 2000 + 8),
    ],
)
def test_forward_bytes(rule, lower, parameters, read, written, saved):
    call = traffic.forward(rule, 1000, 2, lower=lower, **parameters)
    assert (call.read, call.written, call.saved, call.bytes) == (read, written, saved, read + written)


def test_backward_bytes():
    leaky = traffic.backward("leaky_relu", 1000, 2, bias=64, lower=0.1, sum_bias=True)
    assert (leaky.read, leaky.written, leaky.saved) == (4000, 2000 + 128, 0)
    negative = traffic.backward("leaky_relu", 1000, 2, bias=64, lower=-0.1, sum_bias=True)
    assert negative.read == 4000 + 128
    prelu = traffic.backward("prelu", 1000, 2, bias=64, weight=64, sum_bias=True, sum_weight=True, parameter_itemsize=4)
    assert (prelu.read, prelu.written) == (4000 + 512, 2000 + 512)


def test_flops_grow_with_what_is_computed():
    assert traffic.forward("relu", 10, 4).flops == 10
    assert traffic.forward("leaky_relu", 10, 4, bias=3).flops == 30
    assert traffic.backward("prelu", 10, 4, bias=3, weight=3, sum_bias=True, sum_weight=True).flops == 60
    assert traffic.finish(100, 4) == traffic.Traffic(read=400, written=16, saved=0, flops=100)


def arguments(direction, rule, dtype):
    """The launch's arguments by name, as Triton hands them to a hook."""
    x, parameter = torch.empty(2, 4, 5, 5, dtype=dtype), torch.empty(4, dtype=dtype)
    weight = 4 if rule == "prelu" else 0
    if direction == "forward":
        call = launch.forward_call(x.shape, x.stride(), dtype, rule, 0.1, 0.2, 4, weight)
        pointers = [x, x, parameter, parameter if weight else None, None]
    else:
        call = launch.backward_call(x.shape, x.stride(), dtype, rule, 0.1, 0.2, 4, weight, True, rule == "prelu")
        added = parameter if rule == "prelu" else None
        pointers = [x, x, x, added, parameter if weight else None, None, None, None]
    return {**dict(zip(call.kernel.arg_names, [*pointers, *call.numbers])), **call.constants}


@pytest.mark.parametrize("rule", ["leaky_relu", "prelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_profiler_is_told_the_same(rule, dtype):
    weight, item = (4 if rule == "prelu" else 0), dtype.itemsize
    for direction, expected in (
        ("forward", traffic.forward(rule, 200, item, bias=4, weight=weight)),
        (
            "backward",
            traffic.backward(
                rule, 200, item, bias=4, weight=weight, lower=0.1, sum_bias=True, sum_weight=rule == "prelu"
            ),
        ),
    ):
        told = traffic.launch_metadata((1,), None, arguments(direction, rule, dtype))
        flops = "flops64" if item == 8 else "flops32"
        assert told == {"name": f"fused_rect_{direction}_{rule}", "bytes": expected.bytes, flops: expected.flops}


def _known(attributes):
    """Some versions list the arguments of which nothing is known, too."""
    return {argument: what for argument, what in attributes.items() if what}


@pytest.mark.ptx
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 5, 7, 9), (1, 3, 40, 40)])
def test_variants_are_what_a_launch_compiles(shape, layout, monkeypatch):
    """The compiler input made without tensors is the one that Triton makes from a launch."""
    if not isinstance(rectify.forward, triton.JITFunction):
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            variants.forward("relu", torch.float16, shape, layout).source()
        return
    made = []
    for kernel in (rectify.forward, rectify.backward, launch.reduce.finish):
        run = kernel.run
        monkeypatch.setattr(kernel, "run", lambda *args, run=run, **options: made.append(run(*args, **options)))
    x = torch.randn(shape).half()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    bias, weight, out = torch.randn(shape[1]).half(), torch.randn(shape[1]).half(), torch.empty_like(x)
    launch.forward(x, bias, weight, None, "prelu", 0.0, 0.0, out)
    launch.backward(x, x, bias, weight, None, "prelu", 0.0, 0.0, out, True, True)
    expected = [variants.forward("prelu", torch.float16, shape, layout)]
    expected += variants.backward("prelu", torch.float16, shape, layout)
    for compiled, variant in zip(made, expected, strict=True):
        source = variant.source()
        assert compiled.src.signature == source.signature
        assert compiled.src.constants == source.constants
        assert _known(compiled.src.attrs) == _known(source.attrs)
