"""Every function of the public interface against torch's own pair, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

import fused_rect as fr

RECTIFIERS = ("relu", "leaky_relu", "prelu", "rrelu")
LOWER, UPPER = 0.1, 0.5
MAPS = {
    f"{name}{rank}d": (getattr(F, f"{name}{rank}d"), rank) for name in ("conv", "conv_transpose") for rank in (1, 2, 3)
} | {"linear": (F.linear, 0)}


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)


def torch_rectifier(rectifier, slope):
    return {
        "relu": F.relu,
        "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
        "prelu": lambda z: F.prelu(z, slope) if z.dim() > 1 else torch.where(z > 0, z, z * slope),
        "rrelu": lambda z: F.rrelu(z, LOWER, UPPER, training=False),
    }[rectifier]


def own_arguments(rectifier, slope):
    return {
        "relu": {},
        "leaky_relu": {"negative_slope": 0.2},
        "prelu": {"slope": slope},
        "rrelu": {"lower": LOWER, "upper": UPPER},
    }[rectifier]


def operands(name, rank):
    x = torch.randn(2, 4, *[5] * rank, dtype=torch.float64) if rank else torch.randn(3, 4, dtype=torch.float64)
    weight = torch.randn(6, 4, *[2] * rank, dtype=torch.float64)
    if name.startswith("conv_transpose"):
        weight = weight.transpose(0, 1).contiguous()
    return x, weight, torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)


def assert_same(ours, theirs, tensors):
    y, expected = ours(), theirs()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.stride() == expected.stride()
    grad = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, tensors, grad), torch.autograd.grad(expected, tensors, grad)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rectifier", RECTIFIERS)
@pytest.mark.parametrize("name", MAPS)
def test_behind_a_map(name, rectifier, bias):
    function, rank = MAPS[name]
    x, weight, b, slope = operands(name, rank)
    b = b.requires_grad_() if bias else None
    slope.requires_grad_(rectifier == "prelu")
    tensors = [t for t in (x.requires_grad_(), weight.requires_grad_(), b, slope) if t is not None and t.requires_grad]
    fused, then = getattr(fr.functional, f"{name}_{rectifier}"), torch_rectifier(rectifier, slope)
    own = own_arguments(rectifier, slope)
    assert_same(lambda: fused(x, weight, b, **own), lambda: then(function(x, weight, b)), tensors)


@pytest.mark.parametrize("rectifier", RECTIFIERS)
def test_convolution_arguments_by_position_and_by_name(rectifier):
    x, weight, b, slope = operands("conv2d", 2)
    grouped = weight[:, :2]
    fused, then = getattr(fr.functional, f"conv2d_{rectifier}"), torch_rectifier(rectifier, slope)
    own = own_arguments(rectifier, slope)
    torch.testing.assert_close(fused(x, grouped, b, 2, 1, 2, 2, **own), then(F.conv2d(x, grouped, b, 2, 1, 2, 2)))
    torch.testing.assert_close(
        fused(x, weight, bias=b, padding="same", dilation=2, **own),
        then(F.conv2d(x, weight, b, padding="same", dilation=2)),
    )
    up = getattr(fr.functional, f"conv_transpose2d_{rectifier}")
    transposed = weight.transpose(0, 1).contiguous()
    torch.testing.assert_close(
        up(x, transposed, b, stride=2, output_padding=1, **own),
        then(F.conv_transpose2d(x, transposed, b, stride=2, output_padding=1)),
    )


@pytest.mark.parametrize("rectifier", RECTIFIERS)
@pytest.mark.parametrize("name", MAPS)
def test_unbatched_input(name, rectifier):
    function, rank = MAPS[name]
    x, weight, b, slope = operands(name, rank)
    fused, then = getattr(fr.functional, f"{name}_{rectifier}"), torch_rectifier(rectifier, slope)
    if rectifier == "prelu":  # torch's prelu looks for channels in dim 1

        def then(z):
            return torch.where(z > 0, z, z * slope.view(-1, *[1] * rank))

    torch.testing.assert_close(
        fused(x[0], weight, b, **own_arguments(rectifier, slope)), then(function(x[0], weight, b))
    )


@pytest.mark.parametrize("rectifier", RECTIFIERS)
def test_linear_has_its_features_in_the_last_dim(rectifier):
    x = torch.randn(2, 3, 5, 4)
    weight, b, slope = torch.randn(6, 4), torch.randn(6), torch.rand(6)
    z = F.linear(x, weight, b)
    expected = torch.where(z > 0, z, z * slope) if rectifier == "prelu" else torch_rectifier(rectifier, None)(z)
    got = getattr(fr.functional, f"linear_{rectifier}")(x, weight, b, **own_arguments(rectifier, slope))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rectifier", RECTIFIERS)
def test_bias_functions(path, rectifier, in_place):
    z, b, slope = torch.randn(2, 6, 3), torch.randn(6), torch.rand(6)
    arguments = {"relu": (), "leaky_relu": (0.2,), "prelu": (slope,), "rrelu": (LOWER, UPPER)}[rectifier]
    expected = torch_rectifier(rectifier, slope)(z + b.view(-1, 1))
    function = getattr(fr.functional, f"bias_{rectifier}" + "_" * in_place)
    given, before = z.clone(), z.clone()
    y = function(given, b, *arguments)
    torch.testing.assert_close(y, expected)
    assert (y is given) is in_place
    assert in_place or torch.equal(given, before)


def test_default_arguments_are_torchs():
    z = torch.randn(2, 3, 4)
    assert torch.equal(fr.functional.bias_relu(z, None), F.relu(z))
    assert torch.equal(fr.functional.bias_leaky_relu(z, None), F.leaky_relu(z))
    torch.testing.assert_close(fr.functional.bias_rrelu(z, None), F.rrelu(z))


@pytest.mark.parametrize("law", ["slope", "divisor"])
def test_rrelu_in_training(path, law):
    z, seed = torch.randn(4, 3, 5), fr.random.new_seed()
    z.requires_grad_()
    y = fr.functional.bias_rrelu(z, None, training=True, law=law, seed=seed)
    slopes = fr.random.slopes(seed, z.shape, law=law)
    torch.testing.assert_close(y, torch.where(z > 0, z, z * slopes))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), z)[0], torch.where(z > 0, 1.0, slopes))


def test_rrelu_in_evaluation_of_the_divisor_law():
    z = torch.randn(4, 3, 5)
    torch.testing.assert_close(fr.functional.bias_rrelu(z, None, law="divisor"), F.leaky_relu(z, 1 / 5.5))


@pytest.mark.ptx
def test_manual_seed_repeats_a_training_call_and_calls_differ(path):
    z = torch.full((2, 3, 8), -1.0)
    torch.manual_seed(1)
    first, second = (fr.functional.bias_rrelu(z, None, training=True) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(fr.functional.bias_rrelu(z, None, training=True), first)
    assert not torch.equal(first, second)


def test_wrong_arguments():
    z, half = torch.randn(2, 3, 4), torch.randn(2, 3, 4, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"bias must have the dtype of input.*run under torch\.autocast"):
        fr.functional.bias_relu(half, torch.ones(3))
    with pytest.raises(RuntimeError, match=r"weight must have the dtype of input"):
        fr.functional.bias_prelu_(half, None, torch.ones(3))
    with pytest.raises(TypeError, match=r"weight must be a Tensor of shape .* got float"):
        fr.functional.bias_prelu(z, None, 0.25)
    with pytest.raises(TypeError, match="slope"):
        fr.functional.conv1d_prelu(z, torch.randn(2, 3, 1))
    with pytest.raises(TypeError, match="weight must be a Tensor"):
        fr.functional.conv1d_prelu(z, torch.randn(2, 3, 1), slope=0.25)
    with pytest.raises(RuntimeError, match="Lower bound"):
        fr.functional.bias_rrelu(z, None, 0.5, 0.1)
    with pytest.raises(ValueError, match="law must be"):
        fr.functional.conv1d_rrelu(z, torch.randn(2, 3, 1), law="other")
    with pytest.raises(RuntimeError, match=r"expected bias to be 1-dimensional with 2 elements"):  # the map's own check
        fr.functional.conv1d_relu(z, torch.randn(2, 3, 1), torch.ones(3))


def test_public_names():
    names = [f"{name}_{rectifier}" for name in MAPS for rectifier in RECTIFIERS]
    names += [f"bias_{rectifier}{end}" for rectifier in RECTIFIERS for end in ("", "_")]
    for name in names:
        function = getattr(fr.functional, name)
        assert function.__name__ == name and function.__doc__


@pytest.mark.parametrize("grad", [True, False])
def test_negated_parameters_are_read_as_they_look(path, grad):
    """The imaginary part of a conjugate has torch's negative bit: its memory holds the opposite numbers."""
    bias, weight = torch._neg_view(torch.randn(3)), torch._neg_view(torch.randn(3))
    assert bias.is_neg() and weight.is_neg()
    x = torch.randn(2, 3, 4, requires_grad=grad)
    z = (x + bias.resolve_neg().view(-1, 1)).detach()
    assert torch.equal(fr.functional.bias_relu(x, bias), z.relu())
    assert torch.equal(fr.functional.bias_prelu(x, bias, weight), F.prelu(z, weight.resolve_neg()))


