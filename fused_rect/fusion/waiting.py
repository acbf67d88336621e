"""The output of a map waits for its reader: a rectifier that reads it next, however it is written, is ours.

A hook on each map gives the map's output the class :class:`Waiting`. It stays the tensor that it was (the same object,
values and history), so whatever does not know the class sees nothing new; the first torch function that reads it makes
it an ordinary tensor again, and runs as ours where it is a rectifier. No source is read and nothing is traced:
branches, loops, helpers, wrappers and `nn.Identity` are all the same to it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import ops
from ..internals import hooks_on_all, tracing_state, transforms_active, without_subclasses
from ..ops.checks import FLOATING
from . import norms
from .holders import caller_of, is_last_reader
from .readers import is_rectifier_next
from .twins import TWINS, Call, Twin, rectify

# A map whose output no rectifier has read in so many calls of its mode (training or not) is not asked again.
TRIES = 3
# Outputs of fewer elements run as they did. Waiting, and calling our kernels, costs 20 us in forward and as much again
# in backward; a pass over 16,384 float32 that is saved is 4 us of one CPU core, and less than a launch on a GPU.
MIN_ELEMENTS = 2**14
# The same behind a BatchNorm, which is left to its rectifier from here on: to arrange that costs 70 to 100 us, as much
# as the pass that it saves over so many float32 takes two CPU cores.
MIN_ELEMENTS_OF_NORMS = 2**20
_LOOKS = (torch.Size, int, bool, torch.dtype, torch.device, torch.layout)  # what a call returns that reads no values
_OURS = (ops.rectify, ops.rectify_, ops.rectify_bits, ops.rectify_bits_)


class Output(NamedTuple):
    """What a tensor that waits is."""

    reader: Reader
    kind: int  # of the map's call, an index of the reader's lists
    fresh: bool  # nobody holds its memory but by this tensor, nor keeps it for backward
    size: int  # elements
    norm: str = ""  # of a BatchNorm's output, "training" or "evaluation"
    deferred: norms.Deferred | None = None  # a BatchNorm that is yet to run

    def taken(self, rectifier: str) -> None:
        self.reader.fused.add(rectifier)
        self.reader.taken[self.kind] = True


def wait(tensor: Tensor, output: Output) -> None:
    handler = getattr(sys.modules.get("torch._dynamo"), "callback_handler", None)
    if handler is not None and _before_compiling not in handler.start_callbacks:  # torch._dynamo.reset() clears them
        handler.register_start_callback(_before_compiling)
    tensor._fused_rect = output  # type: ignore[attr-defined]
    tensor.__class__ = Waiting
    _thread.unread.append(weakref.ref(tensor))


def release(tensor: Tensor) -> Output:
    """An ordinary tensor again, for who is no rectifier."""
    return _with_values(tensor, _taken(tensor))


def _taken(tensor: Tensor) -> Output:
    tensor.__class__ = Tensor
    found: Output = tensor.__dict__.pop("_fused_rect")
    return found


def _with_values(tensor: Tensor, output: Output) -> Output:
    if output.deferred is not None:
        norms.fill(tensor, output.deferred)
    return output._replace(deferred=None)


class _Thread(threading.local):
    """What waits in a thread; bounded, since a part of a model may be called without the model."""

    def __init__(self) -> None:
        self.unread: deque[weakref.ref[Tensor]] = deque(maxlen=1024)


_thread = _Thread()


def release_unread() -> list[Reader]:
    """Nothing waits any more in this thread; the readers of what did."""
    found = []
    unread = _thread.unread
    while unread:
        tensor = unread.pop()()
        if type(tensor) is Waiting:
            found.append(release(tensor).reader)
    return found


def _before_compiling(_: Any) -> None:
    """Dynamo starts on a frame, such as a compiled part of a fused model: it is to see ordinary tensors.

    Code compiled for those is not run for a tensor of another class, but compiled anew: such a map's output soon
    waits no more.
    """
    for reader in release_unread():
        reader.compiled += 1


# ---- the reader ----


class Waiting(Tensor):
    """See the module. An instance is a `torch.Tensor` before and after; nothing constructs one."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_compiling():
            with without_subclasses():
                return func(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if type(first) is not Waiting:
            _release_all(args, kwargs)
            return func(*args, **kwargs)
        twin = TWINS.get(func)
        if twin is not None:
            last = is_last_reader(sys.getrefcount(first), func, sys._getframe(1))
            return _rectified(twin, first, last, func, args, kwargs)
        if func is F.batch_norm:
            count = sys.getrefcount(first)
            if _is_deferred(first, count, sys._getframe(1), args, kwargs):
                return first
        found = release(first)
        version = _version(first)
        result = func(*args, **kwargs)
        if isinstance(result, _LOOKS) or (result is first and version is not None and _version(first) == version):
            wait(first, found)
        elif func is F.batch_norm and not found.norm and _is_ordinary(result):
            norm = "training" if trains(*args, **kwargs) else "evaluation"
            wait(result, found._replace(fresh=True, norm=norm))
        elif func in _OURS:
            found.taken(str(args[4]))
        return result


def _version(tensor: Tensor) -> int | None:
    """How often it was written; tensors of inference mode do not count."""
    return None if tensor.is_inference() else tensor._version


# What errors and class names say of such a tensor is what they said.
Waiting.__name__, Waiting.__qualname__, Waiting.__module__ = Tensor.__name__, Tensor.__qualname__, Tensor.__module__


def _release_all(*found: Any) -> None:
    """Whatever waits deeper in the arguments: `torch.cat([a, b])`."""
    for value in found:
        if type(value) is Waiting:
            release(value)
        elif isinstance(value, (tuple, list)):
            _release_all(*value)
        elif isinstance(value, dict):
            _release_all(*value.values())


def trains(input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
           training: bool = False, *_: Any, **__: Any) -> bool:  # fmt: skip
    return training


def _is_deferred(first: Tensor, count: int, frame: FrameType, args: Any, kwargs: Any) -> bool:
    """Whether the BatchNorm that reads ``first`` now may run later, in its place.

    Nobody else holds that, and a rectifier reads it next, so nobody sees that the BatchNorm has not run.
    count: references to ``first``, as for `is_last_reader`.
    """
    output: Output = first._fused_rect  # type: ignore[attr-defined]
    if not output.reader.fold or output.norm or not output.fresh or output.size < MIN_ELEMENTS_OF_NORMS:
        return False
    if not is_last_reader(count, F.batch_norm, frame) or not is_rectifier_next(caller_of(frame)[1]):
        return False
    _taken(first)
    deferred = norms.defer(*args, **kwargs)
    wait(first, output if deferred is None else output._replace(norm="evaluation", deferred=deferred))
    return deferred is not None


def _rectified(twin: Twin, first: Tensor, last: bool, func: Any, args: Any, kwargs: Any) -> Any:
    output = _taken(first)
    reader, norm = output.reader, output.norm
    if output.deferred is not None:
        if _filled(twin, first, output, last, args, kwargs):
            return first
        _with_values(first, output)
    if norm and not (reader.fold and norm == "evaluation"):
        reader.left[twin.name] = (
            "a BatchNorm stands between; fuse(model, fold_batchnorm=True) takes it along in evaluation"
            if norm == "evaluation"
            else "a BatchNorm in training stands between"
        )
        return func(*args, **kwargs)
    least = MIN_ELEMENTS_OF_NORMS if norm else MIN_ELEMENTS
    if output.size < least:
        reader.left[twin.name] = f"its outputs have fewer than {least} elements, where torch's own is as fast"
        return func(*args, **kwargs)
    call = _call_of(twin, args, kwargs)
    if call is None:
        reader.left[twin.name] = "its arguments are not those that the fused kernels take"
        return func(*args, **kwargs)
    output.taken(twin.name)
    return rectify(call, last and output.fresh)


def _filled(twin: Twin, first: Tensor, output: Output, last: bool, args: Any, kwargs: Any) -> bool:
    """Whether the rectifier's values could be written where BatchNorm's were to be: nobody else reads those."""
    call = _call_of(twin, args, kwargs)
    if call is None or output.deferred is None or not (last or call.in_place):
        return False
    if call.rule.random:
        return False
    norms.fill(first, output.deferred, call.rule, call.weight)
    if call.in_place and not first.is_inference():
        torch.autograd.graph.increment_version(first)
    output.taken(twin.name)
    return True


def _call_of(twin: Twin, args: Any, kwargs: Any) -> Call | None:
    try:
        return twin.call(*args, **kwargs)
    except TypeError:  # arguments that torch's function takes beyond these, or refuses
        return None


# ---- the hooks ----


class Hook:
    """What :func:`fuse` adds to a module, by its class to be told from others' hooks."""

    @property
    def __name__(self) -> str:
        """Asked for by torch.jit.script alone, which would compile the hook."""
        raise RuntimeError(
            "torch.jit.script cannot compile a model while it is fused: call fused_rect.unfuse(model) first, "
            "or torch.jit.trace, which records torch's own operations"
        )


class Reader(Hook):
    """The forward hook of one map, and what is known of who reads its output: rectifiers by name, or why not ours."""

    def __init__(self, fold_batchnorm: bool) -> None:
        self.fold = fold_batchnorm
        self.fused: set[str] = set()
        self.left: dict[str, str] = {}
        # By kind of call, in evaluation and in training, of three sizes: how many waited, and whether ours were read.
        self.tries, self.taken = [0] * 6, [False] * 6
        self.compiled = 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        # Each call pays for these lines: an attribute or a function of ours less is a hundredth of a small pair's time.
        if is_compiling() or type(output) is not Tensor or tracing_state() is not None:
            return
        size = output.numel()
        kind = 3 * module.training + (size < MIN_ELEMENTS) + (size < MIN_ELEMENTS_OF_NORMS)
        if not self.taken[kind]:  # else it waits for good, so that checkpointed calls repeat themselves
            if self.tries[kind] == TRIES:
                return
            self.tries[kind] += 1
        if self.compiled < TRIES and _is_ordinary(output):
            wait(output, Output(self, kind, _is_torchs_own(module), size))


class Leave(Hook):
    """The forward hook of a fused model: what nobody read leaves it as an ordinary tensor."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_compiling() and _thread.unread:
            release_unread()


def _is_ordinary(output: Any) -> bool:
    """Whether ``output`` is a dense tensor that our ops take as torch's do, with no transform that would see the op."""
    return (
        type(output) is Tensor
        and output.dtype in FLOATING
        and output.layout is torch.strided
        and _is_dense(output)
        and not output.is_nested
        and not output.is_meta
        and not transforms_active()
    )


def _is_dense(output: Tensor) -> bool:
    if output.is_contiguous():
        return True
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(output.dim())
    return channels_last is not None and output.is_contiguous(memory_format=channels_last)


def _is_torchs_own(module: Any) -> bool:
    """Whether the map's output is new: what runs is torch's own forward, and nobody else was handed the output."""
    own = module.__dict__
    return (
        type(module).forward in _FORWARDS
        and getattr(type(module), "_conv_forward", None) in _CONV_FORWARDS
        and not ("forward" in own or "_conv_forward" in own)
        and len(module._forward_hooks) == 1
        and not hooks_on_all()
    )


MAPS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = {m.forward for m in MAPS}
_CONV_FORWARDS = {getattr(m, "_conv_forward", None) for m in MAPS}
