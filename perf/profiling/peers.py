"""What is timed side by side in one case: the fused layer, its peers, and two yardsticks of the machine.

The builders at the end run in a measuring process (:mod:`.measure`) and return its calls by name. A peer
that cannot run a case is there as the reason why. All calls of a case share inputs and parameters' values.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import fused_rect as fr
from fused_rect import ops
from fused_rect.rules import Parameters

from .measure import Runs, named
from .workloads import Layer

FUSED, EAGER, IN_PLACE = "fused", "eager", "eager in place"
COMPILED, FUSED_COMPILED, ONEDNN = "torch.compile", "fused, compiled", "oneDNN"
CONVOLUTION, COPY, MATMUL = "convolution alone", "copy", "matrix product"
LEFT_OUT = "left out by default, since compiling takes seconds a case: add --compile"
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
    layer: dict[str, Any], part: str, mode: str, dtype: str, layout: str, device: str, compiled: bool = False
) -> Runs:
    """A convolution with its rectifier (``part`` "layer"), or bias and rectifier on its output ("epilogue")."""
    torch.manual_seed(0)
    spec = Layer(**layer)
    like: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    convolution: Any
    convolution, activation = (m.to(**like).train(mode != "inference") for m in spec.modules())
    convolution = convolution.to(memory_format=_format(layout, spec.rank))
    parameters = [*convolution.parameters(), *activation.parameters()]
    if mode == "inference":
        for p in parameters:
            p.requires_grad_(False)
    shape = spec.shape if part == "layer" else spec.output
    x = torch.randn(shape, **like).contiguous(memory_format=_format(layout, spec.rank))
    x.requires_grad_(mode != "inference")
    build = _layer_calls if part == "layer" else _epilogue_calls
    runs = build(spec, convolution, activation, x, mode, compiled)
    output = torch.zeros(spec.output, **like).contiguous(memory_format=_format(layout, spec.rank))
    runs[COPY] = lambda: output.clone()  # its memory allocated anew, as every call's is whose output is its own
    return runs


def model(
    factory: str, shape: list[int] | None, mode: str, dtype: str, layout: str, device: str, compiled: bool = False
) -> Runs:
    """A user's model before and after :func:`fused_rect.fuse`."""
    original: Any
    original, inputs = load_model(factory, shape, dtype, device)
    rank = max((t.dim() - 2 for t in _tensors(inputs)), default=0)
    original = original.train(mode != "inference").to(memory_format=_format(layout, rank))
    runs: dict[str, Call | str] = {}
    for name, make in (
        (FUSED, fr.fuse),
        (EAGER, lambda m: m),
        *(((COMPILED, torch.compile), (FUSED_COMPILED, _compile_fused)) if compiled else ()),
    ):
        made = make(copy.deepcopy(original))
        runs[name] = _or_reason(made, inputs, list(made.parameters()), mode)
    return runs if compiled else {**runs, COMPILED: LEFT_OUT}


