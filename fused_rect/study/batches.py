"""A seed's training subset, its batches and its augmentation: the same for all variants, on any number of processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import data as datasets
from . import formats
from .distributed import key
from .protocol import Protocol

# What a seed is drawn for; part of the key, so that no two draws share a stream.
WEIGHTS, SUBSET, ORDER, STEP, EVALUATION, AUGMENTATION = range(6)
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """uint8 images and labels on the device, and what makes network inputs of them."""

    images: Tensor
    labels: Tensor
    offset: Tensor
    scale: Tensor
    crop: int  # side of the crop, 0 for none
    memory_format: torch.memory_format

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, index: Tensor, placement: Tensor | None = None) -> Tensor:
        """float32 inputs of the images ``index``; ``placement`` (n, 3) holds row, column and mirroring of each crop."""
        batch = self.images[index]
        if self.crop:
            batch = _cropped(batch, self.crop, placement)
        return ((batch.float() - self.offset) / self.scale).contiguous(memory_format=self.memory_format)


def _cropped(batch: Tensor, side: int, placement: Tensor | None) -> Tensor:
    if placement is None:  # the middle
        top = (batch.shape[-1] - side) // 2
        return batch[:, :, top : top + side, top : top + side]
    steps = torch.arange(side, device=batch.device)
    rows = placement[:, :1] + steps
    columns = placement[:, 1:2] + torch.where(placement[:, 2:] > 0, side - 1 - steps, steps)
    n = torch.arange(len(batch), device=batch.device)
    return batch.permute(0, 2, 3, 1)[n[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def prepare(dataset: datasets.Dataset, protocol: Protocol, seed: int, device: torch.device) -> tuple[Images, Images]:
    """The training subset of ``seed`` and the images to report on, both with the subset's own mean and deviation."""
    train, held_out = subset(len(dataset.train_labels), protocol, seed)
    images = datasets.resized(dataset.train_images[train], protocol.image)
    if protocol.split == "validation":
        report = dataset.train_images[held_out], dataset.train_labels[held_out]
    else:
        report = dataset.test_images, dataset.test_labels
    offset, scale = _normalization(images, protocol.preprocess)
    crop = images.shape[-1] * 7 // 8 if protocol.augment == "crop-mirror" else 0
    layout = torch.channels_last if protocol.channels_last else torch.contiguous_format

    def on_device(images: formats.Images, labels: formats.Labels) -> Images:
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        return Images(pixels, torch.from_numpy(labels).to(device), offset.to(device), scale.to(device), crop, layout)

    return on_device(images, dataset.train_labels[train]), on_device(
        datasets.resized(report[0], protocol.image), report[1]
    )


def check(dataset: datasets.Dataset, protocol: Protocol) -> None:
    """Raises the ValueError that :func:`prepare` would."""
    subset(len(dataset.train_labels), protocol, 0)
    datasets.resized(dataset.train_images[:1], protocol.image)


def subset(count: int, protocol: Protocol, seed: int) -> tuple[Indices, Indices]:
    """(training subset of ``seed``, held-out images): the held-out ones are the same for all seeds.

    Raises ValueError where there are not enough images.
    """
    wanted = protocol.train_images + protocol.validation_images
    if wanted > count or protocol.validation_images >= count:
        raise ValueError(f"train_images + validation_images must be at most {count}, got {wanted}")
    everything = np.random.default_rng(0).permutation(count)
    held_out, rest = everything[: protocol.validation_images], everything[protocol.validation_images :]
    if protocol.train_images:
        rest = np.random.default_rng(key(seed, SUBSET)).choice(rest, protocol.train_images, replace=False)
    return np.sort(rest), np.sort(held_out)


def _normalization(images: formats.Images, preprocess: str) -> tuple[Tensor, Tensor]:
    shape = (1, images.shape[1], 1, 1)
    if preprocess == "raw":
        return torch.zeros(shape), torch.ones(shape)
    mean = images.mean((0, 2, 3), dtype=np.float64)
    scale = np.full_like(mean, 255) if preprocess == "mean" else images.std((0, 2, 3), dtype=np.float64)
    offset, divisor = (torch.from_numpy(values).float().view(shape) for values in (mean, np.maximum(scale, 1e-6)))
    return offset, divisor


@dataclass(frozen=True)
class Epoch:
    """One pass: the order of the subset, and where each image is cropped."""

    order: Tensor
    placement: Tensor | None


def epoch(images: Images, seed: int, number: int, device: torch.device) -> Epoch:
    order = np.random.default_rng(key(seed, ORDER, number)).permutation(len(images))
    placement = None
    if images.crop:
        rng = np.random.default_rng(key(seed, AUGMENTATION, number))
        room = images.images.shape[-1] - images.crop + 1
        drawn = np.stack([rng.integers(0, high, len(images)) for high in (room, room, 2)], 1)
        placement = torch.from_numpy(drawn).to(device)
    return Epoch(torch.from_numpy(order).to(device), placement)
