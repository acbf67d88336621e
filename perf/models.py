"""Model code of others, as it is, fused, and compiled: `python -m fused_rect.perf.models [name ...] [--compile]`.

For each model: sites fused, the largest difference of outputs and gradients from the original's (float64 and float32),
and the peak of live bytes of a training step. Exits with 1 when a difference is over its tolerance.
`--reach` counts instead, over more models, which of the pairs that run are fused by fuse() (perf/reach.py).
The packages (spandrel, timm, transformers) are optional; a model whose package is missing is skipped by name.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused_rect as fr
from fused_rect import fusion
from fused_rect.fusion import waiting

from .profiling.memory import peak_live_bytes

# float64: one rounding of each sum apart. float32: gradients of a deep net, relative to each tensor's largest entry.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


@dataclass(frozen=True)
class Model:
    package: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    fold: bool = False


@dataclass(frozen=True)
class Result:
    name: str
    how: str
    dtype: torch.dtype
    fused: int
    sites: int
    output: float
    gradient: float
    peak_before: int
    peak_after: int

    @property
    def ok(self) -> bool:
        return self.fused > 0 and max(self.output, self.gradient) <= TOLERANCE[self.dtype]

    def __str__(self) -> str:
        return (
            f"{self.name:12} {self.how:8} {str(self.dtype).removeprefix('torch.'):8} "
            f"{self.fused:3} of {self.sites:3} sites  "
            f"output {self.output:.1e}  gradient {self.gradient:.1e}  "
            f"peak {self.peak_before / 1e6:.2f} -> {self.peak_after / 1e6:.2f} MB  {'ok' if self.ok else 'DIFFERS'}"
        )


def bare(package: str) -> None:
    """Make ``package`` importable without running its __init__, which pulls in what the one module does not need."""
    if package in sys.modules:
        return
    parent, _, name = package.rpartition(".")
    if parent:
        bare(parent)
        path = str(Path(sys.modules[parent].__path__[0]) / name)
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"pip install {package}", name=package)
        path = spec.submodule_search_locations[0]
    module = types.ModuleType(package)
    module.__spec__ = importlib.machinery.ModuleSpec(package, None, is_package=True)
    module.__path__ = [path]
    sys.modules[package] = module


@contextlib.contextmanager
def without_torchvision(*classes: str) -> Iterator[None]:
    """What is imported here finds no torchvision, or one that has ``classes`` of torchvision.ops.misc and nothing else.

    None of these models runs it, and its wheel raises at import beside a torch that it was not built with.
    """
    if "torchvision" in sys.modules:
        yield
        return
    misc = types.ModuleType("torchvision.ops.misc")
    vars(misc).update({name: type(name, (nn.Module,), {}) for name in classes})
    hidden: dict[str, Any] = {"torchvision": None}
    if classes:
        hidden = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops")} | {misc.__name__: misc}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def spandrel(architecture: str, module: str, name: str, side: int, fold: bool = False, **sizes: Any) -> Model:
    """A model of spandrel with random weights, for images of ``side`` squared."""

    def build() -> nn.Module:
        bare(f"spandrel.architectures.{architecture}")
        found = importlib.import_module(f"spandrel.architectures.{architecture}.__arch.{module}")
        made: nn.Module = getattr(found, name)(**sizes)
        return made.train(not fold)

    return Model("spandrel", build, (1, 3, side, side), fold)


def timm(module: str) -> Any:
    """A module of timm.models, without the data sets that its package imports."""
    bare("timm.data")
    vars(sys.modules["timm"])["__version__"] = importlib.metadata.version("timm")
    constants = importlib.import_module("timm.data.constants")
    vars(sys.modules["timm.data"]).update({k: v for k, v in vars(constants).items() if k.isupper()})
    bare("timm.models")
    with without_torchvision("FrozenBatchNorm2d"):
        return importlib.import_module(f"timm.models.{module}")


def vgg() -> nn.Module:
    model: nn.Module = timm("vgg").VGG([8, "M", 16, "M", 16, 16, "M"], num_classes=10, drop_rate=0.0)
    return model


def resnet() -> nn.Module:
    module = timm("resnet")
    model: nn.Module = module.ResNet(module.BasicBlock, [1] * 4, num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
    return model.eval()


def hugging(module: str, name: str, config: str, shape: tuple[int, ...], **sizes: Any) -> Model:
    """A model of transformers with random weights."""

    def build() -> nn.Module:
        with without_torchvision():
            package: Any = importlib.import_module(f"transformers.models.{module}")
            made: nn.Module = getattr(package, name)(getattr(package, config)(**sizes))
        return made

    return Model("transformers", build, shape)


_HIFIGAN: dict[str, Any] = {
    "model_in_dim": 16, "upsample_initial_channel": 16, "upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8],
    "normalize_before": False,
}  # fmt: skip
MODELS = {
    "RRDBNet": spandrel("ESRGAN", "RRDB", "RRDBNet", 12, num_filters=8, num_blocks=1, scale=2),
    "Compact": spandrel("Compact", "SRVGG", "SRVGGNetCompact", 12, num_feat=8, num_conv=4, upscale=2),
    "CUGAN UNet": spandrel("RealCUGAN", "upcunet_v3", "UNet1", 32, in_channels=3, out_channels=3, deconv=True),
    "DnCNN": spandrel("DnCNN", "network_dncnn", "DnCNN", 12, fold=True, in_nc=3, out_nc=3, nc=8, nb=5, act_mode="BR"),
    "DRUNet": spandrel("DRUNet", "network_unet", "DRUNet", 16, in_nc=3, out_nc=3, nc=[8, 8, 8, 8], nb=1),
    "VGG": Model("timm", vgg, (2, 3, 56, 56)),
    "ResNet": Model("timm", resnet, (2, 3, 32, 32), fold=True),
    "HiFi-GAN": hugging("speecht5", "SpeechT5HifiGan", "SpeechT5HifiGanConfig", (1, 8, 16), **_HIFIGAN),
}


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of its mean square."""
    x = x.clone().requires_grad_()
    y = model(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(y.square().mean(), [x, *parameters], allow_unused=True)
    return y.detach(), [g for g in gradients if g is not None]


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def compare(name: str, dtype: torch.dtype, how: str) -> Result:
    """One model, ``how`` "fuse" or "compile", against itself as its authors wrote it."""
    entry = MODELS[name]
    torch.manual_seed(0)
    model = entry.build().to(dtype)
    x = torch.randn(entry.shape, dtype=dtype)
    other, sites = _converted(copy.deepcopy(model), x, how, entry.fold)
    expected, expected_gradients = step(model, x)
    got, gradients = step(other, x)
    return Result(
        name,
        how,
        dtype,
        sum(site.fused for site in sites),
        len(sites),
        difference(got, expected),
        max(difference(a, b) for a, b in zip(gradients, expected_gradients)),
        peak_live_bytes(lambda: step(model, x)),
        peak_live_bytes(lambda: step(other, x)),
    )


def _converted(model: nn.Module, x: Tensor, how: str, fold: bool) -> tuple[nn.Module, list[Any]]:
    if how == "fuse":
        fr.fuse(model, fold_batchnorm=fold)
        with torch.no_grad():
            model(x)
        return model, fusion.report(model)
    from fused_rect import compile as fused_compile

    options: dict[str, Any] = {"fused_rect.sites": "all"}
    sites = fused_compile.explain(model, x, options=options)
    compiled: Any = torch.compile(model, backend=fused_compile.backend, options=options)
    return compiled, sites


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fused-rect-models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(MODELS)}; by default all")
    parser.add_argument("--compile", action="store_true", help="through torch.compile too, which takes minutes")
    parser.add_argument("--reach", action="store_true", help="count the pairs that fuse() reaches, over more models")
    chosen = parser.parse_args(arguments)
    waiting.MIN_ELEMENTS = 0  # what is asked is how the models are written; the inputs are small
    if chosen.reach:
        from .reach import reach

        return reach(chosen.names)
    worst = 0
    for name in chosen.names or MODELS:
        try:
            for how in ("fuse", "compile") if chosen.compile else ("fuse",):
                for dtype in TOLERANCE:
                    result = compare(name, dtype, how)
                    print(result, flush=True)
                    worst |= not result.ok
        except ModuleNotFoundError as missing:
            print(f"{name:12} skipped: pip install {MODELS[name].package} (no module {missing.name})", flush=True)
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
