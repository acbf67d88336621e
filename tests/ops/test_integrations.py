"""The whole of torch around the fused layers: each capability of the README's table is a test here, by value."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import fused_rect as fr


class PlainPReLU(nn.PReLU):
    """torch's own prelu raises under vmap(jacrev)."""

    def forward(self, z):
        return torch.where(z > 0, z, z * self.weight.view(-1, 1, 1).to(z.dtype))


RECTIFIERS = {
    "relu": (fr.nn.ConvReLU2d, nn.ReLU, {}),
    "leaky": (fr.nn.ConvLeakyReLU2d, nn.LeakyReLU, {"negative_slope": 0.2}),
    "prelu": (fr.nn.ConvPReLU2d, PlainPReLU, {"num_parameters": 4}),
    "rrelu": (fr.nn.ConvRReLU2d, lambda lower, upper: nn.LeakyReLU((lower + upper) / 2), {"lower": 0.1, "upper": 0.4}),
}
each = pytest.mark.parametrize("name", RECTIFIERS)
deterministic_ones = pytest.mark.parametrize("name", ["relu", "leaky", "prelu"])


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def pair(name, dtype=torch.float64):
    """Ours and torch's, with the same weights; RReLU in evaluation, where it is the Leaky ReLU at the midpoint."""
    fused, rectifier, arguments = RECTIFIERS[name]
    ours, theirs = fused(3, 4, 3, **arguments), nn.Sequential(nn.Conv2d(3, 4, 3), rectifier(**arguments))
    if dtype is torch.float64:
        ours, theirs = ours.double(), theirs.double()
    theirs.load_state_dict(ours.state_dict())
    return (ours.eval(), theirs.eval()) if name == "rrelu" else (ours, theirs)


def image(dtype=torch.float64, **keywords):
    return torch.randn(2, 3, 6, 6, dtype=dtype, **keywords)


