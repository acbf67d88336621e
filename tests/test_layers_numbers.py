"""A fused layer is never further from the float64 result than eager's pair is, in any dtype.

Inputs with large means, biases that cancel them and large fan-in: there a map's output, rounded to 16 bits before its
bias is added, has nothing left of the result.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rectifying import of_layer
from torch import nn

import fused_rect as fr

MAPS = {
    "linear": lambda fan_in: (nn.Linear(fan_in, 8), (16, fan_in)),
    "linear, tokens": lambda fan_in: (nn.Linear(fan_in, 8), (2, 5, fan_in)),
    "conv1d": lambda fan_in: (nn.Conv1d(fan_in, 8, 3, padding=1), (2, fan_in, 9)),
    "conv2d": lambda fan_in: (nn.Conv2d(fan_in, 8, 3), (2, fan_in, 6, 6)),
    "conv2d 1x1": lambda fan_in: (nn.Conv2d(fan_in, 8, 1), (2, fan_in, 6, 6)),
    "conv3d": lambda fan_in: (nn.Conv3d(fan_in, 4, 2), (1, fan_in, 3, 4, 4)),
    "transposed": lambda fan_in: (nn.ConvTranspose2d(fan_in, 8, 2, stride=2), (2, fan_in, 4, 4)),
}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.3),
    "prelu": nn.PReLU,
    "rrelu": lambda: nn.RReLU().eval(),
}
NARROW = (torch.bfloat16, torch.float16, torch.float32)


def cancel(linear_map, mean):
    """A bias that takes the mean of the inputs out again."""
    dims = [d for d in range(linear_map.weight.dim()) if d != (1 if getattr(linear_map, "transposed", False) else 0)]
    with torch.no_grad():
        linear_map.bias.copy_(-mean * linear_map.weight.double().sum(dims))


def errors(pair, x, grad, autocast):
    """(of eager, of the layer, of the fused model): relative errors of the output and of each gradient."""
    double = copy.deepcopy(pair).double()
    exact = results(double, x.double(), grad.double(), None)
    scale = [max(e.norm().item(), 1e-30) for e in exact]
    if isinstance(pair[1], nn.PReLU):  # one slope's gradient is one sum: relative to its terms, which may cancel
        scale[-1] = (double[0](x.double()).clamp(max=0) * grad).abs().sum().item()
    models = pair, of_layer(pair), fr.fuse(copy.deepcopy(pair))
    measured = [results(model, x, grad, autocast) for model in models]
    return [[(g.double() - e).norm().item() / s for g, e, s in zip(got, exact, scale)] for got in measured]


def results(model, x, grad, autocast):
    leaf = x.clone().requires_grad_()
    with torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(leaf)
    return [y, *torch.autograd.grad(y, [leaf, *model.parameters()], grad.to(y.dtype).expand(y.shape))]


@pytest.mark.ptx
@pytest.mark.parametrize("linear_map", MAPS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_further_from_float64_than_eager(linear_map, activation):
    device = torch.get_default_device().type
    on_cpu = device == "cpu"

    @settings(max_examples=4 if on_cpu else 2)
    @given(
        fan_in=st.sampled_from([3, 128] if on_cpu else [3, 32]),
        mean=st.sampled_from([0.0, 1.0, 100.0]),
        dtype=st.sampled_from(NARROW),
        autocast=st.sampled_from([None, torch.bfloat16]),
        seed=st.integers(0, 3),
    )
    def run(fan_in, mean, dtype, autocast, seed):
        torch.manual_seed(seed)
        module, shape = MAPS[linear_map](fan_in)
        cancel(module, mean)
        narrow = torch.float32 if autocast else dtype
        pair = nn.Sequential(module, ACTIVATIONS[activation]()).to(narrow)
        x = (torch.randn(shape) + mean).to(narrow)
        eager, *fused = errors(pair, x, torch.randn(()), autocast)
        for of_fused in fused:
            for place, (ours, theirs) in enumerate(zip(of_fused, eager, strict=True)):
                # float32 sums in another order differ by a few units in the last place; a gradient of eight values, the
                # bias's, or of one, the slope's, by the luck of its roundings.
                luck = torch.finfo(autocast or dtype).eps if place else 4 * torch.finfo(torch.float32).eps
                assert ours <= 1.05 * theirs + luck, (place, fused, eager)

    run()


def test_a_cancelling_bias_is_added_before_rounding():
    torch.manual_seed(0)
    x, linear = (torch.randn(64, 256) + 100).bfloat16(), nn.Linear(256, 64).bfloat16()
    with torch.no_grad():
        linear.bias.copy_(-linear.weight.float().sum(1) * 100)
    eager, layer, fused = errors(nn.Sequential(linear, nn.ReLU()), x, torch.ones(()), None)
    assert eager[0] < 0.01 and layer[0] <= eager[0] * 1.05 and fused[0] <= eager[0] * 1.05


@pytest.mark.parametrize("linear_map", ["linear", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_no_further_from_float64_than_eager(linear_map, dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, shape = MAPS[linear_map](64)
    cancel(module, 100.0)
    pair = nn.Sequential(module, nn.LeakyReLU(0.3)).to(dtype)
    x, grad = (torch.randn(shape) + 100).to(dtype), torch.randn(())
    exact, eager = results(copy.deepcopy(pair).double(), x.double(), grad.double(), None), results(pair, x, grad, None)
    compiled = torch.compile(pair, backend="fused_rect", options={"fused_rect.sites": "all"})
    for ours, theirs, want in zip(results(compiled, x, grad, None), eager, exact, strict=True):
        error, allowed = ((got.double() - want).norm() / want.norm() for got in (ours, theirs))
        assert error <= 1.05 * allowed + torch.finfo(dtype).eps / 4


@pytest.mark.ptx
@pytest.mark.parametrize("linear_map", MAPS)
@pytest.mark.parametrize("train", [False, True])
def test_who_adds_the_bias(linear_map, train, monkeypatch):
    """The map where its own kernel does before it rounds: any linear map, and convolutions on the CPU."""
    module, shape = MAPS[linear_map](3)
    name = (
        "linear" if isinstance(module, nn.Linear) else type(module).__name__.lower().replace("transpose", "_transpose")
    )
    called, function = [], getattr(torch.nn.functional, name)

    def recorded(input, weight, bias=None, *args, **kwargs):
        called.append(bias)
        return function(input, weight, bias, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, name, recorded)
    monkeypatch.setattr(fr.nn, "_TRANSPOSED", {2: recorded})
    monkeypatch.setattr(fr.nn, "_ADDS_BIAS", {})  # what C++ calls cannot be seen: the test below is of it
    layer = of_layer(nn.Sequential(module, nn.ReLU()))
    x = torch.randn(shape)
    with torch.set_grad_enabled(train):
        y = layer(x)
    if train:
        (grad,) = torch.autograd.grad(y.sum(), layer[0].bias)
        dims = [d for d in range(y.dim()) if d != (y.dim() - 1 if name == "linear" else 1)]
        torch.testing.assert_close(grad, (y > 0).sum(dims).to(grad.dtype))
    added_by_map = name == "linear" or x.device.type == "cpu"
    assert len(called) == 1 and (called[0] is not None) == added_by_map


def test_calls_in_cpp_are_told_who_adds_the_bias():
    linear = {kind: adds for kind, adds in fr.nn._ADDS_BIAS.items() if kind is nn.Linear}
    assert set(linear.values()) == {(True, True)} and len(fr.nn._ADDS_BIAS) == 7
    assert {adds for kind, adds in fr.nn._ADDS_BIAS.items() if kind not in linear} == {(True, False)}
