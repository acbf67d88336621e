"""Small networks in the style of those that people train, for timing: each in torch's own modules."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


class _Dense(nn.Module):
    """The residual dense block of ESRGAN (arXiv 1809.00219): five convolutions, each of all that came before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        growth = width // 2
        self.layers = nn.ModuleList(_conv(width + i * growth, growth) for i in range(4))
        self.last, self.act = _conv(width + 4 * growth, width), nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(self.act(layer(torch.cat(features, 1))))
        return self.last(torch.cat(features, 1)) * 0.2 + x  # type: ignore[no-any-return]


def rrdbnet(width: int = 64, blocks: int = 3) -> nn.Module:
    """ESRGAN's generator, ``blocks`` dense blocks long, at four times the size."""
    up = [m for _ in range(2) for m in (nn.Upsample(scale_factor=2), _conv(width, width), nn.LeakyReLU(0.2))]
    body = [_Dense(width) for _ in range(blocks)]
    return nn.Sequential(_conv(3, width), *body, *up, _conv(width, width), nn.LeakyReLU(0.2), _conv(width, 3))


def compact(width: int = 64, layers: int = 16) -> nn.Module:
    """SRVGGNetCompact of Real-ESRGAN (arXiv 2107.10833): convolutions and PReLUs with a slope a channel."""
    body = [m for _ in range(layers) for m in (_conv(width, width), nn.PReLU(width))]
    return nn.Sequential(_conv(3, width), nn.PReLU(width), *body, _conv(width, 48), nn.PixelShuffle(4))


class _Residual(nn.Module):
    """x + body(x), rectified behind the sum where ``behind`` says so."""

    def __init__(self, body: nn.Module, behind: bool = False) -> None:
        super().__init__()
        self.body, self.act = body, nn.ReLU(inplace=True) if behind else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.body(x))  # type: ignore[no-any-return]


def hifigan(width: int = 256) -> nn.Module:
    """The generator of HiFi-GAN (arXiv 2010.05646) with two of its upsamplings: (N, 80, frames) to waves."""

    def block(channels: int, size: int, dilation: int) -> nn.Module:
        padding = dilation * (size - 1) // 2
        first = nn.Conv1d(channels, channels, size, padding=padding, dilation=dilation)
        second = nn.Conv1d(channels, channels, size, padding=size // 2)
        return _Residual(nn.Sequential(nn.LeakyReLU(0.1), first, nn.LeakyReLU(0.1), second))

    layers: list[nn.Module] = [nn.Conv1d(80, width, 7, padding=3)]
    for _ in range(2):
        layers += [nn.LeakyReLU(0.1), nn.ConvTranspose1d(width, width // 2, 16, 8, padding=4)]
        width //= 2
        layers += [block(width, size, dilation) for size in (3, 7) for dilation in (1, 3)]
    return nn.Sequential(*layers, nn.LeakyReLU(), nn.Conv1d(width, 1, 7, padding=3), nn.Tanh())


def resnet(width: int = 64, blocks: int = 4) -> nn.Module:
    """A residual network (arXiv 1512.03385) of basic blocks; batch norms stand between, so rectifiers are torch's."""
    norm = partial(nn.BatchNorm2d, width)

    def block() -> nn.Module:
        body = _conv(width, width), norm(), nn.ReLU(inplace=True), _conv(width, width), norm()
        return _Residual(nn.Sequential(*body), behind=True)

    stem = nn.Conv2d(3, width, 7, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)
    return nn.Sequential(*stem, *(block() for _ in range(blocks)), *end)


small_compact = partial(compact, 8, 1)  # for a device made of CPU memory
