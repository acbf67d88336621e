"""The paper's three networks: Network in Network, the plankton network, and BN-Inception for 28 x 28 images.

`width` scales the channels for small machines; width 1 is the network itself (NIN: 966,986 parameters for 10 classes,
984,356 for 100). All rectifiers come from :class:`variants.Layers`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .variants import Layers


def build(
    network: str,
    layers: Layers,
    in_channels: int,
    classes: int,
    width: float,
    dropout: float,
    rectified_scores: bool = True,
) -> nn.Module:
    """The network ``network`` ("nin", "ndsb" or "inception"). Raises ValueError for another name.

    rectified_scores: whether NIN's last convolution, whose outputs are the scores, has a rectifier, as the public
    configuration has; the other networks end in a linear layer.
    """
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}")
    if not 0 < width <= 8:
        raise ValueError(f"width must lie in (0, 8], got {width}; 1 is the paper's network")
    scaled = lambda channels: max(1, round(channels * width))  # noqa: E731
    model = NETWORKS[network](layers, in_channels, classes, scaled, dropout)
    if network == "nin" and not rectified_scores:
        model.classifier = nn.Sequential(next(model.classifier.children()))  # type: ignore[union-attr]
    return model


Scaled = Callable[[int], int]


class NIN(nn.Module):
    """Lin et al. 2013 as the public CIFAR configuration has it: a rectifier follows every convolution, the last too."""

    def __init__(self, layers: Layers, in_channels: int, classes: int, scaled: Scaled, dropout: float) -> None:
        super().__init__()
        c96, c160, c192 = scaled(96), scaled(160), scaled(192)
        conv = layers.conv
        self.features = nn.Sequential(
            conv(in_channels, c192, 5, 2), conv(c192, c160, 1), conv(c160, c96, 1),
            nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(dropout),
            conv(c96, c192, 5, 2), conv(c192, c192, 1), conv(c192, c192, 1),
            nn.AvgPool2d(3, 2, ceil_mode=True), nn.Dropout(dropout),
            conv(c192, c192, 3, 1), conv(c192, c192, 1),
        )  # fmt: skip
        self.classifier = conv(c192, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.features(images))
        return scores.mean((2, 3))


class NDSB(nn.Module):
    """The plankton network: 70 x 70 grey images, a split in two depths, a spatial pyramid, two wide linear layers.

    The padding of 1 and the max pools are our reading of the paper's table (unverified).
    """

    def __init__(self, layers: Layers, in_channels: int, classes: int, scaled: Scaled, dropout: float) -> None:
        super().__init__()
        c32, c64, c96, c256, c1024 = (scaled(c) for c in (32, 64, 96, 256, 1024))

        def chain(inputs: int, outputs: int, depth: int) -> nn.Sequential:
            channels = [inputs] + [outputs] * depth
            return nn.Sequential(*(layers.conv(a, b, 3, 1) for a, b in itertools.pairwise(channels)))

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, 2, ceil_mode=True)

        self.stem = nn.Sequential(chain(in_channels, c32, 2), pool(), chain(c32, c64, 3), pool())
        self.deep, self.shallow = chain(c64, c96, 4), chain(c64, c96, 3)
        self.trunk = nn.Sequential(pool(), chain(2 * c96, c256, 5))
        self.pyramid = nn.ModuleList([nn.Identity(), nn.MaxPool2d(2, 2), nn.MaxPool2d(4, 4)])
        features = c256 * (8 * 8 + 4 * 4 + 2 * 2)
        self.hidden = nn.Sequential(
            layers.linear(features, c1024), nn.Dropout(dropout), layers.linear(c1024, c1024), nn.Dropout(dropout)
        )
        self.classifier = nn.Linear(c1024, classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (70, 70):
            raise ValueError(f"the plankton network takes 70 x 70 images, got {tuple(images.shape[-2:])}; --image 70")
        x = self.stem(images)
        x = self.trunk(torch.cat([self.deep(x), self.shallow(x)], 1))
        x = torch.cat([level(x).flatten(1) for level in self.pyramid], 1)
        scores: Tensor = self.classifier(self.hidden(x))
        return scores


class Mixed(nn.Module):
    """Branches side by side, their channels concatenated."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Inception(nn.Module):
    """BN-Inception for 28 x 28 crops: convolution, BatchNorm, rectifier.

    The widths are those of the public small configuration for CIFAR as we know it (unverified); the paper gives none.
    """

    SIMPLE = ((32, 32), (32, 48), 80, (112, 48), (96, 64), (80, 80), (48, 96), 96, (176, 160), (176, 160))

    def __init__(self, layers: Layers, in_channels: int, classes: int, scaled: Scaled, dropout: float) -> None:
        super().__init__()
        channels = scaled(96)
        blocks = [layers.conv_norm(in_channels, channels, 3, padding=1)]
        for entry in self.SIMPLE:
            if isinstance(entry, tuple):
                one, three = (scaled(c) for c in entry)
                branches = layers.conv_norm(channels, one, 1), layers.conv_norm(channels, three, 3, padding=1)
                channels = one + three
            else:
                down = scaled(entry)
                branches = layers.conv_norm(channels, down, 3, 2, 1), nn.MaxPool2d(3, 2, 1)
                channels += down
            blocks.append(Mixed(*branches))
        self.features = nn.Sequential(*blocks, nn.Dropout(dropout))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.features(images).mean((2, 3)))
        return scores


NETWORKS: dict[str, Callable[..., nn.Module]] = {"nin": NIN, "ndsb": NDSB, "inception": Inception}


def maps(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The convolutions and linear layers with their names, in the order of construction, as all variants have it."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def initialize(model: nn.Module, seed: int, init: str) -> None:
    """Weights from a generator of their own, so that all variants of a seed start from the same ones; biases 0.

    init: "he" for N(0, 2 / fan-in), or the standard deviation itself, "0.05" in the public configuration.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, m in maps(model):
        weight: Tensor = m.weight  # type: ignore[assignment]
        std = math.sqrt(2 / weight[0].numel()) if init == "he" else float(init)
        with torch.no_grad():
            weight.copy_(torch.empty(weight.shape).normal_(0, std, generator=generator))
            if m.bias is not None:
                m.bias.zero_()  # type: ignore[operator]
