"""Launches without Triton's binder: what decides what Triton compiles is told apart, and whoever listens is told."""

import pytest
import torch
import triton
from triton import knobs

from fused_rect.kernels import compiled, launch, rectify
from fused_rect.rules import Need, Parameters, leaky_relu

pytestmark = [
    pytest.mark.ptx,
    pytest.mark.skipif(not isinstance(rectify.rectify, triton.JITFunction), reason="the interpreter compiles nothing"),
]
LEAKY = leaky_relu(0.1)


@pytest.fixture
def bound(monkeypatch):
    """The launches that went through Triton's binder, by name."""
    calls = []
    run = triton.JITFunction.run

    def watched(self, *args, warmup, **kwargs):
        if not warmup:
            calls.append(self.fn.__name__)
        return run(self, *args, warmup=warmup, **kwargs)

    monkeypatch.setattr(triton.JITFunction, "run", watched)
    return calls


def step(x, bias, rule=LEAKY):
    """Forward and backward of a launch each and the finishing sum, against the specification."""
    parameters = Parameters(bias)
    out, bits = torch.empty_like(x), x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    launch.forward(x, parameters, rule, out, bits)
    z = x.double() + bias.double().view(-1, *[1] * (x.dim() - 2))
    expected = torch.where(z > 0, z, z * 0.1)
    torch.testing.assert_close(out, expected.to(x.dtype))
    grad = torch.ones_like(x)
    grad_bias, _ = launch.backward(grad, bits, Parameters(), rule, grad, Need(bias.dtype))
    slopes = torch.where(z > 0, 1.0, 0.1)
    torch.testing.assert_close(grad, slopes.to(x.dtype))
    torch.testing.assert_close(grad_bias, slopes.sum((0, *range(2, x.dim()))).to(bias.dtype))


def test_nothing_is_bound(bound):
    for _ in range(2):
        step(torch.randn(2, 3, 5), torch.randn(3))
    assert not bound


def test_what_triton_compiles_for_is_told_apart():
    """Of one shape: dtypes of the parameters, and addresses that are no multiple of 16."""
    shape = (2, 8, 32)
    for dtype, parameter in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)):
        memory = torch.randn(2 * 8 * 32 + 1).to(dtype)
        for start in (0, 1, 0):
            for first in (1, 0, 1):
                step(memory[start:][:512].view(shape), torch.randn(9).to(parameter)[first:][:8])
    like = torch.empty(shape)
    call = launch.rectify_call(like.shape, like.stride(), torch.bfloat16, LEAKY, True, 0, Need())
    assert len(call.compiled) == 8  # two dtypes of the bias, each address aligned or not


def test_launch_hooks_are_called_when_there_are_any(bound):
    seen = []

    def enter(metadata):
        seen.append(metadata.get()["name"])

    step(torch.randn(2, 3, 5), torch.randn(3))
    knobs.runtime.launch_enter_hook.add(enter)
    try:
        assert compiled.hooked()
        step(torch.randn(2, 3, 5), torch.randn(3))
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
    assert len(seen) == 3 and bound == ["rectify", "rectify", "finish"] and not compiled.hooked()


def test_hooks_of_the_kernel_are_called(bound):
    calls = []
    rectify.rectify.add_pre_run_hook(lambda *args, **kwargs: calls.append(len(args)))
    try:
        step(torch.randn(2, 3, 5), torch.randn(3))
    finally:
        rectify.rectify.pre_run_hooks.clear()
    assert len(calls) == 2 and bound == ["rectify", "rectify"]


def test_what_is_not_compiled_at_once_is_left_to_triton(bound, monkeypatch):
    """A hook of the compiler's may refuse, and answer later."""
    monkeypatch.setattr(triton.JITFunction, "warmup", lambda self, *args, **kwargs: None)
    launch._known_call.cache_clear()
    launch.finish_call.cache_clear()
    step(torch.randn(2, 3, 7), torch.randn(3))
    assert bound == ["rectify", "rectify", "finish"]


def test_other_targets_are_left_to_triton(monkeypatch):
    """AMD's compiler specializes on sizes besides."""
    active = compiled.driver.active
    known = {}
    tensors = (torch.randn(8),)

    class Other:
        backend = "hip"

    monkeypatch.setattr(active, "get_current_target", lambda: Other, raising=False)
    assert compiled.launchable(rectify.rectify, (1,), tensors, (), {}, known) is None and not known
