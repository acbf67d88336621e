"""The ops on every path against the float64 specification: values, gradients, layouts, dtypes, edges, what is saved."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rectifying import EPSILON, LAYOUTS, RULES, arguments, assert_near, dense, specification

import fused_rect as fr
from fused_rect import ops, reference
from fused_rect.rules import RULES as TABLE

each = pytest.mark.parametrize("rule", RULES)
DTYPES = list(EPSILON)
EDGES = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3e38, -3e38, 2.0**-126, -(2.0**-126)]


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)


shapes = st.one_of(
    st.tuples(st.integers(1, 5), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)


CASES = {
    "shape": shapes,
    "layout": st.sampled_from(list(LAYOUTS)),
    "dtype": st.sampled_from(DTYPES),
    "bias": st.booleans(),
    "one_slope": st.booleans(),
    "expanded": st.booleans(),
    "in_place": st.booleans(),
}


@pytest.mark.ptx
@each
def test_value_and_gradients(path, rule):
    # The interpreter takes a tenth of a second a launch.
    examples = 4 if path == "triton" else 20

    @settings(max_examples=examples)
    @given(**CASES)
    def run(**case):
        value_and_gradients(rule, **case)

    run()


def value_and_gradients(rule, shape, layout, dtype, bias, one_slope, expanded, in_place):
    torch.manual_seed(sum(shape))
    # A grid of halves: sums are exact, and zeros, where the sides meet, are common.
    z = LAYOUTS[layout](((torch.randn(shape) * 4).round() / 2).to(dtype))
    bias, weight, *rest = arguments(rule, shape[1], dtype, bias, slopes=int(one_slope))
    if bias is not None:
        bias = (bias * 4).round() / 2
    grad = torch.randn(shape[-1:]).to(dtype).expand(shape) if expanded else torch.randn(shape).to(dtype)
    exact = specification(z, bias, weight, *rest, grad)

    leaves = [None if t is None else t.detach().requires_grad_() for t in (z, bias, weight)]
    if in_place:
        y = leaves[0].clone()
        assert y.stride() == dense(z).stride()
        ops.rectify_(y, *leaves[1:], *rest)
    else:
        y = ops.rectify(*leaves, *rest)
    assert y.stride() == dense(z).stride()
    assert_near(y, exact[0], dtype)
    wanted = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(y, wanted, grad)
    assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in wanted]
    per_channel = [d for d in range(z.dim()) if d != 1]
    magnitude = grad.double().abs() * (1 + z.double().abs() + (0 if bias is None else bias.double().abs().max()))
    assert_near(gradients[0], exact[1], dtype)
    for got, want in zip(gradients[1:], [g for g in exact[2:] if g is not None], strict=True):
        summed = magnitude.sum(per_channel) if want.numel() == shape[1] else magnitude.sum().view(1)
        assert_near(got, want, dtype, summed)


@pytest.mark.ptx
@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edge_values(path, rule, dtype):
    """Zeros of both signs, infinities, NaN, subnormals and the largest numbers, each met with each sign of gradient."""
    z = torch.tensor(EDGES, dtype=dtype).repeat(2, 1)
    _, weight, *rest = arguments(rule, z.shape[1], dtype, bias=False)
    grad = torch.tensor([[1.0], [-2.0]], dtype=dtype).expand_as(z)
    exact = specification(z, None, weight, *rest, grad)
    z.requires_grad_()
    y = ops.rectify(z, None, weight, *rest)
    (got,) = torch.autograd.grad(y, z, grad)
    assert torch.equal(y.isnan(), exact[0].isnan())
    tiny = torch.finfo(dtype).smallest_normal
    for a, b in ((y.detach(), exact[0]), (got, exact[1])):
        subnormal = (b.abs() < tiny) | (z.detach().abs() < tiny)  # which some paths flush to 0
        subnormal &= (b != 0) | (z.detach() != 0)
        assert_near(a[~subnormal], b[~subnormal], dtype)
        assert (a[subnormal & (b.abs() < tiny)].abs() <= tiny).all()
    assert ops.rectify(torch.tensor([[-math.inf]], dtype=dtype), None, None, None, "relu", 0.0, 0.0).item() == 0


@pytest.mark.ptx
@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.random])
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 5, 3)])
def test_float32_equals_eager_bit_for_bit(path, rule, shape):
    z = torch.randn(shape)
    bias, weight, *rest = arguments(rule, shape[1], z.dtype)
    total = z + bias.view(-1, *[1] * (len(shape) - 2))
    functions = {
        "zero": torch.relu,
        "constant": lambda t: torch.nn.functional.leaky_relu(t, RULES[rule].constants[0]),
        "learned": lambda t: torch.nn.functional.prelu(t, weight),
    }
    assert torch.equal(ops.rectify(z, bias, weight, *rest), functions[RULES[rule].slope](total))


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each
def test_a_float32_bias_and_slope_beside_16_bits(path, rule, dtype):
    z, grad = torch.randn(2, 3, 4).to(dtype), torch.randn(2, 3, 4).to(dtype)
    bias, weight, *rest = arguments(rule, 3, torch.float32)
    exact = specification(z, bias, weight, *rest, grad)
    leaves = [None if t is None else t.requires_grad_() for t in (z, bias, weight)]
    y = ops.rectify(*leaves, *rest)
    assert y.dtype is dtype
    assert_near(y.detach(), exact[0], dtype)
    gradients = torch.autograd.grad(y, [t for t in leaves if t is not None], grad)
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves if t is not None]
    assert_near(gradients[1], exact[2], torch.float32, summed=grad.double().abs().sum((0, 2)))


@pytest.mark.ptx
@each
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty_tensors(path, rule, shape):
    bias, weight, *rest = arguments(rule, shape[1], torch.float32, slopes=1)
    leaves = [None if t is None else t.requires_grad_() for t in (torch.empty(shape), bias, weight)]
    y = ops.rectify(*leaves, *rest)
    assert y.shape == shape
    gradients = torch.autograd.grad(y.sum(), [t for t in leaves if t is not None])
    assert all(not g.any() for g in gradients)
    assert [g.shape for g in gradients] == [t.shape for t in leaves if t is not None]


@pytest.mark.ptx
@each
@pytest.mark.parametrize("shape", [(), (5,)])
def test_without_a_channel_dim(path, rule, shape):
    z = torch.randn(shape)
    _, weight, *rest = arguments(rule, 1, z.dtype, bias=False)
    exact = specification(z, None, weight, *rest, torch.ones(shape))
    assert_near(ops.rectify(z, None, weight, *rest), exact[0], z.dtype)


@pytest.mark.ptx
@each
def test_strided_and_expanded_parameters(path, rule):
    z, grad = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    bias, weight, *rest = arguments(rule, 4, z.dtype)
    strided = torch.stack([bias, torch.full_like(bias, math.nan)], 1)[:, 0]
    expanded = torch.tensor([0.5]).expand(4)
    spread = None if weight is None else torch.stack([weight, weight + 1], 1)[:, 0]
    for odd in (strided, expanded):
        exact = specification(z, odd.contiguous(), weight, *rest, grad)
        x = z.clone().requires_grad_()
        y = ops.rectify(x, odd, spread, *rest)
        assert_near(y.detach(), exact[0], z.dtype)
        assert_near(torch.autograd.grad(y, x, grad)[0], exact[1], z.dtype)


@each
def test_negated_views(path, rule):
    """x.conj().imag is a real tensor whose memory holds the negatives."""
    complex_ = torch.randn(2, 3, 4, dtype=torch.complex64)
    z = complex_.conj().imag
    assert z.is_neg()
    bias, weight, *rest = arguments(rule, 3, z.dtype)
    assert torch.equal(ops.rectify(z, bias, weight, *rest), ops.rectify(z.clone(), bias, weight, *rest))


# ---- derivatives ----


@pytest.mark.ptx
@each
@pytest.mark.parametrize("in_place", [False, True])
def test_gradcheck_and_gradgradcheck(path, rule, in_place):
    z = torch.randn(2, 3, 2, dtype=torch.float64)
    z = z.sign() * (z.abs() + 0.2)  # not on the kink
    bias, weight, *rest = arguments(rule, 3, torch.float64)
    bias = bias * 0.05
    leaves = [t.requires_grad_() for t in (z, bias, weight) if t is not None]

    def call(z, bias, *weight):
        if not in_place:
            return ops.rectify(z, bias, *(weight or (None,)), *rest)
        z = z.clone()
        ops.rectify_(z, bias, *(weight or (None,)), *rest)
        return z

    if path == "triton" and rule not in ("prelu", "rrelu"):
        pytest.skip("the interpreter is slow; the derivatives beyond the first are torch operations and the op itself")
    fast = path == "triton"
    assert torch.autograd.gradcheck(call, leaves, fast_mode=fast)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=fast)


@each
@pytest.mark.parametrize("dynamic", [False, True])
def test_opcheck(path, rule, dynamic):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"] + ["test_aot_dispatch_dynamic"] * dynamic
    z = torch.randn(2, 3, 4, requires_grad=True)
    bias, weight, *rest = arguments(rule, 3, z.dtype)
    parameters = [None if t is None else t.requires_grad_() for t in (bias, weight)]
    torch.library.opcheck(ops.rectify, (z, *parameters, *rest), test_utils=tests)
    torch.library.opcheck(ops.rectify_, (z.detach().clone(), *parameters, *rest), test_utils=tests)
    torch.library.opcheck(ops.rectify_bits, (z, *parameters, *rest), test_utils=tests)
    torch.library.opcheck(ops.rectify_bits_, (z.detach().clone(), *parameters, *rest), test_utils=tests)
    kept = [(z.detach().clone().requires_grad_(), *parameters)]
    if not RULES[rule].keeps_input:
        kept.append((ops.rectify_bits(z.detach(), bias, None, *rest)[1], None, None))
    grad = torch.randn(2, 3, 4, requires_grad=True)
    for tensors in kept:
        for needs in ((torch.float32, tensors[2] is not None), (None, False)):
            torch.library.opcheck(ops.rectify_backward, (grad, *tensors, *rest, *needs), test_utils=tests)


def saved_bytes(call):
    """Bytes that autograd keeps for backward, each storage counted once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    return sum(kept.values()), result


