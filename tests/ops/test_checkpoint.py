"""Whoever caches a convolution's output must not find it overwritten: selective activation checkpointing."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fused_rect as fr

aten = torch.ops.aten
SAVED = (aten.convolution.default, aten.mm.default, aten.addmm.default)
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "leaky, slope < 0": lambda: nn.LeakyReLU(-0.2),
    "prelu": nn.PReLU,
    "rrelu": lambda: fr.nn.RReLU(),
}


def save_maps(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("allow_mutation", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_where_convolutions_are_saved(path, activation, allow_mutation):
    torch.manual_seed(0)
    act = ACTIVATIONS[activation]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), act(), nn.Conv2d(4, 2, 3), act(), nn.Flatten(), nn.Linear(32, 3), act())
    fused = fr.fuse(copy.deepcopy(model)) if activation != "rrelu" else layers(model)
    x = torch.randn(2, 3, 8, 8)
    contexts = functools.partial(
        create_selective_checkpoint_contexts, save_maps, allow_cache_entry_mutation=allow_mutation
    )

    def gradients(run):
        torch.manual_seed(1)
        return torch.autograd.grad(run(x).square().sum(), list(fused.parameters()))

    whole = gradients(fused)
    got = gradients(lambda x: checkpoint(fused, x, use_reentrant=False, context_fn=contexts))
    for a, b in zip(got, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if activation != "rrelu":  # whose slopes are ours
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def layers(model):
    """The model's pairs as fused layers."""
    from rectifying import of_layer

    pairs = [nn.Sequential(model[i], nn.RReLU()) for i in (0, 2, 5)]
    first, second, third = (of_layer(pair) for pair in pairs)
    return nn.Sequential(first, second, model[4], third)
