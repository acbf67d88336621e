"""What stands around a rectifier of a compiled graph is respected: values, dtypes and which gradients there are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import fused_rect as fr
from fused_rect import compile as fused_compile

HOWS = {"auto": fused_compile.How(), "all": fused_compile.ALL}


def rewritten(how):
    """A backend of the rewrite alone: the graph as AOTAutograd splits it, without Inductor's minutes of C++."""
    return lambda gm, inputs: (fused_compile.rewrite_graph_module(gm, how, {}), aot_eager(gm, inputs))[1]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Two convolutions and a PReLU for `function(model, x)`."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.p = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.PReLU(4)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def under_no_grad(m, x):
    z = m.a(x)
    with torch.no_grad():
        gate = F.relu(z)
    return gate * m.b(x)


@torch.no_grad()
def decorated(z):
    return F.leaky_relu(z, 0.2)


def behind_a_decorator(m, x):
    return decorated(m.a(x)) * m.b(x)


def set_grad_enabled(m, x):
    z = m.a(x)
    torch.set_grad_enabled(False)
    gate = z.relu()
    torch.set_grad_enabled(True)
    return gate * m.b(x)


def frozen_map(m, x):
    with torch.no_grad():
        z = m.a(x)
    return m.p(z)


def gradients_inside(m, x):
    with torch.no_grad():
        z = m.a(x)
        with torch.enable_grad():
            y = m.p(z)
    return y * m.b(x)


def inference_inside(m, x):
    z = m.a(x)
    with torch.inference_mode():
        gate = F.relu(z)
        total = gate.sum()
    return m.b(x), total


def autocast_inside(m, x):
    z = m.a(x)
    with torch.autocast("cpu", torch.bfloat16):
        return m.p(z)


