"""fuse and unfuse: the model computes the same in one pass, and everything else about it stays as it was."""

import copy
import io
import pickle
import time

import pytest
import torch
import torch.nn.functional as F
from fusing import Attributes, assert_same, fused_calls, image, sequential, value_and_gradients
from torch import nn

import fused_rect as fr
from fused_rect import fusion
from fused_rect.fusion import waiting


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


def test_fuse_adds_hooks_and_unfuse_takes_them_away():
    model = nn.Sequential(sequential(), Attributes())
    model[0][0].register_forward_hook(print)
    before = [(type(m), set(vars(m)), list(m._forward_hooks.values())) for m in model.modules()]
    text = repr(model)
    for _ in range(2):
        fr.fuse(model)
        after = [(type(m), set(vars(m))) for m in model.modules()]
        assert after == [b[:2] for b in before] and repr(model) == text
        assert sum(len(m._forward_hooks) for m in model.modules()) == 1 + 6 + 1
    fr.unfuse(model)
    assert [(type(m), set(vars(m)), list(m._forward_hooks.values())) for m in model.modules()] == before


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


def test_report_says_what_is_known_before_a_forward_and_what_ran_after_it():
    model, x = nn.Sequential(sequential(), nn.Conv2d(4, 3, 1), Attributes()), torch.randn(1, 3, 5, 5)
    known = [("0.0", "conv2d", "relu"), ("0.2", "conv2d", "prelu")]
    for reason in ("not called", "not run"):
        sites = fusion.report(model)
        assert [(s.where, s.linear_map, s.rectifier) for s in sites] == known
        assert not any(s.fused for s in sites) and all(reason in s.reason for s in sites)
        fr.fuse(model)
    model(x)
    sites = fusion.report(model)
    assert [s.where for s in sites] == ["0.0", "0.2", "2.first", "2.second", "2.rest.0", "2.rest.1"]
    assert all(s.fused for s in sites) and str(sites[3]) == "2.second: conv_transpose2d + prelu: fused"
    fr.unfuse(model)
    assert [s.where for s in fusion.report(model)] == ["0.0", "0.2"]


class NoPair(nn.Module):
    """Three statements that make one pair with a BatchNorm between, and a map that others read first."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        x = self.act(x)
        x = self.last(x)
        return x + self.act(x - 1)


def test_report_counts_no_pair_that_is_none_and_gives_the_reason_of_one_left():
    model, x = fr.fuse(NoPair()), torch.randn(2, 3, 4, 4)
    for training, reason in ((True, "in training"), (False, "fold_batchnorm")):
        model.train(training)(x)
        (site,) = fusion.report(model)
        assert site.where == "conv" and not site.fused and reason in site.reason
    fr.fuse(model, fold_batchnorm=True)(x)
    (site,) = fusion.report(model)
    assert site.fused
    model = fr.fuse(Slopes())
    model(x)
    (site,) = fusion.report(model)
    assert not site.fused and "arguments" in site.reason


CHANGES = {
    "add_": lambda z: z.add_(1),
    "clamp_": lambda z: z.clamp_(-1, 1),
    "a function in place": lambda z: F.dropout(z, 0.5, True, inplace=True),
    "a part": lambda z: z.__setitem__((slice(None), 0), 0),
    "a view": lambda z: z[:, :1].zero_(),
    "out": lambda z: torch.add(z.detach(), 1, out=z.detach()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_output_that_is_changed_in_place_makes_no_pair(change):
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            z = self.conv(x)
            change(z)
            return F.relu(z)

    model = Changes()
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 4, 4)
    for m in (fr.fuse(model), plain):
        torch.manual_seed(0)
        m.y = m(x)
        m.y.square().sum().backward()
    torch.testing.assert_close(model.y, plain.y)
    torch.testing.assert_close(model.conv.weight.grad, plain.conv.weight.grad)
    assert fusion.report(model) == []


class Slopes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return F.leaky_relu(self.conv(x), float("inf"))


def test_rrelu_draws_once_a_call_and_follows_the_mode():
    model, x = fr.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.RReLU(0.1, 0.4))), torch.randn(2, 3, 8, 8)
    layer = fr.nn.ConvRReLU2d(3, 4, 1, lower=0.1, upper=0.4)
    layer.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(model.eval()(x), F.leaky_relu(model[0](x), 0.25))


def test_symbolically_traced_models_and_their_copies():
    traced, x = torch.fx.symbolic_trace(sequential().double()), image()
    expected, code = value_and_gradients(traced, x), traced.code
    fr.fuse(traced)
    for model in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert fused_calls(model, x) == 2
        assert_same(model, x, expected)
        assert all(site.fused for site in fusion.report(model)) and len(fusion.report(model)) == 2
        assert fused_calls(fr.unfuse(model), x) == 0 and model.code == code


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
    assert fused_calls(model, x) == 1


def test_autocast_and_half_match_the_original():
    model, x = sequential(), torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        got = fr.fuse(model)(x)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


class Outer(Attributes):
    def forward(self, x):
        x = super(self.__class__, self).forward(x)
        return self.lrelu(self.rest[1](x))


def test_super_keeps_its_meaning():
    model, x = Outer(), torch.randn(1, 3, 4, 4)
    expected = model(x)
    assert fused_calls(fr.fuse(model), x) == 6
    torch.testing.assert_close(model(x), expected)


def test_fusing_a_large_model_takes_no_time():
    model = nn.Sequential(*(m for _ in range(279) for m in (nn.Conv2d(1, 1, 1), nn.ReLU())))
    start = time.process_time()
    fr.fuse(model)
    assert time.process_time() - start < 0.1


def test_small_outputs_are_left_to_torch_and_do_not_use_up_the_tries(monkeypatch):
    monkeypatch.setattr(waiting, "MIN_ELEMENTS", 2**14)
    model = fr.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU(0.2)))
    small, large = torch.randn(1, 3, 63, 65), torch.randn(1, 3, 64, 64)
    for _ in range(waiting.TRIES + 2):
        assert fused_calls(model, small) == 0
    (site,) = fusion.report(model)
    assert not site.fused and "fewer than 16384 elements" in site.reason
    assert fused_calls(model, large) == 1 and fused_calls(model, small) == 0
    (site,) = fusion.report(model)
    assert site.fused
    assert type(model[0](small)) is torch.Tensor and copy.deepcopy(model)(small).shape == (1, 4, 63, 65)