@each
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 5, 7)])
def test_what_is_kept_for_backward(path, rule, in_place, shape):
    """The table of fused_rect.rules, to the byte: bits and a seed, or the input and the parameters."""
    leaf = torch.randn(shape, requires_grad=True)
    z = leaf * 1  # what a convolution gives: nobody else holds it
    bias, weight, *rest = arguments(rule, shape[1], z.dtype)
    parameters = [t.requires_grad_() if t is not None else None for t in (bias, weight)]

    def call():
        if in_place:
            ops.rectify_(z, *parameters, *rest)
            return z
        return ops.rectify(z, *parameters, *rest)

    kept, y = saved_bytes(call)
    seed = 8 if RULES[rule].random else 0
    if RULES[rule].keeps_input:
        assert kept == sum(t.numel() * t.element_size() for t in (z, *parameters) if t is not None)
        assert in_place or y.data_ptr() != z.data_ptr()
    else:
        assert kept == (z.numel() + 7) // 8 + seed


@pytest.mark.ptx
@each
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_say_which_side(path, rule, layout, dtype):
    """In the order of the memory, NaN on eager's side, unused bits 0; with them the gradients are the input's own."""
    z = LAYOUTS[layout]((torch.randn(3, 5, 7, 3) * 2).to(dtype))
    z[0, 1, :6, 0] = torch.tensor([math.nan, 0.0, -0.0, math.inf, -math.inf, 1e-30]).to(dtype)
    bias, weight, *rest = arguments(rule, 5, dtype)
    bias[1] = 0
    out, bits = ops.rectify_bits(z, bias, weight, *rest)
    total = dense(z).double() + bias.double().view(-1, 1, 1)
    negative = reference.is_negative(total, RULES[rule])
    laid_out = torch.empty_like(out, dtype=torch.bool).copy_(negative)
    assert out.stride() == dense(z).stride() and torch.equal(bits, reference.pack_bits(laid_out))
    assert torch.equal(reference.unpack_bits(bits, out), negative)
    in_place = z.clone()
    assert torch.equal(ops.rectify_bits_(in_place, bias, weight, *rest), bits) or in_place.stride() != out.stride()
    if RULES[rule].keeps_input:
        return
    grad = torch.empty_like(out).copy_(torch.randn(out.shape))
    of_bits = ops.rectify_backward(grad, bits, None, None, *rest, dtype, False)
    of_input = ops.rectify_backward(grad, dense(z), bias, None, *rest, dtype, False)
    assert all(torch.equal(a, b) for a, b in zip(of_bits, of_input, strict=True))