def assert_close(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ---- derivatives ----


@each
def test_gradient_penalty_trains_as_in_eager(name):
    """WGAN-GP: the norm of the input's gradient is part of the loss, so its backward differentiates our backward."""
    steps = []
    for model in pair(name):
        critic = nn.Sequential(copy.deepcopy(model), nn.Flatten(), nn.Linear(64, 1, dtype=torch.float64))
        torch.manual_seed(3)
        nn.init.normal_(critic[2].weight, std=0.1)
        nn.init.zeros_(critic[2].bias)
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(3):
            x = image(requires_grad=True)
            (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
            loss = critic(x).mean() + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        steps.append([p.detach() for p in critic.parameters()])
    for ours, theirs in zip(*steps, strict=True):
        assert_close(ours, theirs)


def test_r1_penalty_of_a_training_rrelu_is_that_of_its_slopes():
    layer, x = fr.nn.ConvRReLU2d(3, 4, 1).double(), image(requires_grad=True)
    y = layer(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (penalty,) = torch.autograd.grad(first.square().sum(), layer[0].weight)
    with torch.no_grad():
        slopes = y / layer[0](x)
    weight = layer[0].weight.detach().requires_grad_()
    by_hand = F.conv_transpose2d(slopes, weight).square().sum()
    assert_close(penalty, torch.autograd.grad(by_hand, weight)[0])


@each
def test_forward_mode(name):
    ours, theirs = pair(name)
    x, t = image(), image()
    assert_close(jvp(ours, (x,), (t,))[1], jvp(theirs, (x,), (t,))[1])


TRANSFORMS = {
    "grad": lambda f: grad(lambda p, x: f(p, x).square().sum()),
    "vmap": lambda f: vmap(f, in_dims=(None, 0)),
    "vmap(grad)": lambda f: vmap(grad(lambda p, x: f(p, x).square().sum()), in_dims=(None, 0)),
    "grad(vmap)": lambda f: grad(lambda p, x: vmap(f, in_dims=(None, 0))(p, x).square().sum()),
    "jacrev": lambda f: jacrev(f),
    "jacfwd": lambda f: jacfwd(f),
    "grad(grad)": lambda f: grad(
        lambda p, x: sum(g.square().sum() for g in grad(lambda q, y: f(q, y).square().sum())(p, x).values())
    ),
    "hessian": lambda f: lambda p, x: hessian(lambda q: f(q, x).square().sum())(p),
    "vmap(jacrev)": lambda f: vmap(jacrev(f), in_dims=(None, 0)),
}


@each
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functorch(name, transform):
    results = []
    x = image()[..., :4, :4]
    x = x[:, None] if "vmap" in transform else x  # each example a batch of one
    for model in pair(name):
        parameters = dict(model.named_parameters())

        def call(p, example, model=model):
            return functional_call(model, p, (example,))

        results.append(TRANSFORMS[transform](call)(parameters, x))
    assert_close(results[0], results[1])


@each
def test_an_ensemble_by_vmap_over_the_parameters(name):
    ours, theirs = pair(name)
    stacked = {k: torch.stack([p.detach(), p.detach() * 2]) for k, p in ours.named_parameters()}
    x = image()
    run = [vmap(lambda p, m=m: functional_call(m, p, (x,)))(stacked) for m in (ours, theirs)]
    assert_close(*run)


def test_random_slopes_of_an_example_are_those_it_has_alone():
    x, seed = torch.randn(3, 2, 4, 5, dtype=torch.float64), torch.tensor([5])

    def call(example):
        return fr.functional.bias_rrelu(example, training=True, seed=seed)

    assert_close(vmap(call)(x), torch.stack([call(example) for example in x]))


@pytest.mark.parametrize("mapped", [False, True])
def test_gradients_of_one_slope_for_each_example(mapped):
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    slope = torch.rand(*(3,) * mapped, 1, dtype=torch.float64)

    def loss(slope, example):
        return fr.functional.bias_prelu(example, None, slope).square().sum()

    got = vmap(grad(loss), in_dims=(0 if mapped else None, 0))(slope, x)
    slopes = slope if mapped else slope.expand(3, 1)
    assert_close(got, torch.stack([grad(loss)(s, example) for s, example in zip(slopes, x)]))


def test_an_in_place_call_on_an_unmapped_input_inside_vmap_names_the_way_out():
    z = torch.randn(2, 4)
    with pytest.raises(RuntimeError, match="without the trailing underscore"):
        vmap(lambda b: fr.functional.bias_relu_(z.clone().detach(), b))(torch.randn(3, 4))


@each
def test_compiled_function_transforms(name):
    ours, theirs = pair(name, torch.float32)
    x = image(torch.float32)

    def gradient(model):
        return lambda x: grad(lambda x: model(x).square().sum())(x)

    got = torch.compile(gradient(ours), backend="aot_eager", fullgraph=True)(x)
    assert_close(got, gradient(theirs)(x), 1e-4)


# ---- precision, memory, determinism ----


@each
def test_autocast(name):
    ours, theirs = pair(name, torch.float32)
    x = image(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x), theirs(x)
    assert y.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in ours.parameters())


@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_repeats_the_slopes(name, reentrant):
    from torch.utils.checkpoint import checkpoint

    model, x = pair(name)[0].train(), image(requires_grad=True)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        y = run(x)
        model.zero_grad()
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@each
def test_deterministic_mode_gives_the_same_bits(name):
    model, x = pair(name, torch.float32)[0].train(), image(torch.float32, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            torch.manual_seed(7)
            y = model(x)
            runs.append((y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each
def test_no_value_is_read_back_to_the_host(name):
    """What a CUDA graph needs: on fake CUDA tensors, which hold no values, a training step runs to its end."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=False):
        model = pair(name, torch.float32)[0].train()
        y = model(image(torch.float32))
        y.sum().backward()
        seed = torch.empty(1, dtype=torch.int64, device="cuda")
        z = fr.functional.bias_rrelu(torch.empty(2, 4, 3, device="cuda"), None, training=True, seed=seed)
    assert z.device.type == "cuda" and model[0].weight.grad.shape == model[0].weight.shape


@each
def test_flop_counter_counts_what_it_counts_for_torchs_pair(name):
    from torch.utils.flop_counter import FlopCounterMode

    totals = []
    for model in pair(name):
        with FlopCounterMode(display=False) as counter:
            model(image()).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


# ---- tracing, export, saving ----


@each
def test_symbolic_tracing_keeps_the_layer_as_one_module(name):
    ours, theirs = pair(name)
    traced = torch.fx.symbolic_trace(nn.Sequential(ours, nn.Flatten()))
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = image()
    assert_close(traced(x), theirs(x).flatten(1))


@deterministic_ones
def test_symbolic_tracing_of_the_functionals(name):
    weight, slope = torch.randn(4, 3, 3, 3), torch.rand(4)
    functions = {
        "relu": lambda x: fr.functional.conv2d_relu(x, weight),
        "leaky": lambda x: fr.functional.conv2d_leaky_relu(x, weight, negative_slope=0.2),
        "prelu": lambda x: fr.functional.bias_prelu(F.conv2d(x, weight), None, slope),
    }
    x = image(torch.float32)
    assert_close(torch.fx.symbolic_trace(functions[name])(x), functions[name](x))


@each
def test_export_has_one_clean_node(name):
    ours, theirs = pair(name)
    x = image()
    program = torch.export.export(ours, (x,))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count("fused_rect.rectify.default") == 1 and len(targets) == 2, targets
    assert_close(program.module()(x), theirs(x))


def test_export_of_a_training_rrelu_draws_at_each_call():
    program = torch.export.export(fr.nn.ConvRReLU2d(3, 4, 3).train(), (image(torch.float32),)).module()
    x = image(torch.float32)
    assert not torch.equal(program(x), program(x))


@each
def test_export_decomposes_to_standard_operations(name):
    ours, theirs = pair(name)
    x = image()
    program = torch.export.export(ours, (x,)).run_decompositions(fr.decompose.table())
    assert not any("fused_rect" in str(n.target) for n in program.graph.nodes)
    assert_close(program.module()(x), theirs(x))


def test_a_training_rrelu_does_not_decompose_and_says_so():
    program = torch.export.export(fr.nn.ConvRReLU2d(3, 4, 3).train(), (image(torch.float32),))
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        program.run_decompositions(fr.decompose.table())


@each
def test_onnx_gives_the_same_numbers(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    ours, theirs = pair(name, torch.float32)
    x = image(torch.float32)
    program = torch.export.export(ours.eval(), (x,)).run_decompositions(fr.decompose.table())
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(got), theirs(x).detach(), 1e-5)


def test_aot_inductor(tmp_path):
    """One package with all four: each compiling takes ten seconds."""
    ours, theirs = (nn.Sequential(*layers) for layers in zip(*(pair(name, torch.float32) for name in RECTIFIERS)))
    for layers in (ours, theirs):
        for i in (1, 2, 3):
            layers[i][0] = nn.Conv2d(4, 4, 3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        program = torch.export.export(ours, (x,))
        assert str(program.graph).count("fused_rect.rectify.default") == 4
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        assert_close(torch._inductor.aoti_load_package(package)(x), theirs(x), 1e-5)


@each
def test_saved_layers_load_and_hold_torchs_keys(name, tmp_path):
    ours, theirs = pair(name)
    torch.save(ours, tmp_path / "layer.pt")
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    theirs.load_state_dict(torch.load(tmp_path / "state.pt"))
    loaded, x = torch.load(tmp_path / "layer.pt", weights_only=False), image()
    assert_close(loaded(x), ours(x))
    assert_close(theirs(x), ours(x))
