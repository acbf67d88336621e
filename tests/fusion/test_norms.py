"""A BatchNorm in evaluation runs with the rectifier that reads it next, where that is certain; else by itself."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from fusing import fused_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fused_rect as fr
from fused_rect import fusion
from fused_rect.fusion import norms, waiting
from fused_rect.internals import has_hooks

relu = F.relu


@pytest.fixture
def filled(monkeypatch):
    """The rules of the calls that ran a BatchNorm of ours."""
    rules, fill = [], norms.fill
    monkeypatch.setattr(
        norms, "fill", lambda t, d, *rest: (rules.append(rest[0].name if rest else ""), fill(t, d, *rest))
    )
    return rules


class Parts(nn.Module):
    slope = 0.3

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.wrapped = nn.Sequential(nn.ReLU())
        self.steps = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity(), nn.LeakyReLU(0.1), self.conv)
        self.kept = []

    @property
    def odd(self):
        return self.act


def ready(model):
    """In evaluation, its norms with statistics of their own."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def same(model, x, times=2):
    fused = fr.fuse(copy.deepcopy(model), fold_batchnorm=True)
    for _ in range(times):
        torch.testing.assert_close(fused(x), model(x))
    return fused


def written(lines):
    scope = {"Parts": Parts, "F": F, "torch": torch, "relu": relu, "Reads": Reads}
    body = "\n".join(f"        {line}" for line in lines)
    exec(f"class Net(Parts):\n    def forward(self, x):\n{body}", scope)
    return ready(scope["Net"]())


class Reads(torch.autograd.Function):
    """Hands its input on below torch's functions: what it gives is no longer the tensor that waits."""

    @staticmethod
    def forward(ctx, v):
        return v


TOGETHER = [
    ["x = self.conv(x)", "x = self.bn(x)", "x = self.act(x)", "return x"],
    ["x = self.conv(x)", "x = self.bn(x)", "return self.act(x)"],
    ["return self.act(self.bn(self.conv(x)))"],
    ["return F.relu(self.bn(self.conv(x)))"],
    ["return relu(self.bn(self.conv(x)))"],
    ["return torch.relu(self.bn(self.conv(x)))"],
    ["x = self.bn(self.conv(x))", "x = F.relu(x)", "return x"],
    ["x = self.bn(self.conv(x))", "return F.relu(x, True)"],
    ["x = self.bn(self.conv(x))", "return F.relu(x, inplace=True)"],
    ["x = self.bn(self.conv(x))", "return F.leaky_relu(x, 0.2)"],
    ["x = self.bn(self.conv(x))", "return F.leaky_relu(x, negative_slope=-0.2)"],
    ["x = self.steps(x)", "return x"],
    ["for _ in range(2):", "    x = self.act(self.bn(self.conv(x)))", "return x"],
    ["return self.act(self.bn(self.conv(x))) if self.training else F.relu(self.bn(self.conv(x)))"],
    ["try:", "    x = self.act(self.bn(self.conv(x)))", "finally:", "    self.kept.append(1)", "return x"],
    [
        "b = self.bn",
        "x = F.batch_norm(self.conv(x), b.running_mean, b.running_var, b.weight, b.bias)",
        "x = self.act(x)",
        "return x",
    ],
]
APART = [
    ["x = self.bn(self.conv(x))", "self.kept.append(x.sum())", "x = self.act(x)", "return x"],
    ["x = self.bn(self.conv(x))", "self.kept.append(x)", "return self.act(x) + self.kept[-1]"],
    ["x = self.conv(x)", "y = self.bn(x)", "return self.act(y) + x"],
    ["x = self.bn(self.conv(x))", "if self.conv: x = self.act(x)", "return x"],
    ["x = self.bn(self.conv(x))", "x = Reads.apply(x)", "return self.act(x)"],
    ["x = self.bn(self.conv(x))", "if len(self.kept): x = Reads.apply(x)", "self.kept.append(1)", "return self.act(x)"],
    ["return self.act(Reads.apply(self.bn(self.conv(x))))"],
    ["x = self.bn(self.conv(x))", "x = self.wrapped(x)", "return x"],
    ["x = self.bn(self.conv(x))", "x = self.odd(x)", "return x"],
    ["x = self.bn(self.conv(x))", "return F.leaky_relu(x, self.slope)"],
    ["return torch.sigmoid(self.bn(self.conv(x)))"],
    ["return self.act(self.bn(self.conv(x)) + 1)"],
    ["return self.act(torch.cat([self.bn(self.conv(x)), x]))"],
    ["v = locals()", "v['x'] = self.bn(self.conv(x))", "x = v['x']", "return self.act(x)"],
    ["y = locals()", "return self.act(self.bn(self.conv(x)))"],
]


@pytest.mark.parametrize("lines", TOGETHER, ids=" ".join)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_with_the_rectifier_that_certainly_comes_next(filled, lines, mode):
    with mode():
        same(written(lines), torch.randn(2, 3, 5, 5))
    assert filled and all(filled)


@pytest.mark.parametrize("lines", APART, ids=" ".join)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_at_once_where_anything_could_come_between(filled, lines, mode):
    with mode():
        same(written(lines), torch.randn(2, 3, 5, 5), times=3)
    assert not filled


def test_where_it_waited_in_vain_it_has_run(filled):
    """The rectifier has a twin of another meaning, or its input is needed later."""
    slopes = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LeakyReLU(float("inf")))
    noisy = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.RReLU(0.3, 0.3))
    twice = written(["x = self.bn(self.conv(x))", "return self.act(x) + x"])
    ready(noisy)[2].train()
    with torch.no_grad():
        for model in (ready(slopes), noisy, twice):
            same(model, torch.randn(2, 3, 5, 5))
    assert filled == [""] * 6


