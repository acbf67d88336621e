"""The torch.compile backend, the Inductor pass and explain."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_rect
from fused_rect import compile as fused_compile
from fused_rect.compile import placement

ALL = {"fused_rect.sites": "all"}
RECTIFIERS = {"relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.2), "prelu": nn.PReLU, "rrelu": nn.RReLU}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Tower(nn.Module):
    """Every kind of linear map, with and without bias, ahead of one shared rectifier."""

    def __init__(self, activation):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1, bias=False)
        self.linear = nn.Linear(8, 5)
        self.activation = activation

    def forward(self, x):
        z = self.activation(self.up(self.activation(self.conv(x))))
        return self.activation(self.linear(z.unflatten(2, (-1, 2)).flatten(3)[..., :8]))


def compiled(model, **keywords):
    return torch.compile(model, backend=fused_compile.backend, fullgraph=True, **keywords)


def gradients(function, x, parameters):
    y = function(x)
    return y, torch.autograd.grad(y.square().sum(), [x, *parameters])


@pytest.mark.parametrize("name", ["relu", "leaky", "prelu"])
def test_training_matches_eager_with_every_site_fused(name):
    torch.manual_seed(0)
    model = Tower(RECTIFIERS[name]()).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert len(fused_compile.explain(model, x, options=ALL).fused) == 3
    y, got = gradients(compiled(model, options=ALL), x, model.parameters())
    expected, wanted = gradients(model, x, model.parameters())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_rrelu_trains_under_fullgraph():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 1)
    model = nn.Sequential(conv, nn.RReLU(0.1, 0.4))
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    assert len(fused_compile.explain(model, x, options=ALL).fused) == 1
    run = compiled(model, options=ALL)
    y, z = run(x), conv(x)
    slopes = (y / z)[z < 0]
    assert slopes.min() >= 0.1 and slopes.max() <= 0.4 and abs(slopes.mean() - 0.25) < 0.01 and slopes.std() > 0.08
    torch.testing.assert_close(y[z > 0], z[z > 0])
    (grad,) = torch.autograd.grad(y.sum(), conv.bias)
    torch.testing.assert_close(grad, (y / z).sum((0, 2, 3)), rtol=1e-4, atol=1e-3)
    assert not torch.equal(run(x), y), "every call draws new slopes"


def test_rrelu_draws_eagers_slopes_under_fallback_random():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.RReLU())
    import fused_rect as fr

    layer = fr.nn.ConvRReLU2d(3, 4, 1)
    layer.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    run = compiled(model, options={"fallback_random": True, **ALL})
    torch.manual_seed(5)
    got = run(x)
    torch.manual_seed(5)
    torch.testing.assert_close(got, layer(x))


def test_a_bare_rrelu_compiles_too():
    x = torch.randn(512, requires_grad=True)
    y = compiled(lambda t: F.rrelu(t * 2, 0.1, 0.3, True), options=ALL)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, y.detach() / x.detach())
    slopes = (grad / 2)[x < 0]
    assert 0.1 <= slopes.min() < slopes.max() <= 0.3


def test_inference_and_evaluation_mode():
    model = Tower(nn.RReLU()).eval()
    x = torch.randn(2, 3, 4, 4)
    run = compiled(model, options=ALL)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
    with torch.inference_mode():
        torch.testing.assert_close(run(x), model(x))


def test_dynamic_shapes_compile_no_more_often_than_under_inductor_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1), nn.Conv2d(4, 4, 3), nn.PReLU())
    graphs = []
    for run in (torch.compile(model, dynamic=True), compiled(model, dynamic=True, options=ALL)):
        for shape in ((5, 3, 9, 12), (7, 3, 13, 16), (10, 3, 20, 24), (12, 3, 27, 33)):
            x = torch.randn(shape)
            torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
            run(x).sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"].pop("unique_graphs"))
        torch._dynamo.reset()
    assert graphs[1] <= graphs[0]


def test_dynamic_float_arguments_reach_the_op():
    weight = torch.randn(4, 3, 1, 1)
    run = compiled(lambda x, slope: F.leaky_relu(F.conv2d(x, weight), slope), dynamic=True, options=ALL)
    x = torch.randn(2, 3, 5, 5)
    for slope in (0.3, 0.7, 0.0, -0.5):
        torch.testing.assert_close(run(x, slope), F.leaky_relu(F.conv2d(x, weight), slope))


SPELLINGS = {
    "F.relu": lambda z, w: F.relu(z),
    "F.relu inplace": lambda z, w: F.relu(z, inplace=True),
    "F.relu_": lambda z, w: F.relu_(z),
    "torch.relu": lambda z, w: torch.relu(z),
    "torch.relu_": lambda z, w: torch.relu_(z),
    ".relu": lambda z, w: z.relu(),
    ".relu_": lambda z, w: z.relu_(),
    "F.leaky_relu": lambda z, w: F.leaky_relu(z, 0.3),
    "F.leaky_relu keyword": lambda z, w: F.leaky_relu(z, negative_slope=0.3, inplace=True),
    "F.leaky_relu_": lambda z, w: F.leaky_relu_(z, 0.3),
    "F.prelu": lambda z, w: F.prelu(z, w),
    "torch.prelu": lambda z, w: torch.prelu(z, w),
    ".prelu": lambda z, w: z.prelu(w),
    "F.rrelu": lambda z, w: F.rrelu(z, 0.1, 0.3),
    "F.rrelu keywords": lambda z, w: F.rrelu(z, lower=0.1, upper=0.3, training=False, inplace=True),
    "torch.rrelu": lambda z, w: torch.rrelu(z, 0.1, 0.3),
    "F.rrelu_": lambda z, w: F.rrelu_(z, 0.1, 0.3),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_fused(spelling):
    rectify = SPELLINGS[spelling]
    weight, bias, slope = torch.randn(4, 3, 3), torch.randn(4), torch.tensor([0.2])
    x = torch.randn(2, 3, 9)

    def function(x):
        return rectify(F.conv1d(x, weight, bias=bias, stride=2), slope)

    report = fused_compile.explain(function, x, options=ALL)
    assert [site.fused for site in report] == [True], str(report)
    run = torch.compile(
        function, backend=lambda gm, _: (fused_compile.rewrite_graph_module(gm, fused_compile.ALL, {}), gm.forward)[1]
    )
    torch.testing.assert_close(run(x), function(x))


def test_explain_names_the_reason_of_each_unfused_site():
    conv = nn.Conv2d(3, 3, 1)

    def used_twice(x):
        z = conv(x)
        return F.relu(z) + z

    report = fused_compile.explain(used_twice, torch.randn(1, 3, 2, 2), options=ALL)
    assert not report.fused and "2 users" in report[0].reason
    assert str(report).startswith("0 of 1 rectifiers are ours") and "conv2d + relu" in str(report)


def test_a_write_to_the_convolutions_input_stays_behind_it():
    conv = nn.Conv2d(3, 3, 1).requires_grad_(False)

    def function(x):
        x = x.clone()
        z = conv(x)
        x.add_(100)
        return F.relu(z) + x

    x = torch.randn(1, 3, 4, 4)
    assert len(fused_compile.explain(function, x, options=ALL).fused) == 1
    torch.testing.assert_close(compiled(function, options=ALL)(x), function(x))


def test_a_slope_computed_after_the_convolution_is_left():
    conv = nn.Conv2d(3, 3, 1)
    report = fused_compile.explain(
        lambda x, w: F.prelu(conv(x), w * 2), torch.randn(1, 3, 2, 2), torch.tensor([0.1]), options=ALL
    )
    assert not report.fused and "computed after" in report[0].reason


def test_prelus_slopes_beside_the_channels_are_left():
    model, x = nn.Sequential(nn.Linear(3, 5), nn.PReLU(4)), torch.randn(2, 4, 3)
    report = fused_compile.explain(model, x, options=ALL)
    assert not report.fused and "do not go along the channels" in report[0].reason
    torch.testing.assert_close(compiled(model, options=ALL)(x), model(x))


def test_mode_and_options_reach_inductor(monkeypatch):
    import torch._inductor.compile_fx as inductor

    seen = {}

    def record(gm, inputs, config_patches=None):
        seen.update(config_patches or {})
        return gm.forward

    monkeypatch.setattr(inductor, "compile_fx", record)
    x = torch.randn(2, 3)
    compiled(nn.Linear(3, 2), mode="max-autotune-no-cudagraphs")(x)
    assert seen["max_autotune"] is True
    torch._dynamo.reset()
    compiled(nn.Linear(3, 2), options={"max_fusion_size": 7, **ALL})(x)
    assert seen["max_fusion_size"] == 7 and "fused_rect.sites" not in seen


def test_sites_that_inductor_runs_as_fast_are_left_to_it(monkeypatch):
    x = torch.randn(2, 3, 6, 6)

    def sites(rectifier, training=True):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), rectifier).train(training)
        with torch.set_grad_enabled(training):
            (site,) = fused_compile.explain(model, x)
        return site

    for rectifier in (nn.ReLU(), nn.LeakyReLU(), nn.PReLU(), nn.RReLU()):
        assert "no gradient is wanted" in sites(rectifier, training=False).reason
    assert sites(nn.ReLU()).fused and sites(nn.LeakyReLU()).fused
    assert "PReLU is as fast" in sites(nn.PReLU()).reason
    monkeypatch.setattr(fused_rect.backends, "name", lambda device: "eager")
    assert "no native CPU path" in sites(nn.RReLU()).reason
    monkeypatch.setattr(fused_rect.backends, "name", lambda device: "native")
    assert sites(nn.RReLU()).fused


def test_small_outputs_are_inductors_on_cpus(monkeypatch):
    least = 2**11
    monkeypatch.setattr(placement, "MIN_ELEMENTS", least)

    def site(rectifier, width, **options):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), rectifier)
        return fused_compile.explain(model, torch.randn(1, 3, 16, width), options=options)[0]

    assert site(nn.LeakyReLU(), 32).fused
    assert f"fewer than {least} elements" in site(nn.LeakyReLU(), 31).reason
    assert site(nn.LeakyReLU(), 31, **ALL).fused and site(nn.RReLU(), 31).fused  # whose slopes are eager's
    assert str(least) in fused_compile.inductor_pass.uuid()  # a cached graph is that of another number

    def traced(gm, _):
        assert all(site.fused for site in fused_compile.rewrite_graph_module(gm, fused_compile.How(), {}))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU()), backend=traced, dynamic=True)(
        torch.ones(1, 3, 2, 2)
    )


def test_a_relu_whose_output_a_convolution_keeps_is_inductors_on_cpus():
    inner, last = fused_compile.explain(layers(nn.ReLU), torch.randn(1, 16, 6, 6))
    assert not inner.fused and "ReLU is as fast" in inner.reason
    assert last.fused
    assert all(site.fused for site in fused_compile.explain(layers(nn.LeakyReLU), torch.randn(1, 16, 6, 6)))


@pytest.mark.parametrize(("count", "copies"), [(3, 0), (4, 2)])
def test_convolutions_on_cpus_are_channels_last_where_there_are_many(count, copies):
    """Each site in the layout that its convolution has, the last one's too: Inductor copies in and out, and no more."""
    model = nn.Sequential(*(m for _ in range(count) for m in (nn.Conv2d(16, 16, 1), nn.LeakyReLU(0.2))))
    run, x = compiled(model), torch.randn(2, 16, 12, 12, requires_grad=True)
    forward = generated(lambda: run(x))[0]
    assert len(kernels(forward)) == copies and forward.count("fused_rect.rectify_bits_.default(") >= count
    torch.testing.assert_close(gradients(run, x, model.parameters()), gradients(model, x, model.parameters()))


