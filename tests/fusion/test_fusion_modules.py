"""fuse beside hooks, normalized weights and BatchNorm."""

import copy

import pytest
import torch
from fusing import assert_same, fused_calls, image, sequential, value_and_gradients
from torch import nn

import fused_rect as fr
from fused_rect import fusion


@pytest.mark.parametrize(
    "law", ["weight_norm", "spectral_norm", "parametrized weight_norm", "parametrized spectral_norm"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_normalized_weights(law):
    apply = {
        "weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
        "parametrized weight_norm": nn.utils.parametrizations.weight_norm,
        "parametrized spectral_norm": nn.utils.parametrizations.spectral_norm,
    }[law]
    torch.manual_seed(0)
    model, x = nn.Sequential(apply(nn.Conv2d(3, 4, 3)), nn.LeakyReLU(0.2)).double(), image()
    with torch.no_grad():
        for _ in range(30):  # power iterations: spectral_norm moves its vectors at each training call
            model(x)
    model.eval()
    expected = value_and_gradients(model, x)
    fr.fuse(model)
    assert fused_calls(model, x) == 1
    assert_same(model, x, expected)
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)
    fused = model(x)
    torch.testing.assert_close(fused, fr.unfuse(model)(x))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_either_module_fire_and_may_change_what_they_see(which, kind):
    """A hook of another sees what it saw, before fuse() or after it, and the pair is fused where it only looks."""
    for late in (False, True):
        model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).double(), image()
        fr.fuse(model) if late else None
        seen = []
        getattr(model[which], f"register_{kind}_hook")(lambda m, *args, seen=seen: seen.append(args[-1]))
        fr.fuse(model)
        model(x).sum().backward()
        assert len(seen) == 1
        changed = copy.deepcopy(model)
        changed[0].register_forward_hook(lambda m, args, output: output - 0.5)
        plain = fr.unfuse(copy.deepcopy(changed))
        torch.testing.assert_close(changed(x), plain(x))


def test_a_hook_that_keeps_the_output_keeps_its_values():
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), []
    model[0].register_forward_hook(lambda m, args, output: seen.append(output))
    x = torch.randn(1, 3, 4, 4)
    expected = nn.functional.conv2d(x, model[0].weight, model[0].bias)
    assert fused_calls(fr.fuse(model), x) == 1
    torch.testing.assert_close(seen[0], expected)
    assert type(seen[0]) is torch.Tensor and seen[0].min() < 0


def test_a_hook_on_the_container_fires_and_sees_the_fused_output():
    model, x = fr.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())), torch.randn(1, 3, 2, 2)
    seen = []
    model.register_forward_hook(lambda m, args, out: seen.append(out))
    torch.testing.assert_close(model(x), seen[0])


def test_global_hooks_see_every_module():
    model, x = fr.fuse(sequential()), torch.randn(1, 3, 4, 4)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m)))
    try:
        model(x)
    finally:
        handle.remove()
    assert nn.Conv2d in seen and nn.PReLU in seen


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batchnorm_is_folded_on_request_in_evaluation_mode(affine, bias):
    norm = nn.BatchNorm2d(4, affine=affine)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), norm, nn.LeakyReLU(0.1)).double(), image()
    for _ in range(3):
        model(x)
    model.eval()
    expected = value_and_gradients(model, x)
    assert fused_calls(fr.fuse(model), x) == 0
    (left,) = fusion.report(model)
    assert not left.fused and "fold_batchnorm" in left.reason
    assert fused_calls(fr.fuse(model, fold_batchnorm=True), x) == 1
    assert fusion.report(model)[0].fused
    assert_same(model, x, expected)
    assert fused_calls(copy.deepcopy(model), x) == 1
    before = norm.running_mean.clone()
    model.train()
    assert fused_calls(model, x) == 0 and not torch.equal(norm.running_mean, before)


class NormAct(nn.BatchNorm2d):
    """A rectifier inside the norm, as timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        x = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return self.act(self.drop(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_dtype", [None, torch.float32])
def test_batchnorm_of_another_dtype_and_inside_other_modules(dtype, norm_dtype):
    for tail in (
        [nn.BatchNorm2d(4), nn.ReLU()],
        [NormAct(4)],
        [nn.Sequential(nn.BatchNorm2d(4)), nn.Sequential(nn.ReLU())],
    ):
        model, x = (
            nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), *tail).to(dtype).eval(),
            torch.randn(1, 3, 8, 8).to(dtype),
        )
        for module in model.modules():
            if norm_dtype is not None and dtype is not torch.float64 and isinstance(module, nn.BatchNorm2d):
                module.to(norm_dtype)
        with torch.no_grad():
            expected = model(x)
            assert fused_calls(fr.fuse(model, fold_batchnorm=True), x) == 1
            got = model(x)
        assert got.dtype is expected.dtype and torch.equal(got, expected)
