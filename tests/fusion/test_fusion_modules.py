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
def test_hooks_on_either_module_still_fire(which, kind):
    model, x = fr.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).double()), image()
    assert fused_calls(model, x) == 1
    seen = []
    hook = getattr(model[which], f"register_{kind}_hook")(lambda *args: seen.append(len(args)) or None)
    assert fused_calls(model, x) == 0
    (site,) = fusion.report(model)
    assert not site.fused and "hooks" in site.reason
    seen.clear()
    model(x).sum().backward()
    assert len(seen) == 1
    hook.remove()
    assert fused_calls(model, x) == 1 and fusion.report(model)[0].fused


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
    (left,) = fusion.report(model)
    assert not left.fused and "fold_batchnorm" in left.reason
    assert fused_calls(fr.fuse(model), x) == 0
    assert fused_calls(fr.fuse(model, fold_batchnorm=True), x) == 1
    assert fusion.report(model)[0].fused
    assert_same(model, x, expected)
    assert fused_calls(copy.deepcopy(model), x) == 1
    before = norm.running_mean.clone()
    model.train()
    assert fused_calls(model, x) == 0 and not torch.equal(norm.running_mean, before)
