"""fuse and unfuse: the model computes the same in one pass, and everything else about it stays as it was."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from fusing import Attributes, assert_same, fused_calls, image, sequential, value_and_gradients
from torch import nn

import fused_rect as fr
from fused_rect import fusion


@pytest.mark.parametrize(("make", "sites"), [(sequential, 2), (Attributes, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_same_values_and_gradients_with_every_site_fused(make, sites, training):
    model, x = make().double().train(training), image()
    expected = value_and_gradients(model, x)
    assert fr.fuse(model) is model
    assert fused_calls(model, x) == sites
    assert_same(model, x, expected)
    assert fused_calls(fr.unfuse(model), x) == 0
    assert_same(model, x, expected)


def test_branches_and_attributes_are_read_at_each_call():
    model, plain, x = Attributes().double(), Attributes().double(), image()
    plain.load_state_dict(fr.fuse(model).state_dict())
    for training, scale, twice in ((True, 3.0, True), (True, 5.0, False), (False, 2.0, True)):
        plain.train(training), model.train(training)
        torch.testing.assert_close(model(x, scale, twice=twice), plain(x, scale, twice=twice))
    plain.lrelu.negative_slope = model.lrelu.negative_slope = 0.7
    model.rest.append(copy.deepcopy(model.rest[0]))
    plain.rest.append(copy.deepcopy(model.rest[0]))
    torch.testing.assert_close(model(x), plain(x))


def test_unfuse_restores_classes_exactly():
    model = nn.Sequential(sequential(), Attributes())
    classes = [type(m) for m in model.modules()]
    text = repr(model)
    fr.fuse(model)
    assert [type(m) for m in model.modules()] != classes and repr(model) == text
    fr.fuse(model)
    fr.unfuse(model)
    assert [type(m) for m in model.modules()] == classes


def test_parameters_keys_optimizer_and_modes_are_kept():
    model, x = nn.Sequential(sequential(), nn.Conv2d(4, 3, 1), Attributes()).double(), image()
    state, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    fr.fuse(model)
    assert list(model.state_dict()) == state and [id(p) for p in model.parameters()] == parameters
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        m(x).square().mean().backward()
        o.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    model.load_state_dict(twin.state_dict())
    assert not model.eval()[2].training and model.train()[2].training
    assert model.to(torch.float32)[0][0].weight.dtype is torch.float32
    assert fused_calls(model, x.float()) == 7


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_fused_and_independent(copier):
    model, x = fr.fuse(nn.Sequential(sequential(), nn.Conv2d(4, 3, 1), Attributes())), torch.randn(1, 3, 5, 5)
    if copier == "deepcopy":
        twin = copy.deepcopy(model)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert fused_calls(twin, x) == fused_calls(model, x) == 7
    torch.testing.assert_close(twin(x), model(x))
    with torch.no_grad():
        twin[0][0].weight.zero_()
    assert model[0][0].weight.abs().sum() > 0
    assert type(fr.unfuse(twin)[2]) is Attributes


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Quiet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        z = self.conv(x)
        return F.relu(z) + z


def test_what_cannot_be_fused_is_left_as_it_was():
    own = nn.Sequential(OwnConv(3, 3, 1), nn.ReLU())
    quiet = Quiet()
    replaced = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    replaced[0].forward = lambda x: x
    x = torch.randn(1, 3, 2, 2)
    for model in (own, quiet, replaced):
        expected = model(x)
        fr.fuse(model)
        assert fused_calls(model, x) == 0
        torch.testing.assert_close(model(x), expected)
    assert "replaced on the instance" in fusion.report(replaced)[0].reason
    assert type(quiet) is Quiet


def test_report_names_every_site_and_reason():
    model = Attributes()
    sites = {site.where: site for site in fusion.report(model)}
    assert sites["first"].fused and (sites["first"].linear_map, sites["first"].rectifier) == ("conv2d", "leaky_relu")
    assert sites["second"].rectifier == "prelu" and "rest[0]" in sites
    assert "decided at each call" in sites["conv"].reason
    assert str(sites["first"]) == "first: conv2d + leaky_relu: fused"
    assert [s.where for s in fusion.report(nn.Sequential(sequential()))] == ["0.0", "0.2"]


def test_rrelu_draws_once_a_call_and_follows_the_mode():
    model, x = fr.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.RReLU(0.1, 0.4))), torch.randn(2, 3, 8, 8)
    layer = fr.nn.ConvRReLU2d(3, 4, 1, lower=0.1, upper=0.4)
    layer.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(model.eval()(x), F.leaky_relu(model[0](x), 0.25))


def test_symbolically_traced_models_are_rewritten_and_restored():
    traced, x = torch.fx.symbolic_trace(sequential().double()), image()
    expected, code = value_and_gradients(traced, x), traced.code
    fr.fuse(traced)
    assert fused_calls(traced, x) == 2
    assert_same(traced, x, expected)
    assert_same(copy.deepcopy(traced), x, expected)
    assert all(site.fused for site in fusion.report(traced)) and len(fusion.report(traced)) == 2
    fr.unfuse(traced)
    assert fused_calls(traced, x) == 0 and traced.code == code
    assert_same(traced, x, expected)


class Body(nn.Module):
    """The pairs are never spelt: a loop calls what a list holds."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)])
        self.scale = 2

    def forward(self, x):
        out = x
        for i in range(len(self.body)):
            out = self.body[i](out)
        return out * self.scale + x


