"""What is timed side by side in one case: the fused layer, its peers, and two yardsticks of the machine.

The builders at the end run in a measuring process (:mod:`.measure`) and return its calls by name. A peer
that cannot run a case is there as the reason why. All calls of a case share inputs and parameters' values.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import fused_rect as fr
from fused_rect import ops
from fused_rect.rules import Parameters

from .measure import Runs
from .named import described, named, users_code
from .workloads import Layer

FUSED, FUSED_IN_PLACE = "fused", "fused in place"
EAGER, IN_PLACE, NO_BIAS = "eager", "eager in place", "eager, no bias"
COMPILED, FUSED_COMPILED, ALL_SITES = "compiled", "fused compiled", "fused compiled, all sites"
ONEDNN, CONVOLUTION, COPY, MATMUL = "oneDNN", "convolution alone", "copy", "matrix product"
LEFT_OUT = "left out by default, since compiling takes seconds a case: add --compile"
COMPILERS = (COMPILED, FUSED_COMPILED, ALL_SITES)
BASES = (FUSED, FUSED_IN_PLACE, FUSED_COMPILED, ALL_SITES)  # what the others' times may be divided by
YARDSTICKS = (CONVOLUTION, COPY, MATMUL)
PACKAGES = {"FlagGems": "flag_gems", "Apex": "apex", "xFormers": "xformers"}
MODES = ("training", "inference", "forward")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Call = Callable[[], Any]


def step(module: Callable[..., Any], inputs: tuple[Any, ...], parameters: Iterable[Tensor], mode: str) -> Call:
    """One call of ``module``: without derivatives, with what backward needs, or with a backward pass."""
    if mode == "inference":

        def infer() -> Any:
            with torch.no_grad():
                return module(*inputs)

        return infer
    if mode == "forward":
        return lambda: module(*inputs)
    outputs = [t.detach() for t in _tensors(module(*inputs))]
    directions = [torch.randn_like(t) for t in outputs]
    wanted = [t for t in (*_tensors(inputs), *parameters) if t.requires_grad]

    def train() -> Any:
        made = _tensors(module(*inputs))
        torch.autograd.grad(made, wanted, directions, allow_unused=True)
        return made

    return train


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in _pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


# ---- builders ----


def layer(
    layer: dict[str, Any], part: str, mode: str, dtype: str, layout: str, device: str,
    compiled: Sequence[str] = (),
) -> Runs:  # fmt: skip
    """Convolutions with their rectifiers (``part`` "layer"), or bias and rectifier on an output ("epilogue").

    compiled: those of :data:`COMPILERS` that are wanted.
    """
    torch.manual_seed(0)
    spec = Layer(**layer)
    like: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    format = _format(layout, spec.rank)
    net = spec.network().to(**like).to(memory_format=format).train(mode != "inference")  # type: ignore[call-overload]
    net.requires_grad_(mode != "inference")
    x = torch.randn(spec.shape if part == "layer" else spec.output, **like).contiguous(memory_format=format)
    x.requires_grad_(mode != "inference")
    runs = (_layer_calls if part == "layer" else _epilogue_calls)(spec, net, x, mode, compiled)
    output = torch.zeros(spec.output, **like).contiguous(memory_format=format)
    runs[COPY] = lambda: output.clone()  # its memory allocated anew, as every call's is whose output is its own
    return runs


def model(
    factory: str, shape: list[int] | None, mode: str, dtype: str, layout: str, device: str,
    compiled: Sequence[str] = (),
) -> Runs:  # fmt: skip
    """A user's model before and after :func:`fused_rect.fuse`."""
    original: Any
    original, inputs = load_model(factory, shape, dtype, device)
    rank = max((t.dim() - 2 for t in _tensors(inputs)), default=0)
    original = original.train(mode != "inference").to(memory_format=_format(layout, rank))

    def run(make: Callable[[nn.Module], Any]) -> Call | str:
        made = copy.deepcopy(original)
        return _or_reason(make(made), inputs, list(made.parameters()), mode)

    return {FUSED: run(fr.fuse), EAGER: run(lambda m: m), **_compiled(run, compiled)}


EXPECTED = "a torch.nn.Module, a module and its inputs, or a function without arguments that returns either"


