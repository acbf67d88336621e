"""Rectifiers written inline in compiled graphs: the same values and gradients, for each place, layout and device."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from fused_rect import compile as fused_compile
from fused_rect import internals, ops, rules
from fused_rect.compile import inline
from fused_rect.compile.placement import BACKWARD, FORWARD, INLINE, OURS, Choice
from fused_rect.reference import computed_in
from fused_rect.rules import Need, Parameters

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}
EDGES = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40])


def values(shape, dtype):
    torch.manual_seed(0)
    z = torch.randn(shape, dtype=dtype)
    z.view(-1)[: len(EDGES)] = EDGES.to(dtype)
    return z


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 8, 2, 2), (3, 1, 1, 1), (2, 5, 1, 7)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_are_unpacked_where_their_elements_lie(layout, shape):
    z = LAYOUTS[layout](torch.randn(shape))
    stride = ops.checks.dense_stride(z)
    _, bits = torch.ops.fused_rect.rectify_bits(z, None, None, None, "leaky_relu", 0.1, 0.1, False, stride)
    assert torch.equal(inline.unpacked(bits, z, stride), z < 0)
    # Traced, a tensor has another layout than its memory will have.
    assert torch.equal(inline.unpacked(bits, z.contiguous(), stride), z < 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", [rules.Rule.default("relu"), rules.leaky_relu(0.3), rules.leaky_relu(-0.5)])
def test_a_gradient_from_bits_is_the_ops(rule, layout, dtype):
    z = LAYOUTS[layout](values((2, 3, 4, 5), dtype))
    stride = ops.checks.dense_stride(z)
    grad = torch.randn_like(z)
    given = ops.flat(Parameters(None, None, None), rule)
    _, bits = torch.ops.fused_rect.rectify_bits(z, *given, False, stride)
    expected, of_bias, _ = ops.rectify_backward(grad, bits, *given, dtype, False, stride)
    own, bias, weight = inline.backward(
        grad, bits, Parameters(None, None, None), rule, Need(dtype, False), stride, True
    )
    torch.testing.assert_close(own, expected, equal_nan=True, rtol=0, atol=0)
    # The op sums what it rounds to `own`, inline it is read from memory: by half an ulp less or more, where not grad's.
    half, sums = torch.finfo(dtype).eps / 2, [t.abs().double().sum((0, 2, 3)) for t in (own.where(own != grad, 0), own)]
    allowed = half * (sums[0] + 2 * of_bias.abs()) + grad.numel() * torch.finfo(computed_in(dtype)).eps * sums[1]
    assert ((bias.double() - of_bias).abs() <= allowed).all()
    assert weight is None
    assert inline.backward(grad, bits, Parameters(None, None, None), rule, Need(None, False), stride, True)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("slopes", [1, 3])
@pytest.mark.parametrize(("biased", "along"), [(True, True), (True, False), (False, True)])
def test_prelu_inline_is_the_op(biased, along, slopes, dtype):
    z = values((2, 3, 4, 5), dtype)
    bias, weight = torch.randn(3, dtype=dtype) if biased else None, torch.randn(slopes, dtype=dtype)
    rule, parameters = rules.Rule.default("prelu"), Parameters(bias, weight, None)
    y = inline.forward(z, bias, weight)
    torch.testing.assert_close(y, ops.rectify(z, *ops.flat(parameters, rule), False), equal_nan=True)
    z = torch.randn_like(z)
    grad = torch.randn_like(z)
    got = inline.backward(grad, z, parameters, rule, Need(dtype, True), None, along)
    expected = ops.rectify_backward(grad, z, *ops.flat(parameters, rule), dtype, True, None)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b)
    assert inline.backward(grad, z, parameters, rule, Need(None, False), None, along)[1:] == (None, None)


def test_what_is_to_lie_in_memory_is_the_same_tensor():
    t = torch.randn(2, 3, 4, 5)
    for layout in LAYOUTS.values():
        assert torch.equal(internals.in_memory(t, layout(t).stride()), t)


def step(run, x):
    x = x.detach().requires_grad_()
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)).sum().backward()
    return y, x.grad


def same(model, x, run, tolerance):
    twin = copy.deepcopy(model)
    for got, expected in zip(step(run, x), step(twin, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)


RECTIFIERS = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(-0.3),
    "prelu": nn.PReLU,
    "prelu, each": lambda: nn.PReLU(8),
    "rrelu": lambda: nn.RReLU(0.2, 0.2),
}


def network(rectifier):
    torch.manual_seed(0)
    act = RECTIFIERS[rectifier]()
    return nn.Sequential(nn.Conv2d(3, 8, 3), act, nn.ConvTranspose2d(8, 8, 3, bias=False), act, nn.Conv2d(8, 8, 1), act)


@pytest.mark.parametrize(
    ("rectifier", "place"),
    [(r, p) for r in ("relu", "leaky_relu") for p in (OURS, FORWARD)]
    + [(r, p) for r in ("prelu", "prelu, each") for p in (OURS, BACKWARD, INLINE)],
)
def test_every_place_computes_what_eager_does(rectifier, place, monkeypatch):
    rewriting = importlib.import_module("fused_rect.compile.rewrite")
    monkeypatch.setattr(rewriting, "_choose", lambda *_: Choice(place, "asked for"))

    def rewritten(gm, inputs):
        assert {site.place for site in fused_compile.rewrite_graph_module(gm, fused_compile.ALL, {})} == {place}
        return aot_eager(gm, inputs)

    for dynamic in (False, True):
        torch._dynamo.reset()
        model = network(rectifier).double()
        x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
        same(model, x, torch.compile(model, backend=rewritten, fullgraph=True, dynamic=dynamic), 1e-10)


@pytest.mark.ptx
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, or the soft one")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("rectifier", RECTIFIERS)
def test_a_compiled_step_on_a_gpu_is_eagers(rectifier, last):
    torch._dynamo.reset()
    model = network(rectifier).cuda()
    x = torch.randn(2, 3, 9, 11, device="cuda")
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    sites = fused_compile.explain(model, x)
    assert len(sites.fused) == (2 if rectifier.startswith("prelu") else 3), str(sites)
    same(model, x, torch.compile(model, backend=fused_compile.backend, fullgraph=True), 1e-4)