def test_an_exception_in_between_leaves_the_norms_values():
    """Nobody else can hold them but through the traceback's frames."""
    model = written(["x = self.bn(self.conv(x))", "x = self.act(x)", "return x"])
    model.act = nn.ReLU()
    fused, x = fr.fuse(copy.deepcopy(model), fold_batchnorm=True), torch.randn(2, 3, 5, 5)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) as raised:
        patch.setattr(waiting, "_filled", interrupted)
        fused(x)
    frame = next(
        entry.frame.f_locals for entry in raised.traceback if entry.name == "forward" and "self" in entry.locals
    )
    assert type(frame["x"]) is torch.Tensor
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


@settings(max_examples=60)
@given(st.data())
def test_values_are_those_of_the_norm_and_the_rectifier(data):
    rank = data.draw(st.integers(0, 3))
    shape = (2, 3, *data.draw(st.lists(st.integers(2, 9), min_size=rank, max_size=rank)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    channels = data.draw(st.integers(1, 9))
    first = nn.Linear(3, channels) if rank == 0 else getattr(nn, f"Conv{rank}d")(3, channels, 1)
    norm = getattr(nn, f"BatchNorm{max(rank, 1)}d")(channels, eps=data.draw(st.sampled_from([1e-5, 0.1])))
    norm.affine and data.draw(st.booleans()) and setattr(norm, "bias", None)
    act = data.draw(
        st.sampled_from([nn.ReLU(), nn.ReLU(True), nn.LeakyReLU(-0.2), nn.PReLU(), nn.PReLU(channels), nn.RReLU()])
    )
    model = ready(nn.Sequential(first, norm, copy.deepcopy(act)).to(dtype))
    if dtype is torch.bfloat16 and data.draw(st.booleans()):
        norm.float()
    x = torch.randn(shape).to(dtype)
    if rank == 2 and data.draw(st.booleans()):
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        got, expected = fr.fuse(copy.deepcopy(model), fold_batchnorm=True)(x), model(x)
    assert got.dtype is expected.dtype and got.stride() == expected.stride()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def sequential():
    return ready(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))


def test_only_in_evaluation_without_gradients_and_unwatched(filled):
    x = torch.randn(2, 3, 5, 5)
    same(sequential(), x)
    with torch.no_grad():
        fr.fuse(sequential(), fold_batchnorm=False)(x)
        fr.fuse(sequential().train(), fold_batchnorm=True)(x)
        fused_calls(fr.fuse(sequential(), fold_batchnorm=True), x)
        for where in (0, 1, 2):
            for register in ("register_forward_hook", "register_forward_pre_hook"):
                if (where, register) == (0, "register_forward_pre_hook"):  # sees the map's input alone
                    continue
                model, seen = sequential(), []
                getattr(model[where], register)(lambda module, *found, seen=seen: seen.append(found[-1]))
                same(model, x)
        assert not filled
        without = sequential()
        without[1].track_running_stats, without[1].running_mean, without[1].running_var = False, None, None
        same(without, x)
    assert not filled


def test_small_outputs_run_as_they_did(filled, monkeypatch):
    monkeypatch.undo()
    least = waiting.MIN_ELEMENTS_OF_NORMS
    assert least >= waiting.MIN_ELEMENTS
    rules, fill = [], norms.fill
    monkeypatch.setattr(norms, "fill", lambda *args: (rules.append(args[2].name), fill(*args)))
    with torch.no_grad():
        for size, expected in ((least // 512 - 1, []), (least // 512, ["relu"])):
            rules.clear()
            model = ready(nn.Sequential(nn.Conv2d(3, 512, 1), nn.BatchNorm2d(512), nn.ReLU()))
            same(model, torch.randn(1, 3, size, 1), len(expected))
            assert rules == expected


def test_middling_outputs_do_not_use_up_the_tries_of_large_ones(monkeypatch, filled):
    monkeypatch.undo()
    model = fr.fuse(ready(nn.Sequential(nn.Conv2d(3, 512, 1), nn.BatchNorm2d(512), nn.ReLU())), fold_batchnorm=True)
    middling, large = (torch.randn(1, 3, waiting.MIN_ELEMENTS_OF_NORMS // 512 - less, 1) for less in (1, 0))
    with torch.no_grad():
        for _ in range(waiting.TRIES + 2):
            assert fused_calls(model, middling) == 0
        (site,) = fusion.report(model)
        assert not site.fused and f"fewer than {waiting.MIN_ELEMENTS_OF_NORMS} elements" in site.reason
        assert fused_calls(model, large) == 1 and fused_calls(model, middling) == 0
        assert type(model[0](middling)) is torch.Tensor  # no longer asked


def test_profiles_and_reports_say_so():
    model, x = fr.fuse(sequential(), fold_batchnorm=True), torch.randn(2, 3, 5, 5)
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(x)
    names = {event.key for event in profile.key_averages()}
    assert "fused_rect::batch_norm_rectify" in names and "aten::batch_norm" not in names
    assert fusion.report(model)[0].fused


def test_hooks_are_seen():
    module, seen = nn.ReLU(), []
    assert not has_hooks(module)
    for register in (
        module.register_forward_hook, module.register_forward_pre_hook, module.register_full_backward_hook,
        module.register_full_backward_pre_hook, nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):  # fmt: skip
        handle = register(lambda *args: seen.append(args))
        assert has_hooks(module)
        handle.remove()
        assert not has_hooks(module)


def test_sequential_runs_its_modules_as_it_is_read_here():
    source = inspect.getsource(nn.Sequential.forward)
    assert "for module in self:" in source and "module(input)" in source
