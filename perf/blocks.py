"""Parts of networks in the ways in which networks write them: what stands before and behind a rectifier.

`BLOCKS[name](rectifier)` is a module for an input of `shape(name)`. Used by :mod:`.counting`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

C = 8  # channels of most blocks


def conv(inputs: int = C, outputs: int = C, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


class Written(nn.Module):
    """A block whose forward is ``forward(parts, rectifier, x)``."""

    def __init__(self, rectifier: nn.Module, forward: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.rectifier, self.parts, self.written = rectifier, nn.ModuleList(parts), forward

    def forward(self, x: Tensor) -> Any:
        return self.written(self.parts, self.rectifier, x)


@dataclass(frozen=True)
class Block:
    build: Callable[[nn.Module], nn.Module]
    shape: tuple[int, ...] = (2, C, 16, 16)
    chain: bool = False  # of maps and rectifiers alone: what the figures for chains are about
    memory_format: torch.memory_format = torch.preserve_format
    without: str = ""  # a rectifier that the soft device cannot run in it
    compile: dict[str, Any] = field(default_factory=dict)  # keywords of torch.compile


BLOCKS: dict[str, Block] = {}


def block(*parts: Callable[[], nn.Module], **about: Any) -> Callable[[Callable[..., Any]], None]:
    """Register a function ``(parts, rectifier, x)`` under its name, with the modules that it is written for."""

    def register(forward: Callable[..., Any]) -> None:
        key = forward.__name__.replace("_", " ")
        BLOCKS[key] = Block(lambda a: Written(a, forward, *(make() for make in parts)), **about)

    return register


def sequence(name: str, *layers: Callable[[], nn.Module] | None, **about: Any) -> None:
    """Register a Sequential; None stands for the rectifier."""
    BLOCKS[name] = Block(lambda a: nn.Sequential(*(a if make is None else make() for make in layers)), **about)


sequence("chain", conv, None, conv, None, conv, None, chain=True)
sequence("head", conv, None, conv)
sequence("tail", conv, conv, None)
sequence("chain without bias", *(lambda: conv(bias=False), None) * 3)
sequence("chain, channels last", conv, None, conv, None, conv, None, chain=True, memory_format=torch.channels_last)
sequence("chain, dynamic shapes", conv, None, conv, None, conv, None, chain=True, compile={"dynamic": True})
sequence("wide chain", *(lambda: conv(72, 72), None) * 2, shape=(1, 72, 8, 8))
sequence("chain, 1d", *(lambda: nn.Conv1d(C, C, 3, padding=1), None) * 3, shape=(2, C, 256), chain=True)
sequence("chain, 3d", *(lambda: nn.Conv3d(C, C, 3, padding=1), None) * 3, shape=(1, C, 8, 8, 8), chain=True)
sequence("perceptron", *(lambda: nn.Linear(64, 64), None) * 2, lambda: nn.Linear(64, 8), shape=(64, 64))
sequence("transposed", lambda: nn.ConvTranspose2d(C, C, 4, stride=2, padding=1), None, conv)
sequence("norm before", conv, lambda: nn.BatchNorm2d(C), None, conv)
sequence("norm behind", conv, None, lambda: nn.BatchNorm2d(C), conv)
sequence("preactivation", lambda: nn.BatchNorm2d(C), None, conv, lambda: nn.BatchNorm2d(C), None, conv)
sequence("max pooling", conv, None, lambda: nn.MaxPool2d(2), conv)
sequence("average pooling", conv, None, lambda: nn.AvgPool2d(2), conv)
sequence("classifier", conv, None, lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten, lambda: nn.Linear(C, 4))
sequence("depthwise separable", lambda: conv(groups=C), None, lambda: conv(size=1), None, lambda: conv(groups=C))
sequence("pixel shuffle", conv, None, lambda: nn.PixelShuffle(2), lambda: conv(C // 4))
sequence("nearest", conv, None, lambda: nn.Upsample(scale_factor=2), conv, None)
sequence("bilinear", conv, None, lambda: nn.Upsample(scale_factor=2, mode="bilinear"), conv, None)


@block(conv, conv, conv)
def residual(parts: Any, act: Any, x: Tensor) -> Tensor:
    return parts[2](x + act(parts[1](act(parts[0](x)))))  # type: ignore[no-any-return]


@block(conv, lambda: nn.BatchNorm2d(C), conv, lambda: nn.BatchNorm2d(C), conv)
def basic_block(parts: Any, act: Any, x: Tensor) -> Tensor:
    y = parts[3](parts[2](act(parts[1](parts[0](x)))))
    return parts[4](act(y + x))  # type: ignore[no-any-return]


@block(conv, lambda: conv(2 * C), lambda: conv(3 * C))
def dense(parts: Any, act: Any, x: Tensor) -> Tensor:
    y = act(parts[0](x))
    z = act(parts[1](torch.cat([x, y], 1)))
    return parts[2](torch.cat([x, y, z], 1)) * 0.2 + x  # type: ignore[no-any-return]


@block(conv, conv, lambda: nn.ConvTranspose2d(C, C, 2, stride=2), lambda: conv(2 * C), conv)
def skip_of_a_u_net(parts: Any, act: Any, x: Tensor) -> Tensor:
    y = act(parts[0](x))
    z = parts[2](act(parts[1](F.max_pool2d(y, 2))))
    return parts[4](act(parts[3](torch.cat([y, z], 1))))  # type: ignore[no-any-return]


@block(conv, conv, lambda: conv(C, 1, 1), conv)
def attention_gate(parts: Any, act: Any, x: Tensor) -> Tensor:
    gate = torch.sigmoid(parts[2](act(parts[0](x) + parts[1](x))))
    return parts[3](x * gate)  # type: ignore[no-any-return]


@block(conv, lambda: nn.Linear(C, 4), lambda: nn.Linear(4, C), conv)
def squeeze_and_excitation(parts: Any, act: Any, x: Tensor) -> Tensor:
    y = act(parts[0](x))
    scale = torch.sigmoid(parts[2](act(parts[1](y.mean((2, 3))))))
    return parts[3](y * scale[:, :, None, None])  # type: ignore[no-any-return]


@block(conv, conv, conv)
def two_readers(parts: Any, act: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = act(parts[0](x))
    return parts[1](y), parts[2](y)


@block(conv, conv, conv)
def shared_over_a_sum(parts: Any, act: Any, x: Tensor) -> Tensor:
    return parts[2](act(parts[0](x)) + act(parts[1](x)))  # type: ignore[no-any-return]


@block(conv, conv, without="rrelu")  # there are no generators whose state a checkpoint could keep
def checkpointed(parts: Any, act: Any, x: Tensor) -> Any:
    return parts[1](checkpoint(lambda t: act(parts[0](t)), x, use_reentrant=False))


@block(conv, conv, conv)
def frozen_trunk(parts: Any, act: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = act(parts[0](x))
    return parts[2](act(parts[1](x)))  # type: ignore[no-any-return]


@block(conv, conv)
def loss_behind(parts: Any, act: Any, x: Tensor) -> Tensor:
    return act(parts[1](act(parts[0](x)))).square().mean()  # type: ignore[no-any-return]
