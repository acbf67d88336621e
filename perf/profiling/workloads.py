"""Layer shapes of real networks, each set with its source: data, and what follows from a layer's numbers.

Only layers whose convolution a rectifier follows directly are listed; of repeated layers, one. Batches are those that
the source trains with; :func:`within` makes them fit a CPU.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from fused_rect.rules import RULES

RECTIFIERS = tuple(name for name, row in RULES.items() if row.law in ("", "slope"))  # that torch has, too


@dataclass(frozen=True)
class Layer:
    """A convolution of an input of ``shape`` (N, C, ...) and the rectifier behind it, ``depth`` times in a row.

    rectifier: the one that its network puts there, "" where there is no network.
    """

    name: str
    shape: tuple[int, ...]
    out_channels: int
    kernel: tuple[int, ...]
    rectifier: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: int = 1
    slope: float = 0.01  # of "leaky_relu"
    slopes: int = 1  # of "prelu": one, or one a channel
    depth: int = 1

    def __post_init__(self) -> None:
        """Lists, as JSON has them, become tuples; stride 1 and the padding that keeps the size are the defaults."""
        for name in ("shape", "kernel", "stride", "padding"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        same = tuple(self.dilation * (k - 1) // 2 for k in self.kernel)
        object.__setattr__(self, "stride", self.stride or (1,) * len(self.kernel))
        object.__setattr__(self, "padding", self.padding or same)

    @property
    def rank(self) -> int:
        return len(self.shape) - 2

    @property
    def output(self) -> tuple[int, ...]:
        sizes = zip(self.shape[2:], self.kernel, self.stride, self.padding)
        spatial = tuple((size + 2 * p - self.dilation * (k - 1) - 1) // s + 1 for size, k, s, p in sizes)
        return (self.shape[0], self.out_channels, *spatial)

    @property
    def flops(self) -> int:
        """Of the convolutions' forward: a multiplication and an addition for each weight of each output element."""
        return 2 * math.prod(self.output) * self.shape[1] * math.prod(self.kernel) * self.depth

    def network(self) -> nn.Sequential:
        """Convolutions with bias and rectifiers, as torch has them, out of place."""
        return nn.Sequential(*(m for _ in range(self.depth) for m in (self._convolution(), self.activation())))

    def _convolution(self) -> nn.Module:
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.rank - 1]
        return make(
            self.shape[1], self.out_channels, self.kernel, self.stride, self.padding, self.dilation  # type: ignore[arg-type]
        )  # fmt: skip

    def activation(self) -> nn.Module:
        arguments = {"constant": (self.slope,), "learned": (self.slopes,)}.get(RULES[self.rectifier].slope, ())
        made: nn.Module = getattr(nn, RULES[self.rectifier].module)(*arguments)
        return made

    def arguments(self) -> dict[str, Any]:
        """What makes this layer again, as JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class Workload:
    """fit: whether a CPU gets smaller batches."""

    source: str
    layers: tuple[Layer, ...]
    fit: bool = True


def square(name: str, n: int, c: int, size: int, out: int, k: int, rectifier: str, **more: Any) -> Layer:
    """A layer on square maps."""
    for key in ("stride", "padding"):
        if key in more:
            more[key] = (more[key],) * 2
    return Layer(name, (n, c, size, size), out, (k, k), rectifier, **more)


def within(layer: Layer, flops: float) -> Layer:
    """``layer`` with its batch halved until one forward is within ``flops``, or the batch is 1."""
    batch = layer.shape[0]
    while batch > 1 and layer.flops * batch / layer.shape[0] > flops:
        batch //= 2
    return replace(layer, shape=(batch, *layer.shape[1:]))


NIN = Workload(
    "Network in Network, Lin et al. 2013 (arXiv 1312.4400), CIFAR-10 with the authors' batch of 128",
    (
        square("conv1", 128, 3, 32, 192, 5, "relu"),
        square("cccp1", 128, 192, 32, 160, 1, "relu"),
        square("cccp2", 128, 160, 32, 96, 1, "relu"),
        square("conv2", 128, 96, 16, 192, 5, "relu"),
        square("cccp3", 128, 192, 16, 192, 1, "relu"),
        square("conv3", 128, 192, 8, 192, 3, "relu"),
        square("cccp5", 128, 192, 8, 192, 1, "relu"),
    ),
)
RRDBNET = Workload(
    "ESRGAN's generator, Wang et al. 2018 (arXiv 1809.00219), RRDBNet_arch.py: 64 features, growth 32; patches of "
    "32 x 32, batch 16",
    (
        *(square(f"RDB.conv{i + 1}", 16, 64 + 32 * i, 32, 32, 3, "leaky_relu", slope=0.2) for i in range(4)),
        square("upconv1", 16, 64, 64, 64, 3, "leaky_relu", slope=0.2),
        square("upconv2", 16, 64, 128, 64, 3, "leaky_relu", slope=0.2),
        square("HRconv", 16, 64, 128, 64, 3, "leaky_relu", slope=0.2),
    ),
)
COMPACT = Workload(
    "SRVGGNetCompact, Real-ESRGAN (arXiv 2107.10833), srvgg_arch.py: 64 features, a slope a channel; 64 x 64 patches, "
    "batch 12",
    (
        square("body.0", 12, 3, 64, 64, 3, "prelu", slopes=64),
        square("body.2", 12, 64, 64, 64, 3, "prelu", slopes=64),
    ),
)
HIFIGAN = Workload(
    "HiFi-GAN V1, Kong et al. 2020 (arXiv 2010.05646), config_v1.json and models.py: 8192 samples, batch 16, slope "
    "0.1; the first convolution of the generator's residual blocks, and the discriminator of period 2",
    (
        Layer("resblock 256 k3", (16, 256, 256), 256, (3,), "leaky_relu", slope=0.1),
        Layer("resblock 128 k7 d3", (16, 128, 2048), 128, (7,), "leaky_relu", dilation=3, slope=0.1),
        Layer("resblock 64 k11 d5", (16, 64, 4096), 64, (11,), "leaky_relu", dilation=5, slope=0.1),
        Layer("resblock 32 k3", (16, 32, 8192), 32, (3,), "leaky_relu", slope=0.1),
        Layer("MPD.0", (16, 1, 4096, 2), 32, (5, 1), "leaky_relu", (3, 1), (2, 0), slope=0.1),
        Layer("MPD.1", (16, 32, 1366, 2), 128, (5, 1), "leaky_relu", (3, 1), (2, 0), slope=0.1),
        Layer("MPD.2", (16, 128, 456, 2), 512, (5, 1), "leaky_relu", (3, 1), (2, 0), slope=0.1),
    ),
)
STYLEGAN2 = Workload(
    "StyleGAN2's discriminator at its resolutions, Karras et al. 2020 (arXiv 1912.04958), config F: min(32768 / "
    "resolution, 512) channels, batch 4 a GPU, slope 0.2",
    tuple(
        square(f"{size}x{size} conv0", 4, width, size, width, 3, "leaky_relu", slope=0.2)
        for size in (4, 8, 16, 32, 64, 128, 256, 512, 1024)
        for width in (min(32768 // size, 512),)
    ),
)
PIX2PIX = Workload(
    "pix2pix's 70 x 70 PatchGAN, Isola et al. 2017 (arXiv 1611.07004): 256 x 256 pairs, batch 1, slope 0.2; as with "
    "--norm none, since a normalization otherwise stands between all pairs but the first",
    (
        square("C64", 1, 6, 256, 64, 4, "leaky_relu", stride=2, padding=1, slope=0.2),
        square("C128", 1, 64, 128, 128, 4, "leaky_relu", stride=2, padding=1, slope=0.2),
        square("C256", 1, 128, 64, 256, 4, "leaky_relu", stride=2, padding=1, slope=0.2),
        square("C512", 1, 256, 32, 512, 4, "leaky_relu", padding=1, slope=0.2),
    ),
)
VGG16 = Workload(
    "VGG-16, Simonyan and Zisserman 2014 (arXiv 1409.1556): 224 x 224 images, batch 64 a GPU (256 on four)",
    tuple(
        square(name, 64, c, size, out, 3, "relu")
        for name, c, size, out in (
            ("conv1_1", 3, 224, 64), ("conv1_2", 64, 224, 64), ("conv2_1", 64, 112, 128), ("conv2_2", 128, 112, 128),
            ("conv3_1", 128, 56, 256), ("conv3_2", 256, 56, 256), ("conv4_1", 256, 28, 512), ("conv4_2", 512, 28, 512),
            ("conv5_1", 512, 14, 512),
        )
    ),
)  # fmt: skip
RPN = Workload(
    "The region proposal head of Faster R-CNN with FPN (arXiv 1506.01497, 1612.03144), torchvision's RPNHead: 256 "
    "channels on the levels of an 800 x 1344 image, batch 2 a GPU",
    tuple(Layer(f"P{i}", (2, 256, h, w), 256, (3, 3), "relu")
          for i, h, w in ((2, 200, 336), (3, 100, 168), (4, 50, 84), (5, 25, 42), (6, 13, 21))),
)  # fmt: skip

# Of no network: tensors that no cache holds, eight layers in a row for the memory that they keep, and a layer so small
# that calling is all that it costs; three in a row that compilers see whole; for GPUs, more than 32M elements,
# with planes of whole vectors and odd ones.
CPU = Workload(
    "docs/cpu.md: a layer of 16 x 64 x 56 x 56, eight of them in a row, and one of 1 x 8 x 8 x 8",
    (
        square("1x1", 16, 64, 56, 64, 1, ""),
        square("8 in a row", 16, 64, 56, 64, 1, "", depth=8),
        square("small", 1, 8, 8, 8, 3, ""),
    ),
    fit=False,
)
CHAIN = Workload("docs/compile.md: three layers in a row", (square("3 of 3x3", 8, 32, 48, 32, 3, "", depth=3),), False)
GPU = Workload(
    "what `make gpu-check` times: 32 x 64 x 128 x 128, and 32 x 51 x 145 x 145",
    (square("even", 32, 64, 128, 64, 1, "", slopes=64), square("odd", 32, 51, 145, 51, 1, "", slopes=51)),
    fit=False,
)

WORKLOADS = {
    "nin": NIN,
    "rrdbnet": RRDBNET,
    "compact": COMPACT,
    "hifigan": HIFIGAN,
    "stylegan2": STYLEGAN2,
    "pix2pix": PIX2PIX,
    "vgg16": VGG16,
    "rpn": RPN,
    "cpu": CPU,
    "chain": CHAIN,
    "gpu": GPU,
}


def _chosen() -> Workload:
    picked = (("nin", 1), ("rrdbnet", 0), ("hifigan", 3), ("pix2pix", 0))
    named = ((w, WORKLOADS[w].layers[i]) for w, i in picked)
    layers = tuple(replace(layer, name=f"{w} {layer.name}", rectifier="") for w, layer in named)
    return Workload("One layer each of nin, rrdbnet, hifigan and pix2pix, with all four rectifiers", layers)


WORKLOADS["default"] = _chosen()
