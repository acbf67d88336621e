"""The layers against nn.Sequential(linear map, rectifier): values, gradients, state_dict, arguments, memory."""

import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_rect as fr
from fused_rect.perf.profiling.memory import peak_live_bytes

RECTIFIERS = {
    "ReLU": (nn.ReLU, {}),
    "LeakyReLU": (nn.LeakyReLU, {"negative_slope": 0.3}),
    "PReLU": (nn.PReLU, {"num_parameters": 6, "init": 0.1}),
    "RReLU": (nn.RReLU, {"lower": 0.2, "upper": 0.6}),
}
MAPS = {
    **{f"Conv{{}}{rank}d": (getattr(nn, f"Conv{rank}d"), rank) for rank in (1, 2, 3)},
    **{f"ConvTranspose{{}}{rank}d": (getattr(nn, f"ConvTranspose{rank}d"), rank) for rank in (1, 2, 3)},
    "Linear{}": (nn.Linear, 0),
}
each = pytest.mark.parametrize("rectifier", RECTIFIERS)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)


def pair(name, rectifier, *arguments, **keywords):
    """Our layer in float64 and torch's two modules with its weights, both in evaluation (RReLU's slope is fixed)."""
    act, own = RECTIFIERS[rectifier]
    layer = getattr(fr.nn, name.format(rectifier))(*arguments, **keywords, **own).double()
    twin = nn.Sequential(MAPS[name][0](*arguments, **keywords), act(**own)).double()
    twin.load_state_dict(layer.state_dict())
    return layer.eval(), twin.eval()


def image(rank, batch=2):
    spatial = [6, 5, 4][:rank]
    return torch.randn(*([batch] if batch else []), 4, *spatial, dtype=torch.float64, requires_grad=True)


