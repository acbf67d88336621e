"""Which gradients are None, which are zeros and which have values, in first and second order: as in eager torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from rectifying import of_layer
from torch import nn

import fused_rect as fr

ACTIVATIONS = {
    "relu": lambda: nn.ReLU(),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "leaky, slope < 0": lambda: nn.LeakyReLU(-0.5),
    "prelu": lambda: nn.PReLU(),
    "rrelu": lambda: nn.RReLU(),
    "prelu, a slope a channel": lambda: nn.PReLU(4),
}
MAPS = {
    "conv": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    "conv without bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 6)),
    "linear": (lambda: nn.Linear(3, 4), (5, 3)),
}
LAYERS = {"fr.nn": of_layer, "fuse": lambda pair: fr.fuse(copy.deepcopy(pair))}


def penalty(model, x):
    """R1, also of WGAN-GP: the squared norm of the gradient by the input."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return grad.square().sum()


LOSSES = {
    "loss": lambda model, x: model(x).square().sum(),
    "penalty": penalty,
    "penalty and loss": lambda model, x: penalty(model, x) + model(x).square().sum(),
    "of the gradients by the parameters": lambda model, x: sum(
        g.square().sum()
        for g in torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
    ),
    "of one gradient of the bias": lambda model, x: (
        torch.autograd.grad(model(x).sum(), list(model.parameters())[-1], create_graph=True)[0].square().sum()
    ),
}


def gradients(model, loss, x):
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    loss(model, x).backward()
    return {"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("linear_map", MAPS)
def test_none_zeros_and_values_as_in_eager(path, linear_map, activation, loss, layer):
    if path == "triton":
        pytest.skip("autograd is the same above every path, and the interpreter is slow")
    torch.manual_seed(0)
    make, shape = MAPS[linear_map]
    # A second pair behind the first, so that what a rectifier passes on has somewhere to go.
    pair = nn.Sequential(make(), ACTIVATIONS[activation]()).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = gradients(pair, LOSSES[loss], x)
    got = gradients(LAYERS[layer](pair), LOSSES[loss], x)
    for name, want in expected.items():
        kinds = [None if g is None else "zeros" if not g.any() else "values" for g in (want, got[name])]
        assert kinds[0] == kinds[1], (name, kinds)
        if want is not None and activation != "rrelu":  # whose slopes are drawn from another stream
            torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stepped", ["bias", "slope"])
def test_a_parameter_stepped_between_forward_and_backward(path, activation, stepped):
    """An optimizer's step in place: harmless or an error, as in eager."""
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Conv2d(3, 4, 3), ACTIVATIONS[activation]())
    x = torch.randn(2, 3, 6, 6)

    def outcome(model):
        y = model(x)
        parameter = model[0].bias if stepped == "bias" else getattr(model[1], "weight", model[0].bias)
        with torch.no_grad():
            parameter.add_(1)
        try:
            return torch.autograd.grad(y.square().sum(), list(model.parameters()))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            return None

    expected, got = outcome(copy.deepcopy(pair)), outcome(of_layer(pair))
    assert (expected is None) == (got is None)
    for a, b in zip(expected or (), got or (), strict=True):
        if activation == "rrelu":
            continue
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_users_do_to_the_output_in_place(path, activation):
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), ACTIVATIONS[activation]())
    if activation == "prelu, a slope a channel":
        pair[1] = nn.PReLU(3)
    x = torch.randn(2, 3, 6, 6)

    def added(model, x):
        y = model(x)
        y += x
        return y

    def dropped(model, x):
        torch.manual_seed(1)
        return F.dropout(model(x), 0.5, training=True, inplace=True)

    for use in (added, dropped, lambda model, x: F.hardtanh(model(x), -0.5, 0.5, inplace=True)):
        results = []
        # Torch's ReLU and RReLU keep their outputs, and refuse: theirs are copied first.
        for model in (lambda t: pair(t) * 1, of_layer(pair)):
            leaf = x.clone().requires_grad_()
            parameters = (pair if not results else model).parameters()
            y = use(model, leaf)
            results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters])])
        for a, b in zip(*results, strict=True):
            if activation != "rrelu":
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
