"""Whether the call that reads a tensor is the last that can: then a rectifier may write over it.

A tensor is held by the frames between its reader and the caller of the rectifier, as many references as are counted
once for each way to spell one; and by a variable of that caller, if the call's result goes into the same variable
(`x = self.act(x)`, the loop of a Sequential) or out of the function (`return self.act(x)`). Anything beyond counts as
somebody who reads it later.
"""

from __future__ import annotations

import dis
import functools
import sys
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..internals import MODULE_CALLS, hooks_on_all, without_subclasses

QUIET = ("PRECALL", "KW_NAMES", "CACHE", "PUSH_NULL")
CALLS = ("CALL", "CALL_FUNCTION", "CALL_METHOD")
CALLS_BY_NAME = ("CALL_KW", "CALL_FUNCTION_KW")  # the names lie above the arguments


def is_last_reader(count: int, func: Any, frame: FrameType | None) -> bool:
    """Whether nothing reads a tensor after the call of ``func`` that reads it now.

    count: references to the tensor as its `__torch_function__` counts them; frame: of the caller of that.
    """
    depth, caller = caller_of(frame)
    expected = _expected().get((func, depth), 0)
    if count == expected:
        return True
    return count == expected + 1 and caller is not None and caller.f_lasti in _replacing(caller.f_code)


def caller_of(frame: FrameType | None) -> tuple[int, FrameType | None]:
    """Who calls the rectifier, and how many of torch's own frames lie between."""
    depth = 0
    while frame is not None and frame.f_code in _BETWEEN:
        frame, depth = frame.f_back, depth + 1
    return depth, frame


@functools.lru_cache(maxsize=4096)
def _replacing(code: CodeType) -> frozenset[int]:
    """The offsets of calls in ``code`` whose first argument is a local variable that ends with the call."""
    found: set[int] = set()
    instructions = [i for i in dis.get_instructions(code) if i.opname not in QUIET]
    for at, call in enumerate(instructions[:-1]):
        if call.opname not in CALLS + CALLS_BY_NAME:
            continue
        first = at - 1
        while instructions[first].opname == "LOAD_CONST" and first > 0:
            first -= 1
        loaded, after = instructions[first], instructions[at + 1]
        arguments = at - first - (call.opname in CALLS_BY_NAME)
        if not loaded.opname.startswith("LOAD_FAST") or call.arg != arguments:
            continue
        name = names(loaded)[-1]
        stored = after.opname.startswith("STORE_FAST") and names(after)[0] == name
        if stored or after.opname == "RETURN_VALUE":
            found.update(range(call.offset, after.offset, 2))  # f_lasti may point into the call's inline cache
    return frozenset(found)


def names(instruction: dis.Instruction) -> tuple[str, ...]:
    return instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)


_MODULES = (nn.ReLU, nn.LeakyReLU, nn.RReLU, nn.PReLU)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # one forward
_RECTIFIERS = (F.relu, F.leaky_relu, F.rrelu)
_BETWEEN = {f.__code__ for f in (*MODULE_CALLS, torch.overrides.handle_torch_function)}
_BETWEEN |= {m.forward.__code__ for m in (*_MODULES, *_NORMS)} | {f.__code__ for f in (*_RECTIFIERS, F.batch_norm)}


class _Probe(Tensor):
    """Counts the references to itself where a `Waiting` does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.dim:  # BatchNorm asks
            with without_subclasses():
                return func(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        count = sys.getrefcount(first)
        return func, caller_of(sys._getframe(1))[0], count


def _probe() -> Tensor:
    return torch.empty(1, 1, 1, 1).as_subclass(_Probe)


def _expected() -> dict[Any, int]:
    """References to a tensor that nobody but the call holds, by function and frames between; none where the first call
    finds that calls add some of their own, or that hooks of all modules would see what is tried."""
    if not _measured and _calls_hand_over() and not hooks_on_all():
        one = torch.empty(1)
        calls = *(m() for m in _MODULES), *_RECTIFIERS, torch.relu, nn.BatchNorm2d(1).eval()
        found: list[Any] = [call(_probe()) for call in calls]
        # A function of ours around these would hold the tensor as well.
        found += torch.prelu(_probe(), one), F.batch_norm(_probe(), one, one)
        if _calls_hand_over():  # no other thread came between
            _measured.update({(func, depth): count for func, depth, count in found})
    return _measured


_measured: dict[Any, int] = {}


def _count(value: Any) -> int:
    return sys.getrefcount(value)


# A call from C keeps what it hands over; so does one from Python in Python 3.10.
_HANDED_OVER = next(map(_count, iter(object, None))) - (sys.version_info >= (3, 11))


def _calls_hand_over() -> bool:
    """Whether a call holds its arguments as often as it does in itself.

    A frame evaluator (PEP 523) adds a reference for each call between since Python 3.11, a debugger that keeps a
    frame's variables does in all versions. Dynamo's evaluator is that of all threads while any runs compiled code, and
    stays after some of its errors. What it adds is taken for somebody who reads later: that costs memory, no value.
    """
    return _count(object()) == _HANDED_OVER