def assert_same(layer, twin, x, *rest):
    y, expected = layer(x, *rest), twin[1](twin[0](x, *rest))
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    grad = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    theirs = torch.autograd.grad(expected, [x, *twin.parameters()], grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@each
@pytest.mark.parametrize("name", MAPS)
def test_every_layer(name, rectifier):
    rank = MAPS[name][1]
    layer, twin = pair(name, rectifier, 4, 6, *([3] if rank else []))
    assert_same(layer, twin, image(rank))


@each
@pytest.mark.parametrize("name", MAPS)
def test_state_dict_goes_both_ways_and_keeps_its_keys(name, rectifier):
    layer, twin = pair(name, rectifier, 4, 6, *([3] if MAPS[name][1] else []))
    expected = ["0.weight", "0.bias"] + ["1.weight"] * (rectifier == "PReLU")
    assert list(layer.state_dict()) == list(twin.state_dict()) == expected
    for parameter in twin.parameters():
        nn.init.normal_(parameter)
    layer.load_state_dict(twin.state_dict())
    assert_same(layer, twin, image(MAPS[name][1]))


@each
def test_convolution_arguments(rectifier):
    x = image(2)
    for arguments, keywords in [
        ((4, 6, 3, 2, 1), {}),
        ((4, 6, (3, 1)), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
        ((4, 6, 3), {"padding": "same", "bias": False}),
        ((4, 6, 3), {"padding": "valid"}),
    ]:
        assert_same(*pair("Conv{}2d", rectifier, *arguments, **keywords), x)


@each
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(rectifier, mode):
    assert_same(*pair("Conv{}2d", rectifier, 4, 6, 3, padding=1, padding_mode=mode), image(2))


@each
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_output_size_of_transposed_convolutions(rectifier, rank):
    layer, twin = pair(f"ConvTranspose{{}}{rank}d", rectifier, 4, 6, 3, stride=2)
    x = image(rank)
    size = [2 * s + 2 for s in x.shape[2:]]
    assert layer(x, size).shape[2:] == torch.Size(size)
    assert_same(layer, twin, x, size)


@each
@pytest.mark.parametrize("name", MAPS)
def test_unbatched_input(name, rectifier):
    rank = MAPS[name][1]
    layer, _ = pair(name, rectifier, 4, 6, *([3] if rank else []))
    x = image(rank, batch=0)
    torch.testing.assert_close(layer(x), layer(x.unsqueeze(0)).squeeze(0))


@each
def test_channels_last_stays_channels_last(rectifier):
    layer, twin = pair("Conv{}2d", rectifier, 4, 6, 3)
    x = image(2).detach().to(memory_format=torch.channels_last).requires_grad_()
    y = layer.to(memory_format=torch.channels_last)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, twin(x))
    y.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@each
def test_dtype_and_device_reach_both_modules(rectifier):
    layer = getattr(fr.nn, f"Conv{rectifier}2d")(4, 6, 3, dtype=torch.float64, device="meta")
    assert {(p.dtype, p.device.type) for p in layer.parameters()} == {(torch.float64, "meta")}


@each
def test_a_layer_is_a_sequential_of_torchs_modules(rectifier):
    layer, _ = pair("Conv{}2d", rectifier, 4, 6, 3)
    assert isinstance(layer, nn.Sequential) and type(layer[0]) is nn.Conv2d
    assert isinstance(layer[1], RECTIFIERS[rectifier][0])
    copied = pickle.loads(pickle.dumps(layer))
    x = image(2)
    assert torch.equal(copied(x), layer(x))


def test_defaults():
    assert fr.nn.ConvLeakyReLU2d(1, 1, 1)[1].negative_slope == nn.LeakyReLU().negative_slope
    assert torch.equal(fr.nn.ConvPReLU2d(1, 1, 1)[1].weight, nn.PReLU().weight)
    rrelu = fr.nn.ConvRReLU2d(1, 1, 1)[1]
    assert (rrelu.lower, rrelu.upper, rrelu.law) == (nn.RReLU().lower, nn.RReLU().upper, "slope")
    divisor = fr.nn.ConvRReLU2d(1, 1, 1, law="divisor")[1]
    assert (divisor.lower, divisor.upper) == (3, 8) and "divisor" in repr(divisor)


def test_wrong_arguments():
    with pytest.raises(RuntimeError, match="Lower bound"):
        fr.nn.ConvRReLU2d(1, 1, 1, lower=0.5, upper=0.1)
    with pytest.raises(ValueError, match="lower must be > 0"):
        fr.nn.ConvRReLU2d(1, 1, 1, lower=0, upper=0.1, law="divisor")
    with pytest.raises(TypeError, match="negative_slope"):
        fr.nn.ConvReLU2d(1, 1, 1, negative_slope=0.1)
    with pytest.raises(TypeError, match="activation must be ReLU, LeakyReLU, PReLU or RReLU, got GELU"):
        fr.nn.epilogue_arguments(nn.GELU())
    with pytest.raises(RuntimeError, match="weight must hold 1 or 6 values"):
        fr.nn.ConvPReLU2d(4, 6, 1, num_parameters=5)(torch.ones(1, 4, 2, 2))


def test_rrelu_is_random_in_training_alone():
    layer, x = fr.nn.ConvRReLU2d(4, 6, 1), torch.randn(2, 4, 5, 5)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    plain = fr.nn.RReLU(inplace=True)
    z = torch.full((3, 3), -1.0)
    assert plain(z) is z and (-z).min() >= 1 / 8 and (-z).max() <= 1 / 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_slopes(path, reentrant):
    layers = nn.Sequential(*(fr.nn.ConvRReLU2d(3, 3, 1) for _ in range(2)))
    x = torch.randn(2, 3, 4, requires_grad=True).unsqueeze(-1)
    gradients = []
    for run in (layers, lambda x: checkpoint(layers, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        gradients.append(torch.autograd.grad(run(x).square().sum(), x, retain_graph=True)[0] if not reentrant else None)
        if reentrant:
            torch.manual_seed(7)
            layers.zero_grad()
            run(x).square().sum().backward()
            gradients[-1] = layers[0][0].weight.grad.clone()
    assert torch.equal(*gradients)


# ---- memory, which is not time: a figure to hold ----


def training_peak(layer):
    torch.manual_seed(0)
    model = nn.Sequential(*(layer() for _ in range(8)))
    x = torch.randn(16, 64, 56, 56)

    def step():
        model(x).sum().backward()

    step()
    model.zero_grad(set_to_none=True)
    return peak_live_bytes(step)


def kept_for_backward(layer):
    """Bytes of the tensors that autograd keeps of eight layers, each storage once, but for the parameters."""
    model = nn.Sequential(*(layer() for _ in range(8)))
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(torch.randn(1, 32, 28, 28))
    y.sum()  # the graph, and with it what is kept, lives until here
    return sum(kept.values())


LAYERS = {
    "ours": lambda rectifier: lambda: getattr(fr.nn, f"Conv{rectifier}2d")(32, 32, 1),
    "eager": lambda rectifier: lambda: nn.Sequential(nn.Conv2d(32, 32, 1), getattr(nn, rectifier)()),
}


@pytest.mark.parametrize("rectifier, most", [("ReLU", 1.04), ("LeakyReLU", 0.56), ("PReLU", 1.0), ("RReLU", 0.40)])
def test_bytes_kept_for_backward_against_eager(path, rectifier, most):
    ours, theirs = (kept_for_backward(LAYERS[whose](rectifier)) for whose in ("ours", "eager"))
    assert ours <= most * theirs, f"{ours} bytes are {ours / theirs:.3f} of eager's {theirs}"


@pytest.mark.parametrize("rectifier, most", [("ReLU", 1.04), ("LeakyReLU", 0.65), ("PReLU", 1.0), ("RReLU", 0.45)])
def test_peak_live_bytes_of_training_against_eager(rectifier, most):
    ours = training_peak(lambda: getattr(fr.nn, f"Conv{rectifier}2d")(64, 64, 1))
    theirs = training_peak(lambda: nn.Sequential(nn.Conv2d(64, 64, 1), getattr(nn, rectifier)()))
    if fr.backends.name("cpu") == "eager":  # its temporaries: a product, a mask, slopes
        most = {"PReLU": 1.15, "RReLU": 0.7}.get(rectifier, most)
    assert ours <= most * theirs, f"{ours / 1e6:.0f} MB is {ours / theirs:.3f} of eager's {theirs / 1e6:.0f} MB"
