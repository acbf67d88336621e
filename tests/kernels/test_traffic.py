"""Bytes and flops by hand, and what a profiler's hook is told of each launch."""

import pytest
import torch
import triton

from fused_rect.kernels import launch, rectify, traffic, variants
from fused_rect.rules import PRELU, Need, Parameters, Rule


@pytest.mark.parametrize(
    ("name", "parameters", "read", "written"),
    [
        ("relu", {"bias": 64, "bits": True}, 2000 + 128, 2000 + 125),
        ("leaky_relu", {"bias": 64}, 2000 + 128, 2000),  # inference
        ("prelu", {"bias": 64, "weight": 1}, 2000 + 130, 2000),
        ("prelu", {"bias": 64, "weight": 1, "parameter_itemsize": 4}, 2000 + 260, 2000),
        ("rrelu", {"bias": 64, "bits": True}, 2000 + 128 + 8, 2000 + 125),
        ("rrelu_divisor", {}, 2000 + 8, 2000),
    ],
)
def test_forward_bytes(name, parameters, read, written):
    call = traffic.rectify(Rule.default(name), 1000, 2, **parameters)
    assert (call.read, call.written, call.bytes) == (read, written, read + written)


@pytest.mark.parametrize(
    ("name", "parameters", "read", "written"),
    [
        ("leaky_relu", {"bits": True, "bias": 64, "need": Need(2)}, 2000 + 125, 2000 + 128),
        ("leaky_relu", {"bits": True}, 2000 + 125, 2000),
        (
            "leaky_relu",
            {"bias": 64, "need": Need(2)},
            4000 + 128,
            2000 + 128,
        ),  # the input kept, and the bias added again
        ("rrelu", {"bits": True, "bias": 64, "need": Need(2)}, 2000 + 125 + 8, 2000 + 128),
        (
            "prelu",
            {"bias": 64, "weight": 64, "parameter_itemsize": 4, "need": Need(4, True)},
            4000 + 512,
            2000 + 512,
        ),
    ],
)
def test_backward_bytes(name, parameters, read, written):
    call = traffic.rectify(Rule.default(name), 1000, 2, backward=True, **parameters)
    assert (call.read, call.written) == (read, written)


def test_flops_grow_with_what_is_computed():
    assert traffic.rectify(Rule.default("relu"), 10, 4).flops == 10
    assert traffic.rectify(Rule.default("leaky_relu"), 10, 4, bias=3).flops == 30
    prelu = traffic.rectify(PRELU, 10, 4, backward=True, bias=3, weight=3, need=Need(4, True))
    assert prelu.flops == 60
    assert traffic.finish(100, 4) == traffic.Traffic(read=400, written=16, flops=100)


@pytest.mark.parametrize("rule", [Rule.default("leaky_relu"), PRELU], ids=lambda rule: rule.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_profiler_is_told_the_same(rule, dtype):
    x, bits, parameter = (
        torch.empty(2, 4, 5, 5, dtype=dtype),
        torch.empty(25, dtype=torch.uint8),
        torch.empty(4, dtype=dtype),
    )
    flops = "flops64" if dtype.itemsize == 8 else "flops32"
    kept = {"x": x, "bits": None} if rule.learned else {"x": None, "bits": bits}
    for direction, need, tensors in (
        ("forward", Need(), {"x": x, "grad": None, "bits": kept["bits"], "bias": parameter}),
        ("backward", Need(dtype, rule.learned), {**kept, "grad": x, "bias": parameter if rule.learned else None}),
    ):
        weight = 4 if rule.learned else 0
        call = launch.rectify_call(x.shape, x.stride(), dtype, rule, tensors["bias"] is not None, weight, need)
        tensors["weight"] = parameter if rule.learned else None
        tensors.update(mean=None, var=None, norm_weight=None)
        told = traffic.launch_metadata((1,), None, {"out": x, **tensors, **call.numbers, **call.constants})
        expected = traffic.rectify(
            rule,
            200,
            dtype.itemsize,
            backward=direction == "backward",
            bits=not rule.learned,
            bias=4,
            weight=weight,
            need=need,
        )
        name = f"fused_rect_{direction}_{rule.name}"
        assert told == {"name": name, "bytes": expected.bytes, flops: expected.flops}


def test_profiler_is_told_of_a_norms_statistics():
    x, c = torch.empty(2, 4, 5, 5, dtype=torch.float16), torch.empty(4)
    rule = Rule.default("relu")
    call = launch.rectify_call(x.shape, x.stride(), x.dtype, rule, True, 0, Need(), 1e-5)
    tensors = {"out": x, "x": x, "grad": None, "bits": None, "bias": c, "weight": None, "mean": c, "var": c}
    for weight, length in ((None, 8), (c, 12)):
        arguments = {**tensors, "norm_weight": weight, **call.numbers, **call.constants}
        told = traffic.launch_metadata((1,), None, arguments)
        expected = traffic.rectify(rule, 200, 2, bias=4, norm=length, parameter_itemsize=4)
        assert told == {"name": "fused_rect_forward_relu", "bytes": expected.bytes, "flops32": expected.flops}
    assert expected.bytes == 800 + 64 and expected.flops == 600


def _known(attributes):
    """Some versions list the arguments of which nothing is known, too."""
    return {argument: what for argument, what in attributes.items() if what}


@pytest.mark.ptx
@pytest.mark.parametrize("rule", [PRELU, Rule.default("rrelu")], ids=lambda rule: rule.name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 5, 7, 9), (1, 3, 40, 40)])
def test_variants_are_what_a_launch_compiles(shape, layout, rule, monkeypatch):
    """The compiler input made without tensors is the one that Triton makes from a launch."""
    if not isinstance(rectify.rectify, triton.JITFunction):
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            variants.training_step(PRELU, torch.float16, shape, layout)
        return
    made = []
    for kernel in (rectify.rectify, launch.reduce.finish):

        def run(*args, run=kernel.run, **options):
            made.append(run(*args, **options))
            return made[-1]

        monkeypatch.setattr(kernel, "run", run)
    launch._known_call.cache_clear()
    launch.finish_call.cache_clear()
    x = torch.randn(shape).half()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    bias, weight, out = torch.randn(shape[1]).half(), torch.randn(shape[1]).half(), torch.empty_like(x)
    parameters = Parameters(bias, weight if rule.learned else None, torch.tensor([1]) if rule.random else None)
    bits = None if rule.keeps_input else torch.empty(-(-x.numel() // 8), dtype=torch.uint8)
    launch.forward(x, parameters, rule, out, bits)
    kept, parameters = (x, parameters) if bits is None else (bits, parameters._replace(bias=None))
    launch.backward(x, kept, parameters, rule, out, Need(torch.float16, rule.learned))
    expected = variants.training_step(rule, torch.float16, shape, layout)
    for compiled, variant in zip(made, expected, strict=True):
        source = variant.source()
        assert compiled.src.signature == source.signature
        assert compiled.src.constants == source.constants
        assert _known(compiled.src.attrs) == _known(source.attrs)
