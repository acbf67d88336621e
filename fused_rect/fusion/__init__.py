"""`fuse(model)`: a rectifier that reads the output of a convolution or linear map runs as ours, in the model as it is.

Nothing of the model is run, traced, read or replaced: `fuse` adds a forward hook to each of its maps and one to the
model (:mod:`.waiting` says what they do), and `unfuse` takes these hooks away again. Classes, forwards, parameters,
state_dict keys and others' hooks stay what they were, and copies and pickles stay fused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .waiting import MAPS, Hook, Leave, Reader


@dataclass(frozen=True)
class Site:
    """One rectifier behind a linear map: fused, or left with the reason."""

    where: str
    linear_map: str
    rectifier: str
    fused: bool
    reason: str = ""

    def __str__(self) -> str:
        verdict = "fused" if self.fused else f"left: {self.reason}"
        return f"{self.where or 'model'}: {self.linear_map} + {self.rectifier}: {verdict}"


def fuse(model: nn.Module, *, fold_batchnorm: bool = False) -> nn.Module:
    """Run each rectifier of ``model`` that reads the output of a map fused, from the next forward on; returns it.

    A map is a convolution, a transposed convolution or a Linear, subclasses included. Who reads its output is seen
    while the model runs, whatever its forward looks like; :func:`report` says what was seen. What a fused model means
    differs in one thing: the random slopes of RReLU in training come from :mod:`fused_rect.random`. Outputs of fewer
    than 16,384 elements are left to torch, behind a BatchNorm of fewer than 1,048,576: there a call costs more than a
    pass saves.
    fold_batchnorm: a BatchNorm in evaluation mode may stand between the two.
    """
    if isinstance(model, torch.jit.ScriptModule):
        return model
    for module in model.modules():
        if not isinstance(module, MAPS):
            continue
        reader = _reader(module)
        if reader is None:
            module.register_forward_hook(Reader(fold_batchnorm))
        else:
            reader.fold = fold_batchnorm
    if not any(isinstance(hook, Leave) for hook in model._forward_hooks.values()):
        model.register_forward_hook(Leave(), always_call=True)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse` in place: takes its hooks away from ``model``, and nothing else."""
    for module in model.modules():
        for hooks in (getattr(module, "_forward_hooks", {}), getattr(module, "_forward_pre_hooks", {})):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
    return model


def report(model: nn.Module) -> list[Site]:
    """The pairs of ``model`` that are known, each fused or left with the reason.

    A forward of a fused model shows all the pairs that ran. Before it those are known that stand side by side in a
    Sequential.
    """
    sites = []
    neighbours = dict(_neighbours(model))
    for name, module in model.named_modules():
        reader = _reader(module)
        kind = _map_name(module)
        if reader is not None and (reader.fused or reader.left):
            sites += [Site(name, kind, rectifier, True) for rectifier in sorted(reader.fused)]
            left = {rectifier: why for rectifier, why in reader.left.items() if rectifier not in reader.fused}
            sites += [Site(name, kind, rectifier, False, why) for rectifier, why in left.items()]
        elif name in neighbours and (reader is None or not any(reader.tries)):
            if isinstance(module, torch.jit.ScriptModule):
                why = "TorchScript has its code compiled in, which fuse() does not reach"
            else:
                why = "fuse(model) was not called" if reader is None else "has not run yet"
            sites.append(Site(name, kind, neighbours[name], False, why))
    return sites


def _reader(module: nn.Module) -> Reader | None:
    hooks = getattr(module, "_forward_hooks", {}).values()
    return next((hook for hook in hooks if isinstance(hook, Reader)), None)


_RECTIFIERS = {"ReLU": "relu", "LeakyReLU": "leaky_relu", "PReLU": "prelu", "RReLU": "rrelu"}


def _neighbours(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The name of each map that a rectifier follows in a Sequential, and the rectifier's."""
    for name, module in model.named_modules():
        in_order = (
            getattr(type(module), "__iter__", None) is nn.Sequential.__iter__
            and type(module).forward is nn.Sequential.forward
        )
        if not in_order and getattr(module, "original_name", "") != "Sequential":
            continue
        steps = [(k, m) for k, m in module.named_children() if _class_name(m) != "Identity"]
        for (key, first), (_, second) in itertools.pairwise(steps):
            if _map_name(first) and _class_name(second) in _RECTIFIERS:
                yield f"{name}.{key}".lstrip("."), _RECTIFIERS[_class_name(second)]


def _class_name(module: Any) -> str:
    """Of torch's class that ``module`` is or derives from; a scripted module says it in ``original_name``."""
    own = (c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules."))
    return str(getattr(module, "original_name", next(own, "")))


def _map_name(module: nn.Module) -> str:
    """Such as "conv2d" or "linear", "" for what is no map."""
    name = _class_name(module)
    return name.lower().replace("convtranspose", "conv_transpose") if name.startswith(("Conv", "Linear")) else ""
