"""fuse on the ways in which people write a forward: each is fused, and computes the same."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from fusing import fused_calls
from torch import nn

import fused_rect as fr
from fused_rect import fusion


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.act = nn.LeakyReLU(0.3, inplace=True)


class InPlaceFunction(Base):
    def forward(self, x):
        return torch.relu_(self.conv(x))


class Method(Base):
    def forward(self, x):
        return self.conv(x).relu_() + x


class FunctionAttribute(Base):
    def __init__(self):
        super().__init__()
        self.function = F.relu

    def forward(self, x):
        return self.function(self.conv(x))


class TwoNames(Base):
    def forward(self, x):
        z = self.conv(x)
        y = self.act(z)
        return y + x


class Chain(Base):
    """The pair is not the innermost one, and a module that is neither follows."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.act(self.conv(self.first(x))))


class Dictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 1), "act": nn.PReLU(3)})

    def forward(self, x):
        return self.m["act"](self.m["conv"](x))


class Private(nn.Module):
    def __init__(self):
        super().__init__()
        self.__conv, self.__act = nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        return self.__act(self.__conv(x))


class OutputSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act = nn.ConvTranspose2d(3, 3, 3, stride=2), nn.ReLU()

    def forward(self, x):
        return self.act(self.up(x, output_size=[14, 14]))


class Circular(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x))


class Zipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
        self.acts = nn.ModuleList([nn.ReLU(), nn.PReLU()])

    def forward(self, x):
        for conv, act in zip(self.convs, self.acts):
            x = act(conv(x))
        return x


class Keyword(Base):
    def forward(self, x):
        return F.leaky_relu(input=self.conv(x), negative_slope=0.2)


class OtherName(Base):
    def forward(this, x):
        return this.act(this.conv(x))


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0, self.conv1, self.act = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU()

    def forward(self, x):
        for i in range(2):
            x = self.act(getattr(self, f"conv{i}")(x))
        return getattr(self, "act")(getattr(self, "conv0")(x))  # noqa: B009


class Subclassed(nn.Sequential):
    pass


class OwnReLU(nn.ReLU):
    pass