def load_model(factory: str, shape: list[int] | None, dtype: str, device: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """What ``factory``() gives: a module (its input is random, of ``shape``), or a module and its inputs."""
    torch.manual_seed(0)
    made = named(factory)()
    module, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(module, nn.Module):
        raise TypeError(f"--model {factory} must give a torch.nn.Module (and inputs), got {type(module).__name__}")
    if inputs is None:
        if shape is None:
            raise ValueError(f"--model {factory} gives no inputs: add --shape N,C,H,W, or return (module, inputs)")
        inputs = torch.randn(shape)
    cast = {"dtype": getattr(torch, dtype), "device": device}
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    floating = lambda t: t.to(**cast) if t.is_floating_point() else t.to(device)  # noqa: E731
    return module.to(**cast), _pytree.tree_map_only(Tensor, floating, inputs)


def machine(device: str, copied: int, side: int, dtype: str) -> Runs:
    """The machine's ceilings: a copy of ``copied`` bytes, and a product of two ``side`` x ``side`` matrices."""
    a, b = torch.randn(2, side, side, dtype=getattr(torch, dtype), device=device)
    source, target = torch.zeros(2, copied, dtype=torch.uint8, device=device)
    return {COPY: lambda: target.copy_(source), MATMUL: lambda: a @ b}


# ---- calls ----


def _layer_calls(
    spec: Layer, convolution: nn.Module, activation: nn.Module, x: Tensor, mode: str, compiled: bool
) -> dict[str, Call | str]:
    pair: Any = nn.Sequential(convolution, activation)
    parameters = list(pair.parameters())

    def run(module: Any) -> Call:
        return step(module, (x,), parameters, mode)

    runs: dict[str, Call | str] = {FUSED: run(fr.fuse(copy_of(pair))), EAGER: run(pair)}
    try:
        runs[IN_PLACE] = run(nn.Sequential(convolution, spec.activation(inplace=True).train(activation.training)))
    except TypeError as error:
        runs[IN_PLACE] = str(error)
    if compiled:
        runs[COMPILED] = _or_reason(torch.compile(copy_of(pair)), (x,), parameters, mode)
        runs[FUSED_COMPILED] = _or_reason(_compile_fused(copy_of(pair)), (x,), parameters, mode)
    else:
        runs[COMPILED] = LEFT_OUT
    runs[ONEDNN] = _onednn(spec, convolution, activation, x, mode)
    runs |= _packages(spec, pair, x, parameters, mode)
    bare = copy_of(convolution)
    bare.bias = None
    runs[CONVOLUTION] = step(bare, (x,), list(bare.parameters()), mode)
    return runs


def _epilogue_calls(
    spec: Layer, convolution: Any, activation: nn.Module, x: Tensor, mode: str, compiled: bool
) -> dict[str, Call | str]:
    bias = convolution.bias
    spread = bias.detach().view(-1, *(1,) * spec.rank).requires_grad_(bias.requires_grad)
    plain = lambda z: activation(z + spread)  # noqa: E731
    ours = lambda z: _fused_epilogue(z, bias, activation)  # noqa: E731
    slopes = list(activation.parameters())
    runs: dict[str, Call | str] = {FUSED: step(ours, (x,), [bias, *slopes], mode)}
    runs[EAGER] = step(plain, (x,), [spread, *slopes], mode)
    if compiled:
        runs[COMPILED] = _or_reason(torch.compile(plain), (x,), [spread, *slopes], mode)
    return runs


def _fused_epilogue(z: Tensor, bias: Tensor, activation: nn.Module) -> Tensor:
    weight, rule = fr.nn.epilogue_arguments(activation)
    return ops.run(z, Parameters(bias, weight), rule)


def _onednn(spec: Layer, convolution: Any, activation: Any, x: Tensor, mode: str) -> Call | str:
    """The convolution that Inductor puts into frozen CPU models: it applies the rectifier to its sums itself."""
    if mode != "inference" or x.device.type != "cpu":
        return "its fused convolution is for inference on a CPU"
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return "this torch was built without it"
    if spec.rectifier == "prelu":
        return "fuses no PReLU"
    name, slopes = ("relu", []) if spec.rectifier == "relu" else ("leaky_relu", [_fixed_slope(activation)])
    sizes = (spec.padding, spec.stride, (spec.dilation,) * spec.rank, 1)

    def run(x: Tensor) -> Any:
        return torch.ops.mkldnn._convolution_pointwise(
            x, convolution.weight, convolution.bias, *sizes, name, slopes, ""
        )

    return _or_reason(run, (x,), [], mode)


def _fixed_slope(activation: Any) -> float:
    slope: float = fr.nn.epilogue_arguments(activation)[1][1]
    return slope


def copy_of(module: nn.Module) -> Any:
    """Another module that shares ``module``'s parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def _compile_fused(module: nn.Module) -> Any:
    from fused_rect import compile as fused_compile

    return torch.compile(module, backend=fused_compile.backend)


def _or_reason(module: Any, inputs: tuple[Any, ...], parameters: Sequence[Tensor], mode: str) -> Call | str:
    try:
        run = step(module, inputs, parameters, mode)
        run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
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
    conv = pair[0]
    square = len(set(spec.stride)) == len(set(spec.padding)) == 1 and spec.rank == 2 and spec.dilation == 1
    if spec.rectifier != "relu" or x.dtype != torch.float16 or not square:
        return "ConvBiasReLU serves float16 2d convolutions with ReLU"
    with contextlib.suppress(ImportError):
        fused: Any = importlib.import_module("apex.contrib.conv_bias_relu").ConvBiasReLU
        run = lambda x: fused(x, conv.weight, conv.bias.view(1, -1, 1, 1), spec.padding[0], spec.stride[0])  # noqa: E731
        return _or_reason(run, (x,), parameters, mode)
    return "installed without its extension conv_bias_relu"


def _format(layout: str, rank: int) -> torch.memory_format:
    if layout == "channels_last" and rank == 3:
        return torch.channels_last_3d
    return LAYOUTS[layout if rank == 2 else "contiguous"]
