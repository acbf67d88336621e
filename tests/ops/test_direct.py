"""The ops called in C++ (kernels/cpu/direct.cpp): what they take on equals a dispatcher call; they leave the rest."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rectifying import RULES
from torch import nn

import fused_rect as fr
from fused_rect import backends, ops
from fused_rect.kernels import cpu
from fused_rect.rules import PRELU, Parameters, Rule, leaky_relu, numbers

with fr.backend("auto"):
    DIRECT = backends.direct() if cpu.available() else None
pytestmark = pytest.mark.skipif(DIRECT is None, reason="" if DIRECT else f"not built: {cpu.calls()}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEAKY, RRELU = leaky_relu(0.1), Rule.default("rrelu")
SHAPES = [(7,), (4, 3), (2, 3, 5), (2, 3, 5, 7), (1, 8, 8, 8), (1, 2, 1, 1, 3), (3, 1, 4, 4)]


@pytest.fixture(autouse=True)
def native():
    with fr.backend("native"):
        yield


def rectify(tensors, rule, bias_added=False):
    return DIRECT.rectify(*tensors, *rule, *numbers(rule), bias_added)


def rectify_(tensors, rule, bias_added=False):
    return DIRECT.rectify_(*tensors, *rule, *numbers(rule), bias_added)


def arguments(shape, dtype, rule, channels_last=False, wide=False, needs="xbw", has_bias=True):
    """input, bias, weight, seed, as leaves where ``needs`` names them."""
    x = torch.randn(shape).to(dtype)
    if channels_last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    parameters = torch.float32 if wide else dtype
    channels = shape[1] if len(shape) > 1 else 1
    bias = torch.randn(channels).to(parameters) if has_bias and len(shape) > 1 else None
    weight = torch.rand(channels).to(parameters) if rule.learned else None
    for name, tensor in zip("xbw", (x, bias, weight)):
        if tensor is not None:
            tensor.requires_grad_(name in needs)
    return x, bias, weight, torch.tensor([77]) if rule.random else None


def gradients(y, wanted, grad):
    return torch.autograd.grad(y, wanted, grad) if wanted else ()


NEEDS = ["", "x", "b", "w", "xb", "xw", "bw", "xbw"]


@pytest.mark.parametrize("bias", ["none", "added here", "added before"])
@pytest.mark.parametrize("needs", NEEDS)
def test_whichever_gradients_are_wanted(needs, bias):
    tensors = arguments((2, 3, 5), torch.float32, PRELU, needs=needs, has_bias=bias != "none")
    leaves, grad = [t for t in tensors if t is not None and t.requires_grad], torch.randn(2, 3, 5)
    y, expected = rectify(tensors, PRELU, bias == "added before"), ops.rectify(*tensors, *PRELU, bias == "added before")
    assert y.requires_grad == bool(leaves)
    for got, wanted in zip(gradients(y, leaves, grad), gradients(expected, leaves, grad), strict=True):
        assert torch.equal(got, wanted)


@settings(max_examples=200)
@given(
    shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES), rule=st.sampled_from(list(RULES.values())),
    last=st.booleans(), wide=st.booleans(), needs=st.sampled_from(NEEDS), has_bias=st.booleans(),
    bias_added=st.booleans(), in_place=st.booleans(),
)  # fmt: skip
def test_equals_the_dispatchers_call(shape, dtype, rule, last, wide, needs, has_bias, bias_added, in_place):
    wide = wide and dtype in (torch.bfloat16, torch.float16)
    tensors = arguments(shape, dtype, rule, last, wide, needs, has_bias)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    expected = ops.rectify(*tensors, *rule, bias_added)
    before = tensors[0].detach().clone()
    if in_place:
        x = tensors[0].clone() if tensors[0].requires_grad else tensors[0]
        version = x._version
        taken = rectify_((x, *tensors[1:]), rule, bias_added)
        # In-place PReLU keeps a copy where something is recorded, which is Python's to do.
        assert taken == (not leaves or not rule.learned)
        if not taken:
            assert x._version == version and torch.equal(x, before)
            return
        assert x._version == version + 1
        y = x
    else:
        y = rectify(tensors, rule, bias_added)
        assert torch.equal(tensors[0], before)
    assert torch.equal(y, expected) and y.stride() == expected.stride() and y.dtype == dtype
    assert y.requires_grad == expected.requires_grad
    grad = torch.randn(shape).to(dtype)
    for got, wanted in zip(gradients(y, leaves, grad), gradients(expected, leaves, grad), strict=True):
        assert torch.equal(got, wanted) and got.dtype == wanted.dtype and got.stride() == wanted.stride()


# In-place PReLU is Python's to record.
RECORDED = [(rule, False) for rule in RULES.values()] + [(rule, True) for rule in RULES.values() if not rule.learned]


@pytest.mark.parametrize("bias_added", [False, True])
@pytest.mark.parametrize(("rule", "in_place"), RECORDED, ids=str)
def test_second_derivatives(rule, in_place, bias_added):
    """Backward under create_graph goes to the dispatcher, whose derivatives the other tests prove."""
    x, bias, weight, seed = arguments((2, 3, 4), torch.float64, rule)

    def function(*tensors):
        bias, weight = tensors[1], tensors[2] if len(tensors) > 2 else None
        z = tensors[0] + bias.view(-1, 1) if bias_added else tensors[0] * 1
        # The map that added the bias is not told of its gradient by the rectifier: here the two are one.
        parameters = (bias.detach() if bias_added else bias), weight, seed
        if not in_place:
            return rectify((z, *parameters), rule, bias_added)
        assert rectify_((z, *parameters), rule, bias_added)
        return z

    tensors = tuple(t for t in (x, bias, weight) if t is not None)
    assert torch.autograd.gradcheck(function, tensors) and torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("order", ["first", "second", "both"])
@pytest.mark.parametrize("bias", ["none", "added here", "added before"])
@pytest.mark.parametrize("rule", RULES.values(), ids=str)
def test_which_gradients_are_none_is_the_dispatchers(rule, bias, order):
    tensors = arguments((2, 3, 4), torch.float32, rule, has_bias=bias != "none")
    leaves = [t for t in tensors if t is not None and t.requires_grad]

    def all_gradients(y):
        loss = (y * y).sum() if order == "both" else y.sum()
        first = torch.autograd.grad(loss, leaves, create_graph=order != "first")
        if order == "first":
            return first
        penalty = sum((g * g).sum() for g in first)
        return torch.autograd.grad(penalty, leaves, allow_unused=True)

    got = all_gradients(rectify(tensors, rule, bias == "added before"))
    for a, b in zip(got, all_gradients(ops.rectify(*tensors, *rule, bias == "added before")), strict=True):
        assert (a is None and b is None) or torch.allclose(a, b)


@pytest.mark.parametrize("in_place", [False, True])
def test_draws_the_seed_that_python_would(in_place):
    x = torch.randn(2, 3, 5)
    torch.manual_seed(3)
    expected, following = ops.rectify(x, None, None, fr.random.new_seed(), *RRELU), torch.rand(1)
    torch.manual_seed(3)
    y = x.clone()
    if in_place:
        ops.run_(y, Parameters(), RRELU)
    else:
        y = ops.run(y, Parameters(), RRELU)
    assert torch.equal(y, expected) and torch.equal(torch.rand(1), following)


def refused(x, bias=None, weight=None, seed=None, rule=LEAKY):
    """Nothing taken on, nothing written, no random number drawn."""
    state, before, version = torch.get_rng_state(), x.detach().clone(), x._version
    assert rectify((x, bias, weight, seed), rule) is None
    assert not rectify_((x, bias, weight, seed), rule)
    assert torch.equal(torch.get_rng_state(), state) and x._version == version
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    return True


def test_the_unusual_is_left_to_python():
    x, c = torch.randn(2, 3, 4), torch.randn(3)
    negated = torch._neg_view(torch.randn(3))
    assert negated.is_neg() and negated.is_contiguous()
    assert refused(x[:, :, ::2]) and refused(x[:0]) and refused(x.int()) and refused(x[:1].expand(2, 3, 4))
    assert refused(x, negated) and refused(x, c[:2]) and refused(x, torch.randn(6)[::2]) and refused(x, c.double())
    assert refused(x, c, rule=PRELU) and refused(x, weight=torch.randn(2), rule=PRELU)
    assert refused(x, weight=torch.randn(1, 3), rule=PRELU) and refused(x, weight=c.half(), rule=PRELU)
    assert refused(x, seed=torch.ones(1), rule=RRELU) and refused(x, seed=torch.tensor([1, 2]), rule=RRELU)
    assert refused(x[:, :, ::2], rule=RRELU)
    assert rectify((x.to_sparse(), None, None, None), LEAKY) is None
    flat = torch.randn(12)
    assert not rectify_((flat[:12].view(4, 3), flat[:3], None, None), LEAKY)  # the bias lies in the input
    leaf = torch.randn(2, 3, requires_grad=True)
    assert not rectify_((leaf, None, None, None), LEAKY)
    assert not rectify_(((leaf * 1)[:], None, None, None), LEAKY)


class Watched(torch.Tensor):
    """A subclass that does nothing of its own."""


@pytest.mark.parametrize(
    "observed",
    ["profiler", "functions", "dispatches", "forward AD", "vmap", "grad", "subclass", "parameter subclass", "fake"],
)
def test_whoever_listens_sees_the_op(observed, monkeypatch):
    from torch._subclasses import FakeTensorMode
    from torch.autograd import forward_ad
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    x, bias = torch.randn(2, 3, 4), torch.randn(3)
    calls = []
    taken = backends.direct
    monkeypatch.setattr(backends, "direct", lambda: calls.append("direct") or taken())

    def run(x, bias=bias):
        return fr.functional.bias_leaky_relu(x, bias)

    run(x)
    assert calls == ["direct"]
    calls.clear()

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    if observed == "profiler":
        with torch.profiler.profile() as profile:
            run(x)
        assert "fused_rect::rectify" in {event.key for event in profile.key_averages()}
    elif observed == "functions":
        with Functions():
            run(x)
        assert "fused_rect.rectify.default" in calls
    elif observed == "dispatches":
        with Dispatches():
            run(x)
        assert "fused_rect.rectify.default" in calls
    elif observed == "forward AD":
        with forward_ad.dual_level():
            assert forward_ad.unpack_dual(run(forward_ad.make_dual(x, torch.ones_like(x)))).tangent is not None
    elif observed == "vmap":
        assert torch.func.vmap(run)(x.unsqueeze(0)).shape == (1, 2, 3, 4)
    elif observed == "grad":
        assert torch.func.grad(lambda x: run(x).sum())(x).shape == x.shape
    elif observed == "subclass":
        assert type(run(x.as_subclass(Watched))) is Watched
    elif observed == "parameter subclass":
        assert type(run(x, bias.as_subclass(Watched))) is Watched
    else:
        with FakeTensorMode() as mode:
            run(mode.from_tensor(x), mode.from_tensor(bias))
    assert "direct" not in calls


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_without_gradients(inference):
    layer, x = fr.nn.ConvPReLU2d(2, 3, 3), torch.randn(1, 2, 5, 5)
    eager = nn.Sequential(*layer)
    with inference():
        y = layer(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, eager(x))


@pytest.mark.parametrize("rule", [LEAKY, PRELU, RRELU], ids=lambda rule: rule.name)
def test_gradients_that_need_a_copy_and_hooks(rule):
    x, bias, *_ = tensors = arguments((2, 3, 4), torch.float32, rule)
    y, expected = rectify(tensors, rule), ops.rectify(*tensors, *rule)
    for grad in (torch.ones(1).expand(2, 3, 4), torch.randn(4, 3, 2).permute(2, 1, 0)):
        got, wanted = (torch.autograd.grad(t, (x, bias), grad, retain_graph=True) for t in (y, expected))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        z = rectify(tensors, rule)
    assert packed and torch.equal(torch.autograd.grad(z.sum(), bias)[0], torch.autograd.grad(y.sum(), bias)[0])


def test_an_expanded_gradient_stays_in_cpp(monkeypatch):
    """`y.sum().backward()` hands back one number for all elements."""
    called = []
    monkeypatch.setattr(cpu, "backward", lambda *args: called.append(args))
    x, *rest = arguments((2, 3, 4), torch.float32, LEAKY)
    rectify((x, *rest), LEAKY).sum().backward()
    assert not called and torch.equal(x.grad, torch.where(x + rest[0].view(-1, 1) > 0, 1.0, 0.1))


def test_backward_is_seen_by_a_mode_that_forward_did_not_have():
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(str(function))
            return function(*args, **(kwargs or {}))

    _, bias, *_ = tensors = arguments((2, 3, 4), torch.float32, LEAKY)
    y = rectify(tensors, LEAKY)
    with Dispatches():
        y.backward(torch.ones_like(y))
    assert "fused_rect.rectify_backward.default" in calls
    torch.testing.assert_close(bias.grad, torch.where(y > 0, 1.0, 0.1).sum((0, 2)))


@pytest.mark.parametrize(("rule", "in_place"), RECORDED, ids=str)
def test_what_changes_after_forward_does_not_disturb_backward(rule, in_place):
    """The output and the bias are not kept, or as they were."""
    x, bias, weight, seed = tensors = arguments((2, 3, 4), torch.float32, rule)
    wanted = torch.autograd.grad(rectify(tensors, rule).sum(), (x, bias))
    y = x * 1
    if in_place:
        assert rectify_((y, bias, weight, seed), rule)
    else:
        y = rectify((y, bias, weight, seed), rule)
    y.add_(1)
    with torch.no_grad():
        bias.neg_()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(y.sum(), (x, bias)), wanted))


def test_a_changed_slope_or_input_is_noticed():
    for changed in (0, 2):
        tensors = arguments((2, 3, 4), torch.float32, PRELU, needs="b")
        y = rectify(tensors, PRELU)
        tensors[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
def test_what_is_kept(rule):
    kept = []
    tensors = arguments((2, 3, 40), torch.float32, rule)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rectify(tensors, rule)
    size = sum(t.nbytes for t in kept)
    assert size == (240 * 4 + 3 * 4 + 3 * 4 if rule.learned else 30 + 8 * rule.random)


def test_without_the_library_python_serves(monkeypatch):
    from fused_rect.kernels.cpu import build

    outcomes = {**build._outcomes(), build.DIRECT: build.BuildError("no headers")}
    monkeypatch.setattr(build, "_outcomes", lambda: outcomes)
    backends._forget()
    x = torch.randn(2, 3, requires_grad=True)
    fr.functional.bias_relu(x).sum().backward()
    assert torch.equal(x.grad, (x > 0).float()) and backends.direct() is None
    assert cpu.calls() == "Python, slower for small tensors: no headers"
    monkeypatch.undo()
    backends._forget()


@pytest.mark.parametrize("room, expected", [(1.5, "RuntimeError"), (2.5, "OutOfMemoryError"), (3.5, "done")])
def test_no_memory_is_an_error_in_backward_too(room, expected):
    """Room for so many tensors of the input's size: torch makes two, the kernels' sums are the third."""
    code = f"""
import resource, torch, fused_rect as fr
torch.set_num_threads(1)
C = 2**24
def called(C):
    x, bias = (torch.randn(size).requires_grad_() for size in ((1, C), (C,)))
    return fr.functional.bias_relu(x, bias)
called(8).backward(torch.ones(1, 8))
y, grad = called(C), torch.ones(1, C)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int({room} * 4 * C),) * 2)
try:
    y.backward(grad)
    print("done")
except (RuntimeError, MemoryError) as error:
    print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