class Helper(Base):
    def features(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.act(self.features(x))


class ReadTwice(Base):
    """The rectifier writes into z, which is read again: both readers see the rectified values."""

    def forward(self, x):
        z = self.conv(x)
        y = self.act(z)
        return y + z


class Global(Base):
    def forward(self, x):
        global kept
        kept = self.conv(x)
        y = self.act(kept)
        return y


def doubled(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args) * 2

    return call


class Decorated(Base):
    @doubled
    def forward(self, x):
        return self.act(self.conv(x))


class OwnFunction(Base):
    def __init__(self):
        super().__init__()
        self.function = functools.partial(F.leaky_relu, negative_slope=0.2)

    def forward(self, x):
        return self.function(self.conv(x))


class Between(Base):
    """`nn.Identity`, a branch, an annotation and other statements between."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()

    def forward(self, x):
        y: torch.Tensor = self.conv(x)
        x = x[:, :, 1:-1]
        if self.training:
            y = self.norm(y)
        n, c = y.shape[:2]
        assert y.is_floating_point() and n
        y = self.act(y) * c
        return y.sum() + x.sum()


class Standardized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x)


class Border(Base):
    def __init__(self):
        super().__init__()
        self.conv = Wrapped()

    def forward(self, x):
        return self.act(self.conv(x))


class LoopTop(Base):
    def __init__(self):
        super().__init__()
        self.ups = nn.ModuleList([nn.Conv2d(3, 3, 1)] * 2)

    def forward(self, x):
        x = self.conv(x)
        for up in self.ups:
            x = up(F.leaky_relu(x, 0.1))
        return x


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)])

    def forward(self, x):
        for i in range(len(self.body)):
            x = self.body[i](x)
        return x


class Functions(Base):
    def forward(self, x):
        x = F.prelu(self.conv(x), x.new_full((1,), 0.2))
        return torch.rrelu(self.conv(F.rrelu(self.conv(x), 0.2, 0.3)), 0.1, 0.1, True)


class Alone(Base):
    """The bias stands apart: no pair of a map and a rectifier."""

    def forward(self, x):
        return self.act(self.conv(x) + 1)


FUSED = {
    Helper: 1,
    ReadTwice: 1,
    Global: 1,
    Decorated: 1,
    OwnFunction: 1,
    Between: 1,
    Border: 1,
    LoopTop: 2,
    Body: 2,
    Functions: 3,
    functools.partial(nn.Sequential, Standardized(3, 3, 1), nn.ReLU()): 1,
    functools.partial(nn.Sequential, nn.Conv2d(3, 3, 1), nn.Dropout(0.0), nn.Identity(), nn.ReLU()): 1,
    InPlaceFunction: 1,
    Method: 1,
    FunctionAttribute: 1,
    TwoNames: 1,
    Dictionary: 1,
    Private: 1,
    OutputSize: 1,
    Circular: 1,
    Chain: 1,
    Zipped: 2,
    Keyword: 1,
    OtherName: 1,
    ByName: 3,
    functools.partial(nn.Sequential, nn.Conv2d(3, 3, 1), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))): 1,
    functools.partial(nn.Sequential, nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), nn.ReLU()): 1,
    functools.partial(nn.Sequential, nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Sequential(), nn.Sequential(nn.ReLU())): 1,
    functools.partial(nn.Sequential, nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Conv2d(3, 3, 1), nn.ReLU()): 2,
    functools.partial(Subclassed, nn.Conv2d(3, 3, 1), OwnReLU()): 1,
}


def converted(make):
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    fr.fuse(model)
    calls = fused_calls(model, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    return calls, fusion.report(model)


@pytest.mark.parametrize("make", FUSED)
def test_it_is_fused(make):
    calls, report = converted(make)
    assert calls == FUSED[make] and all(site.fused for site in report) and report, [str(s) for s in report]


def test_a_rectifier_shared_in_a_sequential_is_reported_wherever_it_stands():
    act = nn.ReLU()
    calls, report = converted(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), act, nn.Conv2d(3, 3, 1), act))
    assert calls == 2 and [site.where for site in report] == ["0", "2"]


def test_a_hook_on_a_sequential_inside_is_honoured():
    model, seen = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.ReLU()), []
    hook = model[0].register_forward_hook(lambda m, args, out: seen.append(out.min()))
    fr.fuse(model)
    x = torch.randn(1, 3, 4, 4)
    assert fused_calls(model, x) == 0 and fusion.report(model) == [] and seen[0] < 0
    hook.remove()
    assert fused_calls(model, x) == 1 and [site.where for site in fusion.report(model)] == ["0.0"]


def test_what_is_no_pair_is_left_and_not_reported():
    calls, report = converted(Alone)
    assert calls == 0 and report == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_reported_and_refuses_a_fused_model():
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.PReLU()), torch.randn(1, 3, 4, 4)
    scripted = torch.jit.script(model)
    assert fr.fuse(scripted) is scripted
    (site,) = fusion.report(scripted)
    assert not site.fused and "TorchScript" in site.reason and site.rectifier == "prelu"
    fr.fuse(model)
    with pytest.raises(RuntimeError, match="unfuse"):
        torch.jit.script(model)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))
    assert "prelu" in str(traced.inlined_graph)
    torch.testing.assert_close(torch.jit.script(fr.unfuse(model))(x), traced(x))


CALLS = ["F.relu(x)", "torch.relu(x)", "x.relu()", "F.leaky_relu(x, 0.1)", "torch._C._nn.leaky_relu(x, 0.1)"]
CALLS += [
    "F.prelu(x, w)",
    "torch.prelu(x, w)",
    "x.prelu(w)",
    "F.rrelu(x)",
    "torch.rrelu(x)",
    "self.act(x)",
    "self.prelu(x)",
]
READERS = ["y = {}; return y + x", "return {} + x", "z = x; x = {}; return x + z", "z = [x]; x = {}; return x + z[0]"]
READERS += [
    "return (lambda y: y + x)({})",
    "x, z = {}, x; return x + z",
    "try: return {} + 1\n        finally: self.z = x",
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("reader", READERS)
def test_an_input_that_is_read_later_is_not_overwritten(call, reader):
    scope = {"torch": torch, "F": F, "nn": nn}
    source = f"class Net(nn.Module):\n    def forward(self, x, w):\n        x = self.conv(x); {reader.format(call)}\n"
    exec(source.replace("; try:", "\n        try:"), scope)
    model = scope["Net"]()
    model.conv, model.act, model.prelu, model.z = nn.Conv2d(3, 3, 1), nn.LeakyReLU(-0.3), nn.PReLU(3), None
    x, w = torch.randn(2, 3, 4, 4), torch.full((3,), 0.3)
    with torch.no_grad():
        expected, kept = model(x, w), model.z
        got = fr.fuse(model)(x, w)
    assert torch.equal(got, expected) and (kept is None or torch.equal(model.z, kept))


@pytest.mark.parametrize("length", [2, 4])
def test_slopes_of_another_length_are_refused_as_they_were(length):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return F.prelu(self.conv(x), x.new_ones(length))

    model, x = Net(), torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError) as expected:
        model(x)
    with pytest.raises(RuntimeError) as got:
        fr.fuse(model)(x)
    assert str(got.value) == str(expected.value)
    (site,) = fusion.report(model)
    assert not site.fused and "arguments" in site.reason
