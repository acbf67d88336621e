"""The ops as compiled graphs call them (kernels/direct/ops.h): C++'s results are Python's, and it leaves the rest."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_cpp import BACKEND, DEVICE, MARKS, on_cpu
from rectifying import RULES
from torch import nn
from torch._subclasses import FakeTensorMode

import fused_rect as fr
from fused_rect import ops
from fused_rect.compile.in_place import rectify_backward_
from fused_rect.ops import autograd
from fused_rect.rules import PRELU, Rule, leaky_relu

pytestmark = MARKS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEAKY, RRELU = leaky_relu(0.1), Rule.default("rrelu")
BITS = [rule for rule in RULES.values() if not rule.keeps_input]
NO_WEIGHT = torch.float32, False  # the bias's gradient is wanted, no slope's


@pytest.fixture(autouse=True)
def forced():
    with fr.backend(BACKEND):
        yield


@pytest.fixture
def in_python(monkeypatch):
    """The ops that Python's kernels were called with."""
    called = []
    below, derivative_wanted = ops.below_autograd, autograd._no_derivative_wanted
    monkeypatch.setattr(ops, "below_autograd", lambda op, *args: called.append(op) or below(op, *args))
    monkeypatch.setattr(
        autograd, "_no_derivative_wanted", lambda *tensors: called.append("autograd") or derivative_wanted(*tensors)
    )
    return called


def tensors_of(rule, shape, dtype, last=False, wide=False, has_bias=True):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else x
    parameters, channels = torch.float32 if wide else dtype, shape[1] if len(shape) > 1 else 1
    bias = torch.randn(channels, device=DEVICE).to(parameters) if has_bias and len(shape) > 1 else None
    weight = torch.rand(channels, device=DEVICE).to(parameters) if rule.learned else None
    return x, bias, weight, torch.tensor([77], device=DEVICE) if rule.random else None


def both(op, *args):
    """Results and arguments of the op and of Python's kernel for it, as two lists of tensors."""
    found = []
    for function in (op, ops.KERNELS[op][0]):
        given = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        out = function(*given)
        out = () if out is None else out if isinstance(out, tuple) else (out,)
        found.append([*out, *(a for a in given if isinstance(a, torch.Tensor))])
    return found


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


cases = {
    "shape": st.sampled_from([(7,), (4, 3), (2, 3, 5), (2, 3, 5, 7), (1, 8, 8, 8), (1, 2, 1, 1, 3)]),
    "dtype": st.sampled_from(DTYPES), "last": st.booleans(), "wide": st.booleans(), "has_bias": st.booleans(),
}  # fmt: skip


@settings(max_examples=200 if DEVICE == "cpu" else 40)
@given(**cases, rule=st.sampled_from(list(RULES.values())), bias_added=st.booleans(), in_place=st.booleans())
def test_rectify(shape, dtype, last, wide, has_bias, rule, bias_added, in_place):
    tensors = tensors_of(rule, shape, dtype, last, wide and dtype.itemsize == 2, has_bias)
    assert_same(*both(ops.rectify_ if in_place else ops.rectify, *tensors, *rule, bias_added))


@settings(max_examples=200 if DEVICE == "cpu" else 40)
@given(
    **cases, rule=st.sampled_from(BITS), bias_added=st.booleans(), in_place=st.booleans(),
    layout=st.sampled_from(["none", "its own", "the other"]),
)  # fmt: skip
def test_rectify_bits(shape, dtype, last, wide, has_bias, rule, bias_added, in_place, layout):
    x, *rest = tensors_of(rule, shape, dtype, last, wide and dtype.itemsize == 2, has_bias)
    other = torch.empty_like(x, memory_format=torch.contiguous_format if last else torch.preserve_format)
    stride = {"none": None, "its own": x.stride(), "the other": other.stride()}[layout]
    assert_same(*both(ops.rectify_bits_ if in_place else ops.rectify_bits, x, *rest, *rule, bias_added, stride))