@each
def test_side_is_decided_in_forward(path, rule):
    """What happens to the output or the bias before backward changes nothing, as with torch's own convolutions."""
    x = torch.randn(2, 3, 4, requires_grad=True)
    bias, weight, *rest = arguments(rule, 3, x.dtype)
    grad = torch.randn(2, 3, 4)
    expected = torch.autograd.grad(ops.rectify(x, bias, weight, *rest), x, grad)
    y = ops.rectify(x, bias.requires_grad_(), weight, *rest)
    with torch.no_grad():
        y.mul_(-2)
        bias.add_(100)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected[0])


# ---- in place ----


@pytest.mark.ptx
@each
def test_in_place_writes_into_its_input(path, rule):
    z = torch.randn(2, 3, 4)
    bias, weight, *rest = arguments(rule, 3, z.dtype)
    expected, version, place = ops.rectify(z, bias, weight, *rest), z._version, z.data_ptr()
    ops.rectify_(z, bias, weight, *rest)
    assert torch.equal(z, expected) and z.data_ptr() == place and z._version > version


VIEWS = {
    "transposed": lambda t: t.transpose(0, 2),
    "a part": lambda t: t[1:],
    "reshaped": lambda t: t.view(-1, 5),
    "strided": lambda t: t[..., ::2],
    "a view of a view": lambda t: t[1:].transpose(1, 2),
}


