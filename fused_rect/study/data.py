"""The data sets by name, found on this machine; nothing is downloaded.

cifar-10, cifar-100   binary or python form, folder or archive, under --root
ndsb                  train/<class>/*.jpg under --root; split 25,000 / the rest, as the paper's sizes are
fashion-mnist         where Debian's package `dataset-fashion-mnist` puts it, or under --root
digits                scikit-learn's 1,797 images of 8 x 8, always there
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import formats
from .formats import DataError, Images, Labels

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
NDSB_TRAIN = 25_000


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, C, H, W), labels int64 (N,), and the number of classes."""

    name: str
    source: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: int

    def fingerprint(self) -> str:
        """SHA-256 over all arrays: two runs with the same one saw the same data."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load(name: str = "auto", root: Path | None = None) -> Dataset:
    """The data set ``name``; "auto" is Fashion-MNIST where it is installed, else the digits.

    Raises ValueError for an unknown name and :class:`DataError` for a missing or damaged file.
    """
    if name == "auto":
        name = "fashion-mnist" if (root or FASHION_MNIST).is_dir() else "digits"
    if name not in DATASETS:
        raise ValueError(f"data must be auto or one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](root)


def cifar(spec: formats.Cifar, root: Path | None) -> Dataset:
    train, test, path = formats.cifar(_required(spec.name, root), spec)
    return Dataset(spec.name, path.name, *train, *test, spec.classes)


def _required(name: str, root: Path | None) -> Path:
    if root is None:
        raise DataError(f"{name} is not installed by any package: name the folder that holds it with --root")
    return root


def fashion_mnist(root: Path | None = None, sha256: dict[str, str] | None = None) -> Dataset:
    folder = FASHION_MNIST if root is None else root
    expected = FASHION_MNIST_SHA256 if sha256 is None else sha256
    arrays = []
    for name, digest in expected.items():
        found = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
        if found is None:
            raise DataError(
                f"no {folder / name}.gz: `apt-get install dataset-fashion-mnist` (Debian) puts it at {FASHION_MNIST}; "
                "for another place use --root; --data digits needs nothing"
            )
        arrays.append(formats.idx(found, 3 if "images" in name else 1, digest))
    train, train_labels, test, test_labels = arrays
    for images, labels in ((train, train_labels), (test, test_labels)):
        if len(images) != len(labels) or labels.max() > 9:
            raise DataError(f"the images and labels in {folder} do not belong together")
    return Dataset(
        "fashion-mnist", str(folder), train[:, None], train_labels.astype(np.int64),
        test[:, None], test_labels.astype(np.int64), 10,
    )  # fmt: skip


def ndsb(root: Path | None = None, side: int = 70, train: int = NDSB_TRAIN) -> Dataset:
    """The labelled plankton images, each scaled to ``side`` x ``side`` (unverified), shuffled once by a fixed seed.

    The paper's own split of 25,000 / 5,336 images is not known, nor are the labels of the competition's test set.
    """
    folder = _required("ndsb", root)
    folder = folder / "train" if (folder / "train").is_dir() else folder
    images, labels, classes = formats.class_folders(folder, side)
    if len(labels) <= train:
        raise DataError(f"{folder} holds {len(labels)} images, not more than the {train} of the training split")
    order = np.random.default_rng(0).permutation(len(labels))
    a, b = order[:train], order[train:]
    return Dataset("ndsb", str(folder), images[a], labels[a], images[b], labels[b], len(classes))


def digits(root: Path | None = None) -> Dataset:
    """scikit-learn's digits: 1,297 for training, 500 for testing, drawn once by a fixed seed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    a, b = order[:-500], order[-500:]
    return Dataset("digits", "scikit-learn", images[a], labels[a], images[b], labels[b], 10)


DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "cifar-10": functools.partial(cifar, formats.CIFAR10),
    "cifar-100": functools.partial(cifar, formats.CIFAR100),
    "ndsb": ndsb,
    "fashion-mnist": fashion_mnist,
    "digits": digits,
}


def resized(images: Images, side: int) -> Images:
    """Square images at ``side`` x ``side`` by averaging whole blocks; 0 leaves them.

    Raises ValueError where blocks do not fit.
    """
    height = images.shape[-1]
    if side in (0, height):
        return images
    if side > height or height % side:
        raise ValueError(f"image must divide {height}, the images' side, got {side}; 0 leaves them as they are")
    block = height // side
    n, c = images.shape[:2]
    blocks = images.reshape(n, c, side, block, side, block)
    small: Images = np.round(blocks.mean((3, 5), dtype=np.float32)).astype(np.uint8)
    return small