@settings(max_examples=200 if DEVICE == "cpu" else 40)
@given(
    **cases, rule=st.sampled_from(list(RULES.values())), need_bias=st.booleans(), need_weight=st.booleans(),
    layout=st.sampled_from(["none", "its own", "expanded"]),
)  # fmt: skip
def test_rectify_backward(shape, dtype, last, wide, has_bias, rule, need_bias, need_weight, layout):
    x, bias, weight, seed = tensors_of(rule, shape, dtype, last, wide and dtype.itemsize == 2, has_bias)
    grad = torch.randn_like(x)
    stride = None if layout == "none" else x.stride()
    if layout == "expanded":
        grad = grad.flatten()[:1].expand(shape)
    kept = x if rule.keeps_input else ops.rectify_bits(x, bias, weight, seed, *rule)[1]
    parameters = (bias if rule.keeps_input else None), weight, seed
    need = (bias.dtype if need_bias and bias is not None else None), need_weight and rule.learned
    if layout == "expanded" and not rule.keeps_input:
        expected = ops.KERNELS[ops.rectify_backward][0](grad, kept, *parameters, *rule, *need, stride)
        assert_same(ops.rectify_backward(grad, kept, *parameters, *rule, *need, stride), expected)
        return
    got, expected = both(ops.rectify_backward, grad.contiguous() if layout == "expanded" else grad, kept,
                         *parameters, *rule, *need, stride)  # fmt: skip
    assert_same(got, expected)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=str)
def test_backward_in_place(rule, last, in_python):
    x, bias, weight, seed = tensors_of(rule, (2, 3, 5, 7), torch.float32, last)
    grad = torch.randn_like(x)
    kept = x if rule.keeps_input else ops.rectify_bits(x, bias, weight, seed, *rule)[1]
    arguments = kept, (bias if rule.keeps_input else None), weight, seed, *rule, torch.float32, rule.learned, x.stride()
    expected = ops.KERNELS[ops.rectify_backward][0](grad, *arguments)
    given, version = grad.clone(), grad._version
    sums = rectify_backward_(given, *arguments)
    assert_same((given, *sums), expected)
    assert not in_python and grad._version == version
    if last:  # a gradient of another layout than the output's is written where it lies
        given = grad.contiguous()
        sums = rectify_backward_(given, *arguments)
        assert torch.equal(given, expected[0]) and all(torch.equal(a, b) for a, b in zip(sums, expected[1:]))


def test_python_is_not_asked(in_python):
    x, bias, *_ = tensors_of(LEAKY, (2, 3, 4, 4), torch.float32)
    for op in (ops.rectify, ops.rectify_):
        op(x, bias, None, None, *LEAKY)
    ops.rectify_bits(x, bias, None, None, *LEAKY)
    bits = ops.rectify_bits_(x, bias, None, None, *LEAKY, True, x.stride())
    ops.rectify_backward(x, bits, None, None, None, *LEAKY, *NO_WEIGHT, x.stride())
    assert not in_python


def test_versions_count_what_is_written():
    x, bias, *_ = tensors_of(LEAKY, (2, 3, 4), torch.float32)
    for op in (ops.rectify_, ops.rectify_bits_):
        version = x._version
        op(x, bias, None, None, *LEAKY)
        assert x._version == version + 1


def test_another_implementation_is_python_to_call(in_python):
    x, bias, *_ = tensors_of(LEAKY, (2, 3, 4), torch.float32)
    y = ops.rectify(x, bias, None, None, *LEAKY)
    with fr.backend("eager"):
        assert torch.equal(ops.rectify(x, bias, None, None, *LEAKY), y) and in_python
    in_python.clear()
    ops.rectify(x, bias, None, None, *LEAKY)
    assert not in_python


def test_derivatives_are_python_s(in_python):
    x, bias, *_ = tensors_of(LEAKY, (2, 3, 4), torch.float32)
    y = ops.rectify(x.requires_grad_(), bias, None, None, *LEAKY)
    assert in_python and torch.autograd.grad(y.sum(), x)[0].ne(0).all()
    assert torch.func.jvp(lambda x: ops.rectify(x, bias, None, None, *LEAKY), (x.detach(),), (x.detach(),))[1].any()
    in_python.clear()
    with torch.no_grad():
        ops.rectify(x, bias, None, None, *LEAKY)
    assert not in_python


