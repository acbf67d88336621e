"""The ops called in C++ (kernels/direct/): what they take on equals a dispatcher call; they leave the rest.

For CPU tensors or, where Triton alone is tested and there is a GPU, CUDA tensors.
"""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_cpp import BACKEND, DEVICE, DIRECT, MARKS, on_cpu, on_gpu
from rectifying import RULES
from torch import nn
from torch.nn.utils import prune

import fused_rect as fr
from fused_rect import backends, ops
from fused_rect.kernels import direct
from fused_rect.rules import PRELU, RELU, Parameters, Rule, leaky_relu

pytestmark = MARKS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEAKY, RRELU = leaky_relu(0.1), Rule.default("rrelu")
SHAPES = [(7,), (4, 3), (2, 3, 5), (2, 3, 5, 7), (1, 8, 8, 8), (1, 2, 1, 1, 3), (3, 1, 4, 4)]


@pytest.fixture(autouse=True)
def forced():
    with fr.backend(BACKEND):
        yield


def rectify(tensors, rule, bias_added=False):
    with torch.autocast(DEVICE):  # where dtypes may differ
        return DIRECT.rectify(tensors[0], Parameters(*tensors[1:]), rule, bias_added)


def rectify_(tensors, rule, bias_added=False):
    with torch.autocast(DEVICE):
        return DIRECT.rectify_(tensors[0], Parameters(*tensors[1:]), rule, bias_added)


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


@settings(max_examples=200 if DEVICE == "cpu" else 40)
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


@on_cpu  # what follows is the same for both devices, and takes minutes without a GPU
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
    expected, following = ops.rectify(x, None, None, fr.random.new_seed(DEVICE), *RRELU), torch.rand(1)
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
    if DEVICE == "cpu":
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
    taken = backends.direct(x)

    def watched(*args):
        out = taken.rectify(*args)
        if out is not None:
            calls.append("direct")
        return out

    monkeypatch.setattr(backends, "direct", lambda like: taken._replace(rectify=watched))

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


def test_where_new_tensors_go_is_nobody_who_listens():
    """`torch.set_default_device` is a function mode too."""
    x, bias = torch.randn(2, 3, 4, device=DEVICE), torch.randn(3, device=DEVICE)
    with torch.device("meta"):
        assert rectify((x, bias, None, None), LEAKY) is not None


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
    monkeypatch.setattr(backends.resolve(DEVICE), "backward", lambda *args: called.append(args))
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
    assert torch.equal(x.grad, (x > 0).float()) and backends.direct(x) is None
    assert backends.calls(DEVICE) == "Python, slower for small tensors: no headers"
    monkeypatch.undo()
    backends._forget()


@on_cpu
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


# ---- whole layers ----

LAYERS = {
    "linear": (fr.nn.LinearReLU, (6, 4), {}, (5, 6)),
    "linear of images": (fr.nn.LinearLeakyReLU, (6, 4), {}, (2, 3, 5, 6)),
    "no bias": (fr.nn.LinearRReLU, (6, 4), {"bias": False}, (5, 6)),
    "conv1d": (fr.nn.ConvPReLU1d, (4, 6, 3), {"stride": 2, "padding": 1}, (2, 4, 9)),
    "conv2d": (fr.nn.ConvLeakyReLU2d, (4, 6, (3, 2)), {"dilation": (1, 2), "groups": 2}, (2, 4, 7, 8)),
    "conv3d": (fr.nn.ConvRReLU3d, (2, 4, 2), {}, (2, 2, 3, 4, 5)),
    "transposed": (fr.nn.ConvTransposeReLU2d, (4, 6, 3), {"stride": 2, "output_padding": 1}, (2, 4, 3, 4)),
}


def made(kind, needs, dtype=torch.float32):
    layer, arguments, options, shape = LAYERS[kind]
    torch.manual_seed(5)
    built = layer(*arguments, **options).to(dtype)
    x = torch.randn(shape, dtype=dtype).requires_grad_("x" in needs)
    for name, parameter in built.named_parameters():
        parameter.requires_grad_({"0.weight": "m", "0.bias": "b", "1.weight": "w"}[name] in needs)
    return built, x


