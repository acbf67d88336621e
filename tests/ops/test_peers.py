"""torch's own test suites against ours: the sample, reference and error inputs of its OpInfos and ModuleInfos.

The functions run with bias None, the layers behind a convolution that passes its input through.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_rect as fr

pytest.importorskip("expecttest")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.exhaustive
NAMES = {
    "nn.functional.relu": "relu",
    "nn.functional.leaky_relu": "leaky_relu",
    "nn.functional.prelu": "prelu",
    "nn.functional.rrelu": "rrelu",
}
INFOS = {NAMES[info.name]: info for info in op_db if info.name in NAMES}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def test_torch_has_what_is_looked_for():
    assert set(INFOS) == set(NAMES.values())


def ours_and_torchs(rectifier, args, kwargs):
    """The two functions of the input; RReLU in training has random slopes, which are bounded instead of compared."""
    kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
    fused = getattr(fr.functional, f"bias_{rectifier}")
    arguments = (None, *args)
    return lambda x: fused(x, *arguments, **kwargs), lambda x: getattr(F, rectifier)(x, *args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["sample", "reference"])
@pytest.mark.parametrize("rectifier", NAMES.values())
def test_op_info_inputs(path, rectifier, kind, dtype):
    torch.manual_seed(0)
    count = 0
    for sample in getattr(INFOS[rectifier], f"{kind}_inputs")("cpu", dtype, requires_grad=True):
        x = sample.input.detach()
        if not x.is_floating_point():
            continue
        ours, torchs = ours_and_torchs(rectifier, sample.args, sample.kwargs)
        ours_x, torchs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        got = ours(ours_x)
        assert got.shape == x.shape and got.dtype == dtype
        count += 1
        if sample.kwargs.get("training"):
            finite, got = x.isfinite(), got.detach()
            assert torch.equal(got[~finite].isnan(), x[~finite].isnan())
            x, got = x[finite], got[finite]
            law = (got / x).double()
            low, high = sample.kwargs.get("lower", 1 / 8), sample.kwargs.get("upper", 1 / 3)
            inside = (law >= low - 2e-2) & (law <= high + 2e-2)
            assert (inside | (x >= 0) | (x.abs() < 1e-2)).all()
            assert torch.equal(got[x >= 0], x[x >= 0])
            continue
        expected = torchs(torchs_x)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2e-2)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        grad = torch.randn_like(got)
        a, b = torch.autograd.grad(got, ours_x, grad)[0], torch.autograd.grad(expected, torchs_x, grad)[0]
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert count >= 4


@pytest.mark.parametrize("rectifier", NAMES.values())
def test_op_info_error_inputs(path, rectifier):
    info = INFOS[rectifier]
    errors = list(info.error_inputs("cpu")) if info.error_inputs_func else []
    assert len(errors) == {"prelu": 3, "rrelu": 1}.get(rectifier, 0)
    for error in errors:
        sample = error.sample_input
        ours, _ = ours_and_torchs(rectifier, sample.args, sample.kwargs)
        with pytest.raises(error.error_type):
            ours(sample.input)


LAYERS = {nn.ReLU: "ReLU", nn.LeakyReLU: "LeakyReLU", nn.PReLU: "PReLU", nn.RReLU: "RReLU"}
MODULES = [info for info in module_db if info.module_cls in LAYERS]


@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_module_info_inputs_behind_a_convolution_that_passes_through(path, info):
    count = 0
    for sample in info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=False):
        x = sample.forward_input.args[0]
        if x.dim() != 4:
            x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
        constructor = sample.constructor_input
        act = info.module_cls(*constructor.args, **constructor.kwargs).double().eval()
        names = {"LeakyReLU": ["negative_slope"], "PReLU": ["num_parameters"], "RReLU": ["lower", "upper"]}
        own = {name: getattr(act, name) for name in names.get(LAYERS[info.module_cls], [])}
        layer = getattr(fr.nn, f"Conv{LAYERS[info.module_cls]}2d")(x.shape[1], x.shape[1], 1, bias=False, **own)
        layer = layer.double().eval()
        nn.init.dirac_(layer[0].weight)
        layer[1].load_state_dict(act.state_dict())
        torch.testing.assert_close(layer(x), act(x), rtol=1e-12, atol=1e-12)
        count += 1
    assert count


def test_module_info_convolutions_with_a_relu(path):
    info = next(info for info in module_db if info.module_cls is nn.Conv2d)
    count = 0
    for sample in info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=True):
        layer = fr.nn.ConvReLU2d(*sample.constructor_input.args, **sample.constructor_input.kwargs).double()
        x = sample.forward_input.args[0].detach()
        torch.testing.assert_close(layer(x), F.relu(layer[0](x)), rtol=1e-12, atol=1e-12)
        count += 1
    assert count >= 4