def test_every_rectifier_trains_with_the_sites_chosen_for_it():
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    for make in RECTIFIERS.values():
        torch._dynamo.reset()
        conv = nn.Conv2d(3, 4, 3)
        y = compiled(nn.Sequential(conv, make()))(x)
        (grad,) = torch.autograd.grad(y.sum(), conv.bias)
        z = conv(x)
        torch.testing.assert_close(grad, (y / z).sum((0, 2, 3)), rtol=1e-3, atol=1e-3)


def generated(run):
    """The text of the programs that Inductor writes while ``run`` compiles."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        return run_and_get_code(run)[1]


def kernels(code):
    """The calls of Inductor's own kernels in a program."""
    return [line for line in code[code.index("def call(") :].splitlines() if line.strip().startswith("cpp_fused")]


def layers(rectifier):
    return nn.Sequential(nn.Conv2d(16, 16, 3), rectifier(), nn.Conv2d(16, 16, 3), rectifier())


@pytest.mark.parametrize("name", ["leaky", "rrelu"])
def test_a_compiled_training_step_is_convolutions_and_ours_without_a_copy(name):
    """Inductor's channels-last convolutions would put two copies around each site."""
    x = torch.randn(2, 16, 12, 12)
    run = compiled(layers(RECTIFIERS[name]), options=ALL)
    forward, backward = generated(lambda: run(x).sum().backward())
    calls = forward[forward.index("def call(") :]
    assert calls.count("fused_rect.rectify_bits_.default(") == 2 and calls.count("extern_kernels.convolution(") == 2
    assert all("randint" in line for line in kernels(forward)), kernels(forward)
    assert backward[backward.index("def call(") :].count("= torch.ops.fused_rect.rectify_backward") == 2
    assert len(kernels(backward)) <= 1, kernels(backward)  # the gradient of the sum