def called(layer, x):
    """Output and gradients, and the random number that follows."""
    torch.manual_seed(8)
    y = layer(x)
    leaves = [t for t in (x, *layer.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(y, leaves, torch.randn_like(y)) if leaves else ()
    return [y, *grads, torch.rand(1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("needs", ["", "x", "b", "m", "w", "xmbw"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_in_one_call_equals_its_two(kind, needs, dtype, monkeypatch):
    layer, x = made(kind, needs, dtype)
    taken = []
    one = DIRECT._replace(layer=lambda *args: taken.append(DIRECT.layer(*args)) or taken[-1])
    monkeypatch.setattr(backends, "direct", lambda like: one)
    got = called(layer, x)
    assert taken and taken[0] is not None
    monkeypatch.setattr(backends, "direct", lambda like: DIRECT._replace(layer=lambda *args: None))
    for a, b in zip(got, called(layer, x), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.requires_grad == b.requires_grad


class OfItsOwn(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) + 1


def pruned(layer):
    prune.l1_unstructured(layer[0], "weight", 0.5)
    return layer


def pruned_bias(layer):
    prune.l1_unstructured(layer[0], "bias", 0.5)
    return layer


def parametrized(layer):
    nn.utils.parametrizations.weight_norm(layer[0])
    return layer


def of_its_own(layer):
    layer[0] = OfItsOwn(2, 3, 3)
    return layer


def padded(layer):
    layer[0].padding = "same"
    return layer


def reflected(layer):
    layer[0] = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
    return layer


def of_a_subclass(layer):
    layer[0].weight = nn.Parameter(layer[0].weight.detach().as_subclass(Watched))
    return layer


@pytest.mark.parametrize(
    "unusual",
    [pruned, pruned_bias, parametrized, of_its_own, padded, reflected, of_a_subclass],
    ids=lambda f: f.__name__,
)
def test_an_unusual_layer_is_left_to_python(unusual, monkeypatch):
    layer, x = unusual(fr.nn.ConvReLU2d(2, 3, 3)), torch.randn(1, 2, 5, 5)
    results = []
    one = DIRECT._replace(layer=lambda *args: results.append(DIRECT.layer(*args)))
    monkeypatch.setattr(backends, "direct", lambda like: one)
    torch.testing.assert_close(layer(x), torch.relu(layer[0](x)))
    assert set(results) <= {None}


def test_unusual_tensors_are_left_to_python():
    conv, linear = fr.nn.ConvReLU2d(2, 3, 3), fr.nn.LinearReLU(2, 3)

    def left(layer, x):
        return DIRECT.layer(x, layer[0].__dict__, DEVICE == "cpu", Parameters(), RELU) is None

    x = torch.randn(1, 2, 5, 5)
    assert not left(conv, x) and not left(linear, torch.randn(4, 2))
    assert left(conv, x[0]) and left(conv, x.double()) and left(conv, x.as_subclass(Watched)) and left(conv, x.int())
    assert left(linear, torch.randn(2)) and left(linear, torch.randn(4, 2).half())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert left(conv, x)
    with torch.profiler.profile():
        assert left(conv, x)
    assert not torch.func.vmap(lambda t: torch.tensor(left(conv, t)))(x.expand(3, 1, 2, 5, 5)).logical_not().any()


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (1, 2, 3, 3)])
def test_what_only_the_output_shows_is_the_dispatchers(shape):
    """An empty output is none of the kernels'."""
    layer = fr.nn.ConvRReLU2d(2, 3, 3)
    y = layer(torch.randn(shape, requires_grad=True))
    y.sum().backward()
    assert y.shape == (shape[0], 3, shape[2] - 2, shape[3] - 2)


def test_errors_of_a_layer_are_torchs():
    layer, twin = fr.nn.ConvReLU2d(2, 3, 3), nn.Conv2d(2, 3, 3)
    for shape in ((1, 3, 5, 5), (1, 2, 2, 2)):
        with pytest.raises(RuntimeError) as wanted:
            twin(torch.randn(shape))
        with pytest.raises(RuntimeError) as got:
            layer(torch.randn(shape))
        assert str(got.value) == str(wanted.value)


# ---- on a GPU: launches ----


@pytest.fixture
def no_python(monkeypatch):
    """Nothing is launched from Python."""
    from fused_rect.kernels import launch

    def fail(*args):
        raise AssertionError("launched from Python")

    monkeypatch.setattr(launch.Call, "__call__", fail)


def wrapped(tensors, rule, grad):
    """Output and gradients of a call in C++."""
    leaves = [t for t in tensors[:3] if t is not None]
    y = rectify(tensors, rule)
    return [y, *torch.autograd.grad(y, leaves, grad)]


def through_the_op(tensors, rule, grad):
    with fr.backend("eager"):
        leaves = [t for t in tensors[:3] if t is not None]
        y = ops.rectify(*tensors, *rule)
        return [y, *torch.autograd.grad(y, leaves, grad)]


@on_gpu
@pytest.mark.parametrize("rule", RULES.values(), ids=str)
def test_no_launch_comes_from_python(rule, no_python):
    tensors, grad = arguments((2, 3, 5, 7), torch.float32, rule), torch.randn(2, 3, 5, 7)
    for got, expected in zip(wrapped(tensors, rule, grad), through_the_op(tensors, rule, grad), strict=True):
        torch.testing.assert_close(got, expected)


@on_gpu
@pytest.mark.parametrize("weights", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("needs", ["w", "bw"])
def test_the_gradient_of_slopes_is_summed_on_and_rounded(needs, dtype, weights, no_python):
    x, bias, weight, _ = tensors = arguments((2, 3, 5), dtype, PRELU, needs=needs)
    if weights == 1:
        weight = torch.rand(1, dtype=dtype, requires_grad=True)
    tensors, leaves = (x, bias, weight, None), [t for t in (bias, weight) if t.requires_grad]
    grad = torch.randn(2, 3, 5).to(dtype)
    got = torch.autograd.grad(rectify(tensors, PRELU), leaves, grad)
    with fr.backend("eager"):
        expected = torch.autograd.grad(ops.rectify(*tensors, *PRELU), leaves, grad)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@on_gpu
def test_what_a_plan_depends_on_is_told_apart(no_python):
    """Calls of one shape: constants, addresses that are no multiple of 16, which tensors there are, layouts."""
    memory, grad = torch.randn(2 * 8 * 4 * 4 + 1), torch.randn(2, 8, 4, 4)
    for _ in range(2):
        for rule in (leaky_relu(0.5), leaky_relu(-3.0), Rule("rrelu", 0.0, 1.0), Rule("rrelu", 2.0, 3.0)):
            for start in (0, 1):
                for form in (torch.contiguous_format, torch.channels_last):
                    z = memory[start:][:256].view(2, 8, 4, 4).contiguous(memory_format=form).requires_grad_()
                    for bias in (None, torch.randn(9)[start:][:8].detach().requires_grad_()):
                        tensors = z, bias, None, torch.tensor([5]) if rule.random else None
                        got, expected = wrapped(tensors, rule, grad), through_the_op(tensors, rule, grad)
                        for a, b in zip(got, expected, strict=True):
                            torch.testing.assert_close(a, b)


@on_gpu
def test_threads_share_plans(no_python):
    from concurrent.futures import ThreadPoolExecutor

    def work(seed):
        with fr.backend(BACKEND), torch.device(DEVICE):
            shape = (2, 3, 5 + seed % 3)
            tensors, grad = arguments(shape, torch.float32, LEAKY), torch.randn(shape)
            got, expected = wrapped(tensors, LEAKY, grad), through_the_op(tensors, LEAKY, grad)
            return all(torch.allclose(a, b) for a, b in zip(got, expected))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(12)))


@on_gpu
def test_hooks_of_launches_send_them_through_triton():
    from triton import knobs

    seen = []

    def enter(metadata):
        seen.append(metadata.get()["name"])

    tensors = arguments((2, 3, 5), torch.float32, LEAKY)
    y = rectify(tensors, LEAKY)
    knobs.runtime.launch_enter_hook.add(enter)
    try:
        assert rectify(tensors, LEAKY) is None
        y.sum().backward()
        assert seen == ["fused_rect_backward_leaky_relu", "finish"]
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
    assert rectify(tensors, LEAKY) is not None


@on_gpu
def test_hooks_of_a_kernel_that_come_after_its_first_call_are_called():
    from fused_rect.kernels import rectify as kernels
    from fused_rect.kernels import reduce

    tensors = arguments((2, 3, 5), torch.float32, LEAKY)
    y = rectify(tensors, LEAKY)
    for kernel in (kernels.rectify, reduce.finish):
        seen = []
        kernel.add_pre_run_hook(lambda *args, seen=seen, **kwargs: seen.append(args))
        try:
            assert rectify(tensors, LEAKY) is None
            y.sum().backward(retain_graph=True)
            assert seen
        finally:
            kernel.pre_run_hooks.clear()
    assert rectify(tensors, LEAKY) is not None


@on_gpu
def test_more_plans_than_are_kept(monkeypatch):
    """The shape that comes after the last that is kept begins anew, and all are right."""
    import ctypes

    planned, plan = [], direct.Host.plan
    monkeypatch.setattr(direct.Host, "plan", lambda self, *args: planned.append(args[1]) or plan(self, *args))
    keep = direct._function("fused_rect_direct_keep", None, ctypes.c_size_t)
    keep(2)
    try:
        for n in (31, 32, 33, 31, 31):  # shapes of no other test
            x = torch.randn(2, n)
            assert torch.equal(rectify((x, None, None, None), LEAKY), torch.where(x > 0, x, x * 0.1))
    finally:
        keep(4096)
    assert [shape[1] for shape in planned] == [31, 32, 33, 31]


@on_gpu
def test_what_triton_does_not_compile_at_once_is_left_to_it(monkeypatch):
    import triton

    monkeypatch.setattr(triton.JITFunction, "warmup", lambda self, *args, **kwargs: None)
    tensors = arguments((2, 3, 11), torch.float32, LEAKY)  # a shape of no other test
    assert rectify(tensors, LEAKY) is None
    with fr.backend(BACKEND):
        fr.functional.bias_leaky_relu(*tensors[:2], 0.1).sum().backward()
    assert tensors[0].grad is not None


def test_other_devices_are_not_asked_about(monkeypatch):
    """Nor are the CPU's kernels built for them."""
    monkeypatch.setattr(backends, "_direct", lambda wanted, on_gpu: pytest.fail("asked"))
    x = torch.empty(2, 3, device="meta")
    with fr.backend("auto"):
        fr.functional.bias_relu_(x)
        assert fr.functional.bias_relu(x).is_meta


def test_why_there_are_no_calls_on_a_gpu(monkeypatch):
    import triton

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert direct.why("cuda") == "Python, slower for small tensors: torch has no CUDA device here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "no CUDA device" in direct.why("cuda") and direct.calls("cuda") is None
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(triton, "JITFunction", str)
    assert "TRITON_INTERPRET is set" in direct.why("cuda")
    monkeypatch.setattr(triton, "JITFunction", object)
    monkeypatch.setattr(direct, "_function", lambda *_: lambda *_: 0)
    assert "libcuda.so.1 is not to be found" in direct.why("cuda") and direct.calls("cuda") is None
    with fr.backend("eager"):
        assert backends.calls("cuda") == "Python: eager serves cuda tensors"


def test_a_stream_is_known_by_its_number(monkeypatch):
    from types import SimpleNamespace

    stream = SimpleNamespace(stream_id=7, cuda_stream=4096)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    assert direct.Host().stream(0, 7) == 4096
    with pytest.raises(RuntimeError, match="not number 8"):
        direct.Host().stream(0, 8)


SIGNATURE = {"x": "*fp32", "bits": "constexpr", "partials": "*fp32", "scale": "i64", "rows": "constexpr", "n": "i32"}


@pytest.mark.parametrize("parameters", [4, 5, 6])
def test_a_compiled_kernels_arguments(parameters):
    """As Triton's signature has them, without constants; then scratch pointers, as many as the PTX declares more."""
    kernel = MadeUp(parameters)
    told = direct._numbers(launchable(kernel), ("x", "bits", "partials"))
    arguments = ((0, 0), (7, 0), (-1, 5), (-1, 16), *[(-1, 0)] * (parameters - 4))
    assert told == (77, 3, 1, 1, 128, 64, arguments) and kernel in direct._kept


@pytest.mark.parametrize(
    "more",
    [{"num_ctas": 2}, {"launch_pdl": True}, {"launch_cooperative_grid": True}, {"global_scratch_size": 8},
     {"profile_scratch_size": 8}],
    ids=str,
)  # fmt: skip
def test_more_than_a_plain_launch_is_left_to_triton(more):
    assert direct._numbers(launchable(MadeUp(6, **more)), ("x", "bits", "partials")) is None


@pytest.mark.parametrize("parameters", [3, 7, 0])
def test_arguments_that_are_not_understood_are_left_to_triton(parameters):
    assert direct._numbers(launchable(MadeUp(parameters)), ("x", "bits", "partials")) is None


class MadeUp:
    """A compiled kernel of so many parameters, none that can be read at 0."""

    def __init__(self, parameters, **more):
        from types import SimpleNamespace

        plain = dict.fromkeys(("launch_pdl", "launch_cooperative_grid"), False)
        scratch = {"global_scratch_size": 0, "profile_scratch_size": 0}
        metadata = {"num_warps": 4, "warp_size": 32, "shared": 64, "num_ctas": 1, **plain, **scratch, **more}
        self.metadata, self.function = SimpleNamespace(**metadata), 77
        self.src = SimpleNamespace(signature=SIGNATURE)
        lines = ",\n".join(f"\t.param .u64 .ptr .global .align 1 rectify_param_{i}" for i in range(parameters))
        ptx = f".version 8.7\n.visible .entry rectify(\n{lines}\n)\n.reqntid 128\n{{\nld.param.b32 (x);\n}}"
        self.asm = {"ptx": ptx} if parameters else {"cubin": b""}


def launchable(kernel):
    from types import SimpleNamespace

    return SimpleNamespace(kernel=kernel, grid=(3, 1, 1), rest=(5, 1, 16))