def test_inference_tensors_are_written_in_inference_mode_alone(path):
    with torch.inference_mode():
        x = torch.randn(2, 3)
        before = x.clone()
        assert torch.equal(fr.functional.bias_relu_(x.clone()), before.relu())
    with pytest.raises(RuntimeError, match=r"input: Inplace update to inference tensor.*clone"):
        fr.functional.bias_relu_(x)
    assert torch.equal(x, before)


def test_evaluation_keeps_no_seed():
    kept, x = [], torch.randn(2, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        fr.functional.bias_rrelu(x, seed=fr.random.new_seed())
        fr.functional.linear_rrelu(x, torch.randn(4, 3), seed=fr.random.new_seed())
    assert kept and torch.int64 not in kept


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("rule", ["leaky_relu", "rrelu"])
def test_a_bound_of_minus_zero_is_not_taken_for_zero(rule, trains, path):
    """Equal as numbers, and so as keys of what is kept; zeros of the other sign."""
    x, seed = -torch.ones(2, 3), fr.random.new_seed()
    for bounds in ((0.0, 0.0), (-0.0, -0.0), (-0.0, 0.0), (0.0, 0.0), (-0.0, -0.0)):
        z = x.clone().requires_grad_(trains)
        if rule == "leaky_relu":
            y, slope = fr.functional.bias_leaky_relu(z, None, bounds[1]), torch.tensor(bounds[1])
        else:  # drawn ones are of both signs, by the bits of the seed
            y = fr.functional.bias_rrelu(z, None, *bounds, training=True, seed=seed)
            slope = fr.random.slopes(seed, x.shape, *bounds)
        expected = x * slope
        assert torch.equal(y, expected) and torch.equal(y.signbit(), expected.signbit()), bounds
        if trains:
            (grad,) = torch.autograd.grad(y, z, torch.ones_like(y))
            assert torch.equal(grad.signbit(), slope.expand_as(grad).signbit()), bounds


class EnabledInInferenceMode:
    """`torch.enable_grad()` inside: torch's own operations record nothing there."""

    def __enter__(self):
        self.modes = torch.inference_mode(), torch.enable_grad()
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "prelu", "rrelu"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("inner", [False, True], ids=["made outside", "made in inference mode"])
def test_inference_mode_records_nothing_whatever_is_enabled_in_it(path, name, in_place, inner):
    function = getattr(fr.functional, f"bias_{name}" + "_" * in_place)
    weights = [torch.full((3,), 0.3, requires_grad=True)] if name == "prelu" else []
    outside, bias = torch.randn(2, 3, 4), torch.randn(3, requires_grad=True)
    expected = getattr(fr.functional, f"bias_{name}")(outside, bias, *weights).detach()
    with EnabledInInferenceMode():
        x = outside.clone() if inner else outside
        got = function(x, bias, *weights)
        assert not got.requires_grad and got.grad_fn is None
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU", "PReLU", "RReLU"])
@pytest.mark.parametrize("linear_map", ["Linear{}", "Conv2d", "ConvTranspose2d"])
def test_layers_record_nothing_in_inference_mode(path, name, linear_map):
    made = linear_map.format(name) if linear_map == "Linear{}" else linear_map.replace("2d", f"{name}2d")
    layer = getattr(fr.nn, made)(*((3, 5) if linear_map == "Linear{}" else (3, 5, 1))).eval()
    x = torch.randn(2, 3) if linear_map == "Linear{}" else torch.randn(2, 3, 4, 4)
    expected = layer(x).detach()
    with EnabledInInferenceMode():
        got = layer(x)
        assert not got.requires_grad
    assert torch.equal(got, expected)