@each
@pytest.mark.parametrize("view", VIEWS)
def test_in_place_on_a_view_with_gradients(path, rule, view):
    """Of a tensor that others go on with: theirs and the view's gradients are the ones that a copy would have."""
    x = torch.randn(4, 5, 5, dtype=torch.float64)
    bias, weight, *rest = arguments(rule, VIEWS[view](x).shape[1], torch.float64)
    found = []
    for in_place in (True, False):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, bias, weight)]
        base = leaves[0] * 2
        part = VIEWS[view](base)
        if in_place:
            ops.rectify_(part, *leaves[1:], *rest)
        else:
            part.copy_(ops.rectify(part.clone(), *leaves[1:], *rest))
        (base.cos() + 3 * base).sum().backward()
        found.append([base.detach(), *(t.grad for t in leaves if t is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.ptx
@each
def test_in_place_on_a_strided_view_leaves_the_rest(path, rule):
    whole = torch.randn(2, 3, 8)
    before, view = whole.clone(), whole[..., ::2]
    bias, weight, *rest = arguments(rule, 3, whole.dtype)
    expected = ops.rectify(view, bias, weight, *rest)
    ops.rectify_(view, bias, weight, *rest)
    assert torch.equal(view, expected) and torch.equal(whole[..., 1::2], before[..., 1::2])


@each
def test_overwriting_what_backward_needs_is_noticed(path, rule):
    x = torch.randn(2, 3, 4, requires_grad=True)
    bias, weight, *rest = arguments(rule, 3, x.dtype)
    z = x.sigmoid()  # keeps its output
    ops.rectify_(z, bias, weight, *rest)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


# ---- reproducibility ----


@pytest.mark.parametrize("threads", [1, 2, 3])
@each
def test_the_same_bits_whatever_the_threads(path, rule, threads):
    if path == "triton":
        pytest.skip("the interpreter has one thread")
    z, grad = torch.randn(4, 5, 33, 17), torch.randn(4, 5, 33, 17)
    bias, weight, *rest = arguments(rule, 5, z.dtype)

    def run():
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (z, bias, weight)]
        y = ops.rectify(*leaves, *rest)
        return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], grad)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, second = run(), run()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.ptx