@pytest.mark.parametrize("name", ["leaky", "rrelu"])
def test_layouts_that_inductor_chooses_keep_the_gradients(name):
    """Channels-last inside the compiled step: no copy between the layers, and random slopes that backward repeats."""
    x = torch.randn(2, 16, 12, 12, requires_grad=True)
    conv = nn.Conv2d(16, 16, 3)
    model = nn.Sequential(conv, RECTIFIERS[name](), nn.Conv2d(16, 16, 3, bias=False), nn.LeakyReLU(0.3))
    run = compiled(model, options={**ALL, "layout_optimization": True, "fallback_random": True})
    torch.manual_seed(1)
    forward = generated(lambda: run(x))[0]
    torch.manual_seed(1)
    y, got = gradients(run, x, model.parameters())
    torch.manual_seed(1)
    expected, wanted = gradients(fused_rect.fuse(copy.deepcopy(model)), x, [])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-4, atol=1e-5)
    if name == "leaky":
        assert len(kernels(forward)) == 2, kernels(forward)  # into the layout and out of it, once


def test_the_backend_is_found_by_its_name_in_a_process_that_never_imported_us(tmp_path):
    """The flagship: a training RReLU, which plain torch knows no lowering for, in one graph."""
    program = """
import sys, torch
from torch import nn
assert "fused_rect" in torch._dynamo.list_backends() and "fused_rect" not in sys.modules
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.RReLU(0.1, 0.4))
x = torch.randn(2, 3, 9, 9)
y = torch.compile(model, backend="fused_rect", fullgraph=True)(x)
y.sum().backward()
z = model[0](x)
slopes = (y / z)[z < 0]
assert 0.09 < slopes.min() < slopes.max() < 0.41 and slopes.std() > 0.05
torch.testing.assert_close(model[0].bias.grad, (y / z).sum((0, 2, 3)), rtol=1e-3, atol=1e-3)
assert "fused_rect" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_an_unknown_choice_of_sites_is_refused():
    with pytest.raises(ValueError, match="must be 'auto' or 'all'"):
        fused_compile.explain(nn.Linear(3, 2), torch.randn(2, 3), options={"fused_rect.sites": "some"})


def test_inductor_pass_serves_the_plain_backend():
    from torch._inductor import config

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.RReLU())
    x = torch.randn(2, 3, 6, 6)
    with config.patch(pre_grad_custom_pass=fused_compile.inductor_pass):
        y = torch.compile(model, backend="inductor", fullgraph=True)(x)
    z = model[0](x)
    slopes = (y / z)[z < 0]
    assert 1 / 8 - 1e-6 <= slopes.min() < slopes.max() <= 1 / 3 + 1e-6
    assert fused_compile.inductor_pass.uuid().startswith("fused_rect-rewrite-")


def test_autocast_inside_and_around_the_compiled_region():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Conv2d(4, 4, 3), nn.LeakyReLU())
    x = torch.randn(2, 3, 8, 8)
    run = compiled(model, options=ALL)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = run(x), model(x)
        y.sum().backward()
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)


def test_checkpointed_regions_are_rewritten():
    from torch.utils.checkpoint import checkpoint

    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.RReLU())
    x = torch.randn(2, 3, 8, 8, requires_grad=True)

    def function(x):
        return checkpoint(block, x, use_reentrant=False)

    assert len(fused_compile.explain(function, x, options=ALL).fused) == 1
    y = compiled(function, options=ALL)(x)
    (grad,) = torch.autograd.grad(y.sum(), block[0].bias)
    torch.testing.assert_close(grad, (y / block[0](x)).sum((0, 2, 3)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("view", [False, True])
def test_double_backward_says_what_it_cannot_do_and_eager_does_it(view):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.RReLU(), nn.Flatten() if view else nn.Identity())
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    run = compiled(model, options=ALL)
    for _ in range(3):  # of each call's graph
        (grad,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"fused_rect\.fuse\(model\) keeps the fused ops"):
            grad.sum().backward()
    layer = fused_rect.fuse(copy.deepcopy(model).eval())
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    grad.sum().backward()
    assert layer[0].weight.grad is not None


def test_a_compiled_model_survives_a_copy():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU())
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(compiled(copy.deepcopy(model), options=ALL)(x), model(x))


def test_looking_at_the_inductor_pass_changes_nothing():
    program = """
import fused_rect.compile as c
from torch._inductor import config, lowering

def state():
    return set(lowering.lowerings), set(lowering.fallbacks), config.save_config_portable()

before = state()
assert c.inductor_pass is c.inductor_pass and hasattr(c, "inductor_pass")
assert before == state()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