def autocast_before(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        z = m.a(x)
    return F.leaky_relu(z, 0.2)


def autocast_of_a_bare_rectifier(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.p(torch.cat([m.a(x), m.b(x)]).float().abs().sub(0.3).float())


def autocast_left_inside(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        z = m.a(x)
        with torch.autocast("cpu", enabled=False):
            return F.relu(z.float() if z.dtype is torch.float32 else z)


def deterministic_inside(m, x):
    z = m.a(x)
    torch.use_deterministic_algorithms(True)
    y = F.relu(z)
    torch.use_deterministic_algorithms(False)
    return y


def hooks_disabled_inside(m, x):
    z = m.a(x)
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        y = F.relu(z)
    return y


def hooks_inside(m, x):
    z = m.a(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t):
        y = F.leaky_relu(z)
    return y


def rectifier_in_a_checkpoint(m, x):
    return checkpoint(F.relu, m.a(x), use_reentrant=False)


def map_in_a_checkpoint(m, x):
    return m.p(checkpoint(m.a, x, use_reentrant=False))


def both_in_a_checkpoint(m, x):
    return m.b(checkpoint(lambda t: F.pad(F.leaky_relu(m.a(t), 0.2)[:, :3], (1, 1, 1, 1)), x, use_reentrant=False))


def mode_elsewhere(m, x):
    z = m.a(x)
    with torch.no_grad():
        scale = x.mean()
    return F.relu(z) * scale


def detached(m, x):
    return F.relu(m.a(x).detach()) * m.b(x)


def read_twice(m, x):
    z = m.a(x)
    return F.leaky_relu(z, 0.2) + z


def edited_in_place(m, x):
    y = F.leaky_relu(m.a(x), 0.2)
    y += 1
    y.mul_(2)
    return y


def edited_by_another(m, x):
    y = F.leaky_relu(m.a(x), 0.2)
    y.add_(m.b(x))
    return y


def edited_by_index(m, x):
    y = m.p(m.a(x))
    y[:, 0] = 0
    return y


def edited_input_of_a_bare_rectifier(m, x):
    y = m.a(x) * 2
    z = F.leaky_relu(y, 0.1, inplace=True)
    return z + y


def transform_inside(m, x):
    z = m.a(x)
    return torch.func.vmap(F.relu)(z)


def transform_around(m, x):
    return torch.func.vmap(lambda t: F.leaky_relu(m.a(t), 0.2))(x[None])[0]


def jvp_around(m, x):
    return torch.func.jvp(lambda t: F.leaky_relu(m.a(t), 0.2), (x,), (torch.ones_like(x),))[1]


def same_rectifier_twice(m, x):
    return m.p(m.a(x)) + m.p(m.b(x))


CASES = [
    value
    for value in list(globals().values())
    if getattr(value, "__code__", None) and value.__code__.co_varnames[:2] == ("m", "x")
]


def outcome(function, module, x):
    """Outputs, their dtypes and whether they have a history, and every gradient or its absence."""
    x = x.clone().requires_grad_()
    outputs = function(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    wanted = [t for t in outputs if t.requires_grad]
    if wanted:
        torch.autograd.backward(wanted, [torch.randn_like(t) for t in wanted])
    facts = [(t.dtype, t.requires_grad, t.stride()) for t in outputs]
    return facts, list(outputs), [x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_a_compiled_model_means_what_it_means_in_eager(case, how):
    torch.manual_seed(0)
    model = Model(case)
    other = copy.deepcopy(model)
    x = torch.randn(2, 3, 6, 6)
    expected, got = outcome(model, model, x), outcome(torch.compile(other, backend=rewritten(HOWS[how])), other, x)
    assert got[0] == expected[0]
    for a, b in zip([*got[1], *got[2]], [*expected[1], *expected[2]], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            near = 3e-2 if torch.bfloat16 in (a.dtype, expected[0][0][0]) else 1e-5
            torch.testing.assert_close(a, b, rtol=near, atol=near)


@pytest.mark.parametrize(
    "case", [under_no_grad, frozen_map, autocast_inside, edited_in_place], ids=lambda f: f.__name__
)
def test_the_whole_backend_means_it_too(case):
    torch.manual_seed(0)
    model = Model(case)
    other = copy.deepcopy(model)
    x = torch.randn(2, 3, 6, 6)
    compiled = torch.compile(other, backend=fused_compile.backend, options={"fused_rect.sites": "all"})
    expected, got = outcome(model, model, x), outcome(compiled, other, x)
    assert got[0] == expected[0]
    assert [g is None for g in got[2]] == [g is None for g in expected[2]]


@pytest.mark.parametrize(
    "case", [under_no_grad, frozen_map, autocast_inside, deterministic_inside], ids=lambda f: f.__name__
)
def test_explain_says_that_the_mode_changes(case):
    report = fused_compile.explain(Model(case), torch.randn(2, 3, 6, 6), options={"fused_rect.sites": "all"})
    assert [site.fused for site in report] == [False]
    assert "between the two" in report[0].reason and "changes" in report[0].reason


@pytest.mark.parametrize("case", [both_in_a_checkpoint, same_rectifier_twice], ids=lambda f: f.__name__)
def test_sites_in_one_mode_are_ours(case):
    report = fused_compile.explain(Model(case), torch.randn(2, 3, 6, 6), options={"fused_rect.sites": "all"})
    assert report and all(site.fused for site in report), str(report)


def test_the_inductor_pass_respects_the_mode_too():
    from torch._inductor import config

    model = Model(under_no_grad)
    with config.patch(pre_grad_custom_pass=fused_compile.inductor_pass):
        torch.compile(model, backend="inductor")(torch.randn(2, 3, 6, 6)).sum().backward()
    assert model.a.weight.grad is None and model.b.weight.grad is not None


RECTIFIERS = {"relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.2), "prelu": nn.PReLU, "rrelu": nn.RReLU}


@pytest.mark.parametrize("name", RECTIFIERS)
def test_compiled_autograd_around_an_eager_forward(name):
    torch.manual_seed(0)
    model = fr.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), RECTIFIERS[name]()))
    x = torch.randn(2, 3, 6, 6)
    torch.manual_seed(1)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        model(x).square().sum().backward()
    for p, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, wanted)


@pytest.mark.parametrize("budget", [0.0, 0.5, 1.0])
def test_seeds_are_kept_under_every_memory_budget(budget):
    """Drawn again in backward, a slope would be another than in forward: grad / 2y is the slope, and y / z too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.RReLU(0.1, 0.9), nn.Conv2d(8, 8, 1), nn.RReLU(0.1, 0.9))
    with torch._functorch.config.patch(activation_memory_budget=budget):
        run = torch.compile(model, backend=fused_compile.backend, options={"fused_rect.sites": "all"})
        y = run(torch.randn(2, 3, 8, 8))
        y.sum().backward()
    _check_slopes(model, y)


def _check_slopes(model, y):
    """The last bias's gradient is the sum of the slopes that forward used, recovered from y."""
    last = model[2].bias
    positive = y > 0
    assert positive.any() and not positive.all()
    slopes = last.grad - positive.sum((0, 2, 3))
    negatives = (~positive).sum((0, 2, 3))
    mean = slopes[negatives > 0] / negatives[negatives > 0]
    assert ((mean > 0.1) & (mean < 0.9)).all()


def test_one_draw_for_all_seeds_of_a_graph_and_others_each_call():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.RReLU(), nn.Conv2d(4, 4, 1), nn.RReLU())
    graphs = []

    def record(gm, inputs):
        fused_compile.rewrite_graph_module(gm, fused_compile.ALL, {})
        graphs.append(gm)
        return gm.forward

    x = torch.randn(1, 3, 4, 4)
    run = torch.compile(model, backend=record)
    first, second = run(x), run(x)
    assert not torch.equal(first, second)
    draws = [node for node in graphs[0].graph.nodes if "seeds" in getattr(node.target, "__name__", "")]
    assert len(draws) == 1 and draws[0].args[0] == 2
    uses = [node for node in graphs[0].graph.nodes if node.target is fused_compile.calls.seed_of]
    assert len({node.args for node in uses}) == 2