@on_cpu
def test_a_process_that_compiles_first_is_without_python_too():
    code = """
import torch
from torch import nn
model = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU()), backend="fused_rect")
x = torch.randn(1, 3, 32, 32)
model(x).sum().backward()
from fused_rect.ops import autograd
autograd._no_derivative_wanted = None
model(x).sum().backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "FUSED_RECT_BACKEND": ""})


@on_cpu
def test_a_process_may_trace_before_it_runs_anything():
    """What tensors usually are must not be learnt from those of a mode."""
    code = """
import torch
from torch._subclasses import FakeTensorMode
from fused_rect import backends, ops
from fused_rect.ops import autograd
backends.direct(torch.empty(0))
with FakeTensorMode():
    bits = ops.rectify_bits(torch.randn(2, 3, 4), None, None, None, "relu", 0.0, 0.0)[1]
    ops.rectify_backward(torch.randn(2, 3, 4), bits, None, None, None, "relu", 0.0, 0.0, None, False)
autograd._no_derivative_wanted = None
_, bits = ops.rectify_bits(torch.randn(2, 3, 4), None, None, None, "relu", 0.0, 0.0)
ops.rectify_backward(torch.randn(2, 3, 4), bits, None, None, None, "relu", 0.0, 0.0, None, False)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_unusual():
    x, bias, *_ = tensors_of(LEAKY, (2, 3, 4), torch.float32)
    with FakeTensorMode() as mode:
        out, bits = ops.rectify_bits(mode.from_tensor(x), mode.from_tensor(bias), None, None, *LEAKY)
    assert out.shape == x.shape and bits.shape == (3,)
    expected = torch.nn.functional.leaky_relu(x + bias.view(-1, 1), 0.1)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)[:, :, ::2]
    assert torch.equal(ops.rectify(strided, bias, None, None, *LEAKY), expected[:, :, ::2])
    assert ops.rectify(x[:0], bias, None, None, *LEAKY).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bias": torch.randn(2)}, RuntimeError, "bias must have shape"),
        ({"rule": Rule("gelu", 0.0, 0.0)}, ValueError, "rule must be one of"),
        ({"rule": RRELU}, RuntimeError, "seed must be an int64 tensor"),
        ({"rule": PRELU}, RuntimeError, "weight is required"),
    ],
)  # fmt: skip
def test_mistakes_have_python_s_words(change, error, words):
    x = torch.randn(2, 3, 4, device=DEVICE)
    bias, rule = change.get("bias", torch.randn(3)).to(DEVICE), change.get("rule", LEAKY)
    for op in (ops.rectify, ops.rectify_, ops.rectify_bits_):
        before = x.clone()
        with pytest.raises(error, match=words):
            op(x, bias, None, None, *rule)
        assert torch.equal(x, before)


def test_zeros_of_both_signs_are_bounds_of_their_own():
    x = -torch.ones(2, 3, device=DEVICE)
    for slope in (0.0, -0.0, 0.0):
        y = ops.rectify(x, None, None, None, "leaky_relu", slope, slope)
        assert torch.equal(torch.signbit(y), torch.signbit(x * slope))


@pytest.mark.parametrize("count", [2, 4])  # from four on, convolutions on a CPU are channels_last
@pytest.mark.parametrize("rectifier", [nn.LeakyReLU(0.2), nn.RReLU()], ids=lambda m: type(m).__name__)
def test_a_compiled_step_is_without_python(rectifier, count, in_python):
    model = nn.Sequential(*(m for _ in range(count) for m in (nn.Conv2d(4, 4, 3), rectifier))).to(DEVICE)
    x = torch.randn(2, 4, 11, 11, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fused_rect")
    compiled(x).sum().backward()
    in_python.clear()
    compiled(x).sum().backward()
    assert not in_python