def load_model(name: str, shape: list[int] | None, dtype: str, device: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """The module that ``name`` gives with its inputs, by default one random tensor of ``shape``.

    Raises TypeError or ValueError where it gives something else, UserError where its code fails.
    """
    torch.manual_seed(0)
    made = named(name)
    if not isinstance(made, nn.Module | tuple):
        _check_factory(name, made)
        with users_code():
            made = made()
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise TypeError(f"--model {name} must be {EXPECTED}, got {type(module).__name__}")
    if inputs is None:
        if shape is None:
            raise ValueError(f"--model {name} gives no inputs: add --shape N,C,H,W, or return (module, inputs)")
        inputs = torch.randn(shape)
    cast = {"dtype": getattr(torch, dtype), "device": device}
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    floating = lambda t: t.to(**cast) if t.is_floating_point() else t.to(device)  # noqa: E731
    return module.to(**cast), _pytree.tree_map_only(Tensor, floating, inputs)


def _check_factory(name: str, made: Any) -> None:
    if not callable(made):
        raise TypeError(f"--model {name} must be {EXPECTED}, got {type(made).__name__}")
    try:
        inspect.signature(made).bind()
    except TypeError as error:
        raise TypeError(f"--model {name} must be {EXPECTED}, and calling it without arguments is {error}") from None
    except ValueError:  # a builtin that shows no signature
        pass


def machine(device: str, copied: int, side: int, dtype: str) -> Runs:
    """The machine's ceilings: a copy of ``copied`` bytes, and a product of two ``side`` x ``side`` matrices."""
    a, b = torch.randn(2, side, side, dtype=getattr(torch, dtype), device=device)
    source, target = torch.zeros(2, copied, dtype=torch.uint8, device=device)
    return {COPY: lambda: target.copy_(source), MATMUL: lambda: a @ b}


# ---- calls ----


def _layer_calls(
    spec: Layer, net: nn.Sequential, x: Tensor, mode: str, compiled: Sequence[str]
) -> dict[str, Call | str]:
    parameters = list(net.parameters())

    def run(make: Callable[[nn.Module], Any]) -> Call | str:
        return _or_reason(make(copy_of(net)), (x,), parameters, mode)

    runs = {FUSED: run(fr.fuse), EAGER: run(lambda m: m), IN_PLACE: _in_place_or_reason(net, run)}
    runs |= _compiled(run, compiled)
    runs[ONEDNN] = _onednn(spec, net, x, mode)
    runs |= _packages(spec, net, x, parameters, mode)
    maps: Any = copy_of(net)[::2]
    for convolution in maps:
        convolution.bias = None
    runs[CONVOLUTION] = step(maps, (x,), list(maps.parameters()), mode)
    return runs


def _epilogue_calls(
    spec: Layer, net: nn.Sequential, x: Tensor, mode: str, compiled: Sequence[str]
) -> dict[str, Call | str]:
    """Calls on a convolution's output ``x``; those in place have one of their own, with no bias to add.

    Half of its elements are positive and half zero, a fixed point: rewriting it changes no later round.
    """
    convolution: Any
    convolution, activation = net
    slopes = list(activation.parameters())
    trained = x.requires_grad
    bias, none = convolution.bias, torch.zeros_like(convolution.bias).requires_grad_(trained)
    wide, wide_none = (b.detach().view(-1, *(1,) * spec.rank).requires_grad_(trained) for b in (bias, none))
    leaf, buffer = x.new_zeros(1).requires_grad_(trained), x.detach().relu()
    fresh: Callable[[Tensor, Tensor], Any] = _Output.apply if trained else lambda leaf, buffer: buffer
    plain = lambda z: activation(z + wide)  # noqa: E731
    runs: dict[str, Call | str] = {
        FUSED: step(lambda z: _fused(z, bias, activation), (x,), [bias, *slopes], mode),
        EAGER: _or_reason(plain, (x,), [wide, *slopes], mode),  # torch's CPU has no RReLU in float16, say
        NO_BIAS: _or_reason(activation, (x,), slopes, mode),
        FUSED_IN_PLACE: "PReLU's backward reads the convolution's output",
    }
    if not (slopes and trained):
        ours = lambda leaf: _fused_(fresh(leaf, buffer), none, activation)  # noqa: E731
        runs[FUSED_IN_PLACE] = step(ours, (leaf,), [none, *slopes], mode)

    def in_place(make: Callable[[nn.Module], Any]) -> Call | str:
        rectify = make(activation)
        return _or_reason(lambda leaf: rectify(fresh(leaf, buffer).add_(wide_none)), (leaf,), [wide_none], mode)

    runs[IN_PLACE] = _in_place_or_reason(activation, in_place)
    return runs | _compiled(lambda make: _or_reason(make(plain), (x,), [wide, *slopes], mode), compiled, (COMPILED,))


class _Output(torch.autograd.Function):
    """A convolution's output without its cost: ``buffer`` itself, as a tensor that autograd takes for a fresh one.

    It adds some 10 us to a call in place that trains, ours and eager's alike.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, buffer: Tensor) -> Tensor:
        return buffer.data

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, None]:
        return None, None


def _fused(z: Tensor, bias: Tensor, activation: nn.Module) -> Tensor:
    weight, rule = fr.nn.epilogue_arguments(activation)
    return ops.run(z, Parameters(bias, weight), rule)


def _fused_(z: Tensor, bias: Tensor, activation: nn.Module) -> Tensor:
    weight, rule = fr.nn.epilogue_arguments(activation)
    ops.run_(z, Parameters(bias, weight), rule)
    return z


def _in_place_or_reason(net: nn.Module, run: Callable[[Callable[[Any], Any]], Call | str]) -> Call | str:
    def in_place(module: nn.Module) -> nn.Module:
        made: nn.Module = copy_of(module)
        for m in made.modules():
            if hasattr(m, "inplace"):
                m.inplace = True  # type: ignore[assignment]
        return made

    settable = any(hasattr(m, "inplace") for m in net.modules())
    return run(in_place) if settable else "torch has no PReLU in place"


def _compiled(
    run: Callable[[Callable[[Any], Any]], Call | str], wanted: Sequence[str], among: Sequence[str] = COMPILERS
) -> dict[str, Call | str]:
    """By Inductor alone, by our backend with the sites that it chooses, and with all of them.

    One that would run the model as it is, which torch.compile does without a word, is absent with that for its reason.
    """
    if not wanted:
        return {COMPILED: LEFT_OUT}
    from fused_rect import compile as fused_compile

    ours = functools.partial(torch.compile, backend=fused_compile.backend)
    makers: dict[str, Callable[[Any], Any]] = {
        COMPILED: torch.compile,
        FUSED_COMPILED: functools.partial(ours, options={"fused_rect.sites": "auto"}),
        ALL_SITES: functools.partial(ours, options={"fused_rect.sites": "all"}),
    }
    torch._dynamo.reset()  # else the models of earlier cases count towards the limit of recompilations ...
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # ... behind which torch runs them uncompiled
    return {name: _if_compiled(run, makers[name]) for name in among if name in wanted}


def _if_compiled(run: Callable[[Callable[[Any], Any]], Call | str], make: Callable[[Any], Any]) -> Call | str:
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    call = run(make)
    return call if isinstance(call, str) or frames["ok"] > before else "torch.compile would run it as it is"


def _onednn(spec: Layer, net: nn.Sequential, x: Tensor, mode: str) -> Call | str:
    """The convolution that Inductor puts into frozen CPU models: it applies the rectifier to its sums itself."""
    if mode != "inference" or x.device.type != "cpu":
        return "its fused convolution is for inference on a CPU"
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return "this torch was built without it"
    rule = fr.nn.epilogue_arguments(net[1])[1]
    if rule.learned:
        return "fuses no PReLU"
    slopes = [] if rule.slope == "zero" else [rule.lower]
    sizes = (spec.padding, spec.stride, (spec.dilation,) * spec.rank, 1)
    convolutions: Any = net[::2]

    def run(x: Tensor) -> Any:
        for m in convolutions:
            x = torch.ops.mkldnn._convolution_pointwise(x, m.weight, m.bias, *sizes, rule.name, slopes, "")
        return x

    return _or_reason(run, (x,), [], mode)


def copy_of(module: nn.Module) -> Any:
    """Another module that shares ``module``'s parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def _or_reason(module: Any, inputs: tuple[Any, ...], parameters: Sequence[Tensor], mode: str) -> Call | str:
    try:
        run = step(module, inputs, parameters, mode)
        run()
    except Exception as error:
        return described(error)
    return run


def _packages(spec: Layer, pair: Any, x: Tensor, parameters: Sequence[Tensor], mode: str) -> dict[str, Call | str]:
    """Other packages' version of the pair, or why there is none here."""
    runs: dict[str, Call | str] = {}
    for name, package in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            runs[name] = "not installed"
        elif not x.is_cuda:
            runs[name] = f"has no kernels for {x.device.type} tensors"
        elif name == "FlagGems":
            runs[name] = _or_reason(_with_flag_gems(pair), (x,), parameters, mode)
        elif name == "Apex":
            runs[name] = _apex(spec, pair, x, parameters, mode)
        else:
            runs[name] = "has had no bias + rectifier since it dropped FusedDropoutBias"
    return runs


def _with_flag_gems(pair: Any) -> Callable[..., Any]:
    """FlagGems replaces ATen's operations while its context is open."""
    gems: Any = importlib.import_module("flag_gems")

    def run(x: Tensor) -> Any:
        with gems.use_gems():
            return pair(x)

    return run


def _apex(spec: Layer, pair: Any, x: Tensor, parameters: Sequence[Tensor], mode: str) -> Call | str:
    convolutions = pair[::2]
    square = len(set(spec.stride)) == len(set(spec.padding)) == 1 and spec.rank == 2 and spec.dilation == 1
    if spec.rectifier != "relu" or x.dtype != torch.float16 or not square:
        return "ConvBiasReLU serves float16 2d convolutions with ReLU"
    with contextlib.suppress(ImportError):
        fused: Any = importlib.import_module("apex.contrib.conv_bias_relu").ConvBiasReLU

        def run(x: Tensor) -> Any:
            for conv in convolutions:
                x = fused(x, conv.weight, conv.bias.view(1, -1, 1, 1), spec.padding[0], spec.stride[0])
            return x

        return _or_reason(run, (x,), parameters, mode)
    return "installed without its extension conv_bias_relu"


def _format(layout: str, rank: int) -> torch.memory_format:
    if layout == "channels_last" and rank == 3:
        return torch.channels_last_3d
    return LAYOUTS[layout if rank == 2 else "contiguous"]
