"""Which of the pairs that run in others' models fuse() reaches: `python -m fused_rect.perf.models --reach [name ...]`.

A mode that knows nothing of modules or hooks watches the functions that a model calls, in evaluation: a pair is a map
whose output has one reader, a rectifier; or one reader, a BatchNorm, whose output has one reader, a rectifier.
Exits with 1 where fewer are fused than :data:`WANTED`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_rect as fr
from fused_rect.compile.sites import MAPS
from fused_rect.fusion.twins import TWINS
from fused_rect.fusion.waiting import trains

from .models import MODELS, Model, hugging, spandrel, timm

# Of the pairs of a map and a rectifier, and of those with a BatchNorm in evaluation between.
WANTED = (0.95, 0.90)


def zoo(module: str, name: str, shape: tuple[int, ...] = (2, 3, 64, 64)) -> Model:
    def build() -> nn.Module:
        made: nn.Module = getattr(timm(module), name)(num_classes=10)
        return made

    return Model("timm", build, shape)


_TEXT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
REACH = {
    **MODELS,
    "FBCNN": spandrel("FBCNN", "FBCNN", "FBCNN", 32, nb=1),
    "OPT": hugging("opt", "OPTModel", "OPTConfig", (1, 8), **_TEXT, word_embed_proj_dim=32, ffn_dim=64),
    "T5": hugging("t5", "T5EncoderModel", "T5Config", (1, 8), vocab_size=50, d_model=32, d_ff=64, d_kv=8, num_heads=4),
    "SegFormer": hugging("segformer", "SegformerForSemanticSegmentation", "SegformerConfig", (1, 3, 64, 64)),
    "ResNet": hugging("resnet", "ResNetModel", "ResNetConfig", (1, 3, 64, 64)),
    "RegNet": hugging("regnet", "RegNetModel", "RegNetConfig", (1, 3, 64, 64)),
    "GLPN": hugging("glpn", "GLPNForDepthEstimation", "GLPNConfig", (1, 3, 64, 64)),
    "SuperPoint": hugging("superpoint", "SuperPointForKeypointDetection", "SuperPointConfig", (1, 3, 64, 64)),
    "UnivNet": hugging("univnet", "UnivNetModel", "UnivNetConfig", (1, 20, 100)),
    **{
        name: zoo(module, name, (1, 3, 128, 128) if module.startswith(("inception", "nasnet")) else (2, 3, 64, 64))
        for module, names in {
            "resnet": "resnet18 resnet50 wide_resnet50_2 resnext50_32x4d seresnet18 resnet26d",
            "vgg": "vgg11 vgg11_bn vgg16_bn",
            "regnet": "regnetx_002 regnety_002",
            "densenet": "densenet121",
            "dla": "dla34 dla46_c",
            "hrnet": "hrnet_w18_small",
            "byobnet": "repvgg_a0 gernet_s mobileone_s0 resnet51q",
            "xception": "xception41",
            "xception_aligned": "xception41",
            "inception_v3": "inception_v3",
            "inception_v4": "inception_v4",
            "ghostnet": "ghostnet_100",
            "mobilenetv3": "mobilenetv3_small_100",
            "efficientnet": "mnasnet_100 semnasnet_100",
            "selecsls": "selecsls42",
            "cspnet": "cspresnet50 darknet53",
            "dpn": "dpn48b dpn68",
            "nfnet": "nf_resnet26 nf_regnet_b0",
            "resnetv2": "resnetv2_50 resnetv2_50x1_bit",
            "vovnet": "ese_vovnet19b_slim vovnet39a",
            "res2net": "res2net50_48w_2s",
            "resnest": "resnest14d",
            "sknet": "skresnet18",
            "senet": "legacy_seresnet18",
            "nasnet": "nasnetalarge",
            "fasternet": "fasternet_t0",
            "hgnet": "hgnet_tiny hgnetv2_b0",
            "tresnet": "tresnet_m",
        }.items()
        for name in names.split()
    },
}


class _FusedOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func.namespace == "fused_rect"
        return func(*args, **(kwargs or {}))


@dataclass
class _Value:
    """A tensor that a map or a BatchNorm returned, and what reads it: names of functions, or another such value."""

    tensor: Tensor
    readers: list[Any]


class Pairs(TorchFunctionMode):
    """Watches the functions of a model as it runs, whatever modules they come from: who reads the output of what."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[_Value] = []
        self.values: dict[int, _Value] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [self.values[id(t)] for t in tree_leaves((args, kwargs)) if id(t) in self.values]
        before = [value.tensor._version for value in read]
        with _FusedOps() as ops:
            result = func(*args, **kwargs)
        if func in MAPS:
            self.maps.append(self._value(result))
        elif func is F.batch_norm and len(read) == 1 and not ops.seen and not trains(*args, **kwargs):
            read[0].readers.append(self._value(result))
        elif any(isinstance(t, Tensor) for t in tree_leaves(result)):
            for value, version in zip(read, before):
                if result is not value.tensor or value.tensor._version != version:
                    value.readers.append((func in TWINS, ops.seen))
                if result is value.tensor and value.tensor._version != version:  # in place: another value from here on
                    del self.values[id(result)]
        return result

    def _value(self, tensor: Tensor) -> _Value:
        self.values[id(tensor)] = made = _Value(tensor, [])
        return made

    def counts(self) -> tuple[int, int, int, int]:
        """Pairs whose map's output has one reader, fused ones among them; the same with a BatchNorm between."""
        plain = [v.readers[0] for v in self.maps if len(v.readers) == 1 and isinstance(v.readers[0], tuple)]
        normed = [v.readers[0].readers for v in self.maps if len(v.readers) == 1 and isinstance(v.readers[0], _Value)]
        single = [readers[0] for readers in normed if len(readers) == 1 and isinstance(readers[0], tuple)]
        found = [[fused for rectifier, fused in pairs if rectifier] for pairs in (plain, single)]
        return len(found[0]), sum(found[0]), len(found[1]), sum(found[1])


def reached(entry: Model) -> tuple[int, int, int, int]:
    """:meth:`Pairs.counts` of the second forward of a fused model in evaluation."""
    torch.manual_seed(0)
    model = fr.fuse(entry.build().eval(), fold_batchnorm=True)
    # Token numbers of two dims, else an image or a spectrogram.
    x = torch.ones(entry.shape, dtype=torch.int64) if len(entry.shape) == 2 else torch.randn(entry.shape)
    with torch.no_grad():
        model(x)
        pairs = Pairs()
        with pairs:
            model(x)
    return pairs.counts()


def reach(names: list[str]) -> int:
    total = [0, 0, 0, 0]
    for name in names or REACH:
        try:
            counts = reached(REACH[name])
        except ModuleNotFoundError as missing:
            print(f"{name:24} skipped: pip install {REACH[name].package} (no module {missing.name})", flush=True)
            continue
        total = [a + b for a, b in zip(total, counts)]
        print(
            f"{name:24} {counts[1]:4} of {counts[0]:4} pairs, {counts[3]:4} of {counts[2]:4} with a BatchNorm",
            flush=True,
        )
    shares = [fused / max(pairs, 1) for pairs, fused in (total[:2], total[2:])]
    print(f"{'all':24} {total[1]:4} of {total[0]:4} pairs ({shares[0]:.1%}), "
          f"{total[3]:4} of {total[2]:4} with a BatchNorm ({shares[1]:.1%})")  # fmt: skip
    return int(any(pairs and share < wanted for pairs, share, wanted in zip(total[::2], shares, WANTED)))
