"""Who reads what a call returns next, as far as it is certain before it happens.

`g(f(x))`, `x = f(x)` then `g(x)`, and the loop of a Sequential: the bytecode behind the call of f hands its result to g
with nothing in between that could look at it, and g is found where that code will find it.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..internals import has_hooks
from .holders import CALLS, CALLS_BY_NAME, QUIET, names

_MODULES: dict[type[nn.Module], Any] = {m: m.forward for m in (nn.ReLU, nn.LeakyReLU, nn.RReLU, nn.PReLU)}
_FUNCTIONS = (F.relu, F.leaky_relu, F.relu_, F.leaky_relu_, torch.relu, torch.relu_)
_SNAPSHOTS = {"locals", "vars", "dir", "eval", "exec"}
_LOADS = ("LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK")


def is_rectifier_next(frame: FrameType | None) -> bool:
    """Whether the result of the call that ``frame`` is in goes to a rectifier of torch's, and to nobody before."""
    if frame is None or not _may_be_looked_into(frame.f_code):
        return False
    if frame.f_code is nn.Sequential.forward.__code__:
        return _rectifies(_following(*_locals(frame, "self", "module")))
    callee = _callee(frame.f_code, frame.f_lasti)
    return callee is not None and _rectifies(_found(callee, frame))


def _may_be_looked_into(code: CodeType) -> bool:
    """A function whose snapshot of its variables nobody else uses."""
    return bool(code.co_flags & inspect.CO_OPTIMIZED) and _SNAPSHOTS.isdisjoint(code.co_names)


def _locals(frame: FrameType, *names: str) -> tuple[Any, ...]:
    """Variables of the frame, None for what is none."""
    snapshot = frame.f_locals
    found = tuple(snapshot.get(name) for name in names)
    if isinstance(snapshot, dict):  # before Python 3.13 it stays with the frame, and holds all the tensors in it
        snapshot.clear()
    return found


def _rectifies(reader: Any) -> bool:
    if isinstance(reader, nn.Module):
        return type(reader).forward is _MODULES.get(type(reader)) and _runs_alone(reader)
    return any(reader is function for function in _FUNCTIONS)


def _runs_alone(module: nn.Module) -> bool:
    return "forward" not in module.__dict__ and not has_hooks(module)


def _following(sequential: Any, module: Any) -> nn.Module | None:
    """Behind ``module``, past what hands its input on."""
    if type(sequential).__iter__ is not nn.Sequential.__iter__:
        return None
    steps = list(sequential._modules.values())
    if sum(step is module for step in steps) != 1:
        return None
    at = next(i for i, step in enumerate(steps) if step is module)
    behind = (s for s in steps[at + 1 :] if s is not None and not (type(s) is nn.Identity and _runs_alone(s)))
    return next(behind, None)


# ---- the bytecode


class Callee(NamedTuple):
    """``owner.name``, the owner a local variable (self) or a global (F); a global by itself has no name."""

    owner: str
    is_local: bool
    name: str


def _found(callee: Callee, frame: FrameType) -> Any:
    """What that will be, if to look it up runs nobody's code."""
    if not callee.is_local:
        owner = frame.f_globals.get(callee.owner)
        if not callee.name:
            return owner
        return getattr(owner, callee.name, None) if owner is F or owner is torch else None
    (owner,) = _locals(frame, callee.owner)
    if not isinstance(owner, nn.Module) or hasattr(type(owner), callee.name) or callee.name in owner.__dict__:
        return None
    plain = type(owner).__getattribute__ is object.__getattribute__ and type(owner).__getattr__ is nn.Module.__getattr__
    return owner._modules.get(callee.name) if plain else None


class Step(NamedTuple):
    """An instruction, one of those that do two things at once as two."""

    name: str
    value: Any
    offset: int
    effect: int  # on the depth of the stack


def _steps(code: CodeType) -> Iterator[Step]:
    for i in dis.get_instructions(code):
        effect = dis.stack_effect(i.opcode, i.arg, jump=False)
        parts = i.opname.split("_")  # two of them: STORE_FAST_LOAD_FAST
        if len(parts) != 4 or i.opname.count("_FAST") != 2:
            yield Step(i.opname, names(i)[-1] if "_FAST" in i.opname else i.argval, i.offset, effect)
            continue
        for kind, name in zip(parts[::2], names(i), strict=True):
            yield Step(f"{kind}_FAST", name, i.offset, 1 if kind == "LOAD" else -1)


@functools.lru_cache(maxsize=4096)
def _callee(code: CodeType, at: int) -> Callee | None:
    """What is called with the result of the call at offset ``at`` as its first argument, the others constants."""
    steps = list(_steps(code))
    call = max(i for i, step in enumerate(steps) if step.offset <= at)
    if steps[call].name not in CALLS + CALLS_BY_NAME + QUIET:
        return None
    after = _loud(steps, call + 1, 1)
    if after is None:
        return None
    if steps[after].name.startswith("STORE_FAST"):
        return _of_statement(steps, after)
    end = _called(steps, after)
    return None if end is None else _below(steps, call)


def _of_statement(steps: list[Step], store: int) -> Callee | None:
    """Behind `x = f(x)`: `g(x)`, or `owner.g(x)`, which `x` must not be."""
    variable, first = steps[store].value, _loud(steps, store + 1, 1)
    found = None if first is None else _loaded(steps, first)
    if found is None or first is None:
        return None
    callee, argument = found
    is_it = steps[argument].name in _LOADS and steps[argument].value == variable and callee.owner != variable
    behind = _loud(steps, argument + 1, 1)
    return callee if is_it and behind is not None and _called(steps, behind) is not None else None


def _loaded(steps: list[Step], at: int) -> tuple[Callee, int] | None:
    """The callee that is loaded from ``at`` on, and what comes behind it."""
    owner, following = steps[at], _loud(steps, at + 1, 1)
    if following is None or not (owner.name in _LOADS or owner.name == "LOAD_GLOBAL"):
        return None
    if steps[following].name in ("LOAD_ATTR", "LOAD_METHOD"):
        behind = _loud(steps, following + 1, 1)
        callee = Callee(owner.value, owner.name in _LOADS, steps[following].value)
        return None if behind is None else (callee, behind)
    return (Callee(owner.value, False, ""), following) if owner.name == "LOAD_GLOBAL" else None


def _called(steps: list[Step], at: int) -> int | None:
    """Where the call is, if nothing but constants are loaded before it from ``at`` on."""
    while steps[at].name == "LOAD_CONST":
        following = _loud(steps, at + 1, 1)
        if following is None:
            return None
        at = following
    return at if steps[at].name in CALLS + CALLS_BY_NAME else None


def _below(steps: list[Step], call: int) -> Callee | None:
    """The callee that waits on the stack below what the call at ``call`` leaves there."""
    depth, at = 1, call  # above the callee: the result
    while depth > 0:
        depth -= steps[at].effect
        at -= 1
        if at < 0 or "JUMP" in steps[at].name or "STORE" in steps[at].name:
            return None
    last = _loud(steps, at, -1)
    if last is None:
        return None
    if steps[last].name == "LOAD_GLOBAL":
        return Callee(steps[last].value, False, "")
    before = _loud(steps, last - 1, -1)
    found = None if before is None else _loaded(steps, before)
    return found[0] if found is not None and found[1] > last else None


def _loud(steps: list[Step], at: int, towards: int) -> int | None:
    """From ``at`` on, the first instruction that is no bookkeeping of the interpreter's."""
    while 0 <= at < len(steps):
        if steps[at].name not in QUIET:
            return at
        at += towards
    return None
