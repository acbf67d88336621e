"""A fused model means what it meant: forwards that Hypothesis writes, fused and as they are, do the same."""

import copy
import io
import pickle
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import forwards, imported
from torch import nn

import fused_rect as fr
from fused_rect.fusion.waiting import Hook


def flat(value):
    """The tensors of ``value`` and what they stand in."""
    if isinstance(value, dict):
        return [part for key in value for part in flat(value[key])]
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in flat(item)]
    return [value]


def observed(model, x, flag, mode):
    """All that a call of ``model`` does: result or error, gradients, buffers, attributes, random numbers drawn.

    mode: of torch's gradients, while it runs.
    """
    torch.manual_seed(1)
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    try:
        with mode():
            x = leaf.clone()  # a forward may change it in place
            y = model(x, flag)
        result = flat(y)
        total = sum((t.square().sum() for t in result), x.sum() * 0)
        if total.requires_grad:
            total.backward()
        seen = [type(y)]
    except Exception as error:
        result, seen = [], [type(error), str(error)]
    seen += [type(t) for t in result] + [hash(torch.get_rng_state().numpy().tobytes())]
    tensors = [*result, leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()]
    for module in model.modules():
        kept = {k: v for k, v in vars(module).items() if not k.startswith("_")}
        for key, value in sorted(kept.items()):
            for part in flat(value):
                if isinstance(part, torch.Tensor):
                    tensors.append(part)
                    seen.append((key, type(part)))
                else:
                    seen.append((key, part if isinstance(part, (int, float, str, type(None))) else type(part)))
    return (
        seen,
        [None if t is None else t.detach().clone() for t in tensors],
        [t is not None and t.requires_grad for t in tensors],
    )


def assert_same(fused, plain, x, flag, mode):
    a, b = observed(fused, x, flag, mode), observed(plain, x, flag, mode)
    if "modified by an inplace operation" in str(b[0][1]):
        return  # what torch keeps for backward was overwritten; ours keeps a bit of it
    assert a[0] == b[0] and a[2] == b[2]
    assert len(a[1]) == len(b[1])
    for one, other in zip(a[1], b[1]):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.stride() == other.stride()
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, equal_nan=True)


def forgetful(model):
    """``model`` without what it kept: tensors with a history cannot be copied."""
    for module in model.modules():
        for key in [k for k, v in vars(module).items() if isinstance(v, torch.Tensor)]:
            delattr(module, key)
    model.kept.clear()
    return model


def copied(model):
    return copy.deepcopy(forgetful(model))


def pickled(model):
    return pickle.loads(pickle.dumps(forgetful(model)))


def saved(model):
    file = io.BytesIO()
    torch.save(forgetful(model), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model):
    model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})
    return model


def edited(model):
    """What a user does to a model after fuse()."""
    torch.manual_seed(2)
    model.conv, model.relu = nn.Conv2d(3, 3, 1, dtype=torch.float64), nn.LeakyReLU(0.4)
    nn.init.ones_(model.conv.weight)
    model.convs.append(model.conv)
    return model


def hooked(model):
    model.wide.register_forward_hook(doubled)
    model.over.register_forward_pre_hook(plus_one)
    model.up.register_forward_hook(remember)
    model.bare.register_full_backward_hook(remember)
    return model


def doubled(module, args, output):
    return output * 2


def plus_one(module, args):
    return (args[0] + 1,)


def remember(module, args, output):
    module.out = output[0]


def reclassed(model):
    """A forward that is exchanged after fuse()."""
    original = type(model).forward
    model.forward = lambda x, flag=False: original(model, x, flag)
    model.wide._conv_forward = lambda v, weight, bias: nn.functional.conv2d(v, weight * 2, bias, padding=1)
    return model


CHANGES = [copied, pickled, saved, loaded, edited, hooked, nn.Module.train, nn.Module.eval, reclassed, fr.unfuse]


def check(source, fold, changes, flags, training, mode):
    Net = imported(source)
    try:
        torch.manual_seed(0)
        plain = Net().double().train(training)
        fused = fr.fuse(copy.deepcopy(plain), fold_batchnorm=fold)
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        for flag in flags:
            assert_same(fused, plain, x, flag, mode)
        for change in changes:
            fused, plain = change(fused), plain if change is fr.unfuse else change(plain)
            assert_same(fused, plain, x, flags[0], mode)
            assert_same(fused, plain, x, not flags[0], mode)
        fr.unfuse(fused)
        hooks = [h for m in fused.modules() for d in (m._forward_hooks, m._forward_pre_hooks) for h in d.values()]
        assert not any(isinstance(hook, Hook) for hook in hooks)
        assert_same(fused, plain, x, True, mode)
    finally:
        sys.modules.pop(Net.__module__)


# A change whose result cannot be copied any more comes last.
changes = st.lists(st.sampled_from(CHANGES[:-3]), max_size=2).flatmap(
    lambda first: st.sampled_from([[], [nn.Module.eval], [reclassed], [fr.unfuse]]).map(lambda last: first + last)
)
modes = st.sampled_from([torch.enable_grad, torch.enable_grad, torch.no_grad, torch.inference_mode])
programs = given(
    forwards(), st.booleans(), changes, st.lists(st.booleans(), min_size=1, max_size=4), st.booleans(), modes
)
usual = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@settings(usual, max_examples=50)
@programs
def test_a_written_forward_means_the_same_fused(source, fold, changes, flags, training, mode):
    check(source, fold, changes, flags, training, mode)


@pytest.mark.exhaustive
@settings(usual, max_examples=5000)
@programs
def test_five_thousand_written_forwards_mean_the_same_fused(source, fold, changes, flags, training, mode):
    check(source, fold, changes, flags, training, mode)