@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.random])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_path_draws_the_specifications_slopes(path, rule, dtype):
    z = torch.full((3, 5, 7, 3), -1.0, dtype=dtype)
    _, _, seed, name, lower, upper = arguments(rule, 5, dtype)
    got = -ops.rectify(z, None, None, seed, name, lower, upper)
    expected = fr.random.slopes(seed, z.shape, lower, upper, TABLE[name].law, dtype)
    torch.testing.assert_close(got, expected, rtol=EPSILON[dtype], atol=EPSILON[dtype] / 8)


# ---- bad input: named, explained, and nothing written ----

META = torch.device("meta")
BAD = {
    "integer input": (
        {"input": torch.ones(2, 3, dtype=torch.int64), "bias": None},
        RuntimeError, "input must be float16, bfloat16, float32 or float64, got torch.int64; convert it with input",
    ),
    "complex input": (
        {"input": torch.ones(2, 3, dtype=torch.complex64), "bias": None}, RuntimeError, "input must be .*complex64"
    ),
    "float8 input": (
        {"input": torch.ones(2, 3).to(torch.float8_e4m3fn), "bias": None}, RuntimeError, "input must be .*float8"
    ),
    "bias of another length": (
        {"bias": torch.ones(4)}, RuntimeError, r"bias must have shape \(3,\), one value for each channel.*got \(4,\)"
    ),
    "bias of one": ({"bias": torch.ones(1)}, RuntimeError, r"bias must have shape \(3,\).*got \(1,\)"),
    "bias with two dims": ({"bias": torch.ones(3, 1)}, RuntimeError, r"bias must have shape \(3,\).*got \(3, 1\)"),
    "bias without channels": (
        {"input": torch.ones(3)}, RuntimeError, r"channels in dim 1 for a bias, got shape \(3,\); add a batch"
    ),
    "bias of another dtype": (
        {"bias": torch.ones(3, dtype=torch.float64)},
        RuntimeError, r"bias must have the dtype of input.*got torch.float64; convert it with bias.to\(input.dtype\)",
    ),
    "bias elsewhere": (
        {"bias": torch.ones(3, device=META)}, RuntimeError, "same device, but bias is on meta and input on cpu"
    ),
    "weight of another length": (
        {"weight": torch.ones(2), "rule": "prelu"},
        RuntimeError, r"weight must hold 1 or 3 values, one for each channel.*got shape \(2,\)",
    ),
    "no weight": ({"rule": "prelu"}, RuntimeError, r"weight is required: prelu's slope tensor of shape \(1,\)"),
    "weight of another dtype": (
        {"weight": torch.ones(3, dtype=torch.float16), "rule": "prelu"}, RuntimeError, "weight must have the dtype"
    ),
    "no seed": ({"rule": "rrelu"}, RuntimeError, "seed must be an int64 tensor.*got None; draw one with"),
    "a seed of another dtype": (
        {"rule": "rrelu", "seed": torch.ones(1)}, RuntimeError, "seed must be an int64 tensor.*got torch.float32"
    ),
    "two seeds": (
        {"rule": "rrelu", "seed": torch.ones(2, dtype=torch.int64)}, RuntimeError, r"seed must be .*shape \(2,\)"
    ),
    "a seed elsewhere": (
        {"rule": "rrelu", "seed": torch.ones(1, dtype=torch.int64, device=META)},
        RuntimeError, "same device, but seed is on meta and input on cpu; draw it with",
    ),
    "another rectifier": ({"rule": "gelu"}, ValueError, "rule must be one of relu, .*got 'gelu'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("train", [False, True])
def test_bad_input_is_named_before_anything_is_written(path, what, train):
    given, error, message = BAD[what]
    usual = {"input": torch.full((2, 3), -1.0), "bias": torch.ones(3), "weight": None, "seed": None}
    call = [*(usual | {"rule": "relu", "lower": 0.0, "upper": 0.0} | given).values()]
    if train and call[0].is_floating_point() and call[0].element_size() > 1:
        call[0] = (call[0].detach().requires_grad_()) * 1
    before, version = call[0].detach().float().clone(), call[0]._version
    for op in (ops.rectify, ops.rectify_):
        with pytest.raises(error, match=message):
            op(*call)
        assert torch.equal(call[0].detach().float(), before) and call[0]._version == version
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with fake, pytest.raises(error, match=message):
        ops.rectify(*call)


@pytest.mark.parametrize("overlapping", [torch.zeros(3).expand(2, 3), torch.zeros(2, 1).expand(2, 3)])
def test_in_place_on_expanded_memory(path, overlapping):
    with pytest.raises(RuntimeError, match=r"more than one element of the written-to tensor.*clone"):
        ops.rectify_(overlapping, torch.ones(3), None, None, "relu", 0.0, 0.0)
    assert not overlapping.any()


def test_in_place_on_a_leaf_and_on_a_view_of_one(path):
    leaf = torch.full((2, 3), -1.0, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"a leaf Variable that requires grad.*without the trailing underscore"):
        ops.rectify_(leaf, None, None, None, "relu", 0.0, 0.0)
    for rule in (("relu", 0.0, 0.0), ("leaky_relu", -1.0, -1.0)):
        with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
            ops.rectify_(leaf[:1], None, None, None, *rule)
    assert torch.equal(leaf, torch.full((2, 3), -1.0))


@pytest.mark.ptx
@pytest.mark.parametrize("rule", ["relu", "prelu"])
def test_parameters_that_are_views_of_the_input_they_are_added_to(path, rule):
    _, weight, *rest = arguments(rule, 4, torch.float32)
    z = torch.randn(4, 4)
    expected = ops.rectify(z, z[1].clone(), weight, *rest)
    ops.rectify_(z, z[1], weight, *rest)
    assert torch.equal(z, expected)


RELU = RULES["relu"]


def test_a_gradient_of_another_shape_or_dtype(path):
    kept = torch.ones(2, 3)
    for grad in (torch.ones(3), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="grad must have the shape, dtype and device of the input that is kept"):
            ops.rectify_backward(grad, kept, None, None, None, *RELU, None, False)


@pytest.mark.parametrize(
    ("grad", "size", "rule", "message"),
    [
        (torch.ones(3, 3), 1, RELU, r"kept must hold the bits of 9 elements in 2 bytes on cpu, got shape \(1,\)"),
        (torch.ones(3, 1).expand(3, 3), 2, RELU, "grad must be dense and laid out as the output was"),
        (torch.ones(3, 3), 2, RULES["prelu"], r"kept must be the input of prelu.*got bits \(uint8\)"),
    ],
)
def test_bits_that_do_not_belong_to_the_gradient(path, grad, size, rule, message):
    weight = torch.ones(1) if rule.learned else None
    with pytest.raises(RuntimeError, match=message):
        ops.rectify_backward(grad, torch.zeros(size, dtype=torch.uint8), None, weight, None, *rule, None, False)