def test_a_loop_over_a_list_is_traced_and_guarded():
    model, x = Body().double(), image()
    expected = value_and_gradients(model, x)
    assert [s.where for s in fusion.report(model)] == ["body.0", "body.2"]
    assert fused_calls(fr.fuse(model), x) == 2
    assert_same(model, x, expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fused_calls(twin, x) == 2
        assert_same(twin, x, expected)
    model.scale = 3
    plain = Body().double()
    plain.load_state_dict(model.state_dict())
    plain.scale = 3
    torch.testing.assert_close(model(x), plain(x))
    model.body.append(nn.Conv2d(3, 3, 1).double())
    plain.body.append(model.body[-1])
    torch.testing.assert_close(model(x), plain(x))
    assert type(fr.unfuse(model)) is Body and "_fused_rect_traced" not in model.__dict__


def test_a_fused_model_traces_as_the_original_did():
    model = Attributes().eval()
    graph = str(torch.fx.symbolic_trace(model).graph)
    assert str(torch.fx.symbolic_trace(fr.fuse(model)).graph) == graph


def test_a_fused_model_compiles_in_one_graph():
    model, x = Attributes(), torch.randn(2, 3, 6, 6)
    expected = model(x)
    torch._dynamo.reset()
    run = torch.compile(fr.fuse(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(x), expected)


@pytest.mark.parametrize("shape", [(3, 6, 6), (0, 3, 6, 6)])
def test_unbatched_and_empty_inputs(shape):
    model, x = sequential(), torch.randn(shape)
    expected = model(x)
    torch.testing.assert_close(fr.fuse(model)(x), expected)


def test_prelus_slopes_go_along_dim_1_as_torchs_do():
    """(N, T, features): torch's PReLU has a slope for each T there, and none for each feature."""
    model, x = nn.Sequential(nn.Linear(3, 5), nn.PReLU(4)), torch.randn(2, 4, 3)
    nn.init.uniform_(model[1].weight)
    expected = model(x)
    torch.testing.assert_close(fr.fuse(model)(x), expected)
    assert fused_calls(model, x) == 0


def test_autocast_and_half_match_the_original():
    model, x = sequential(), torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        got = fr.fuse(model)(x)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


class Outer(Attributes):
    def forward(self, x):
        x = super().forward(x)
        return self.lrelu(self.rest[1](x))


def test_super_keeps_its_meaning():
    model, x = Outer(), torch.randn(1, 3, 4, 4)
    expected = model(x)
    assert fused_calls(fr.fuse(model), x) >= 1
    torch.testing.assert_close(model(x), expected)
