"""Readers of the data sets' file formats: IDX, CIFAR in binary records and in python archives, folders of images.

Each returns uint8 images (N, C, H, W) and int64 labels (N,). A missing or damaged file raises :class:`DataError`, which
names it; the checksums are the publishers' (CIFAR, MD5) or those of the decompressed files (Fashion-MNIST, SHA-256).
How long a file can be is known before, and no more of it is read or decompressed: a few MB of gzip can hold gigabytes
of zeros, and a sparse file takes no room on its disk.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Split = tuple[Images, Labels]


class DataError(Exception):
    """A data set's file is missing, damaged, or not what its name says."""


def check_digest(what: str, data: bytes, algorithm: str, expected: str) -> None:
    found = hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(f"{what} is damaged: its {algorithm} is {found}, not {expected}; fetch it again")


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def read_at_most(file: Readable, limit: int, what: str) -> bytes:
    data = file.read(limit + 1)
    if len(data) > limit:
        raise DataError(f"{what} is longer than the {limit:,} bytes that it can have; fetch it again")
    return data


# ---- IDX, the format of MNIST and Fashion-MNIST ----

IDX_LONGEST = 16 + 60_000 * 28 * 28


def idx(path: Path, dimensions: int, sha256: str | None) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes, at most IDX_LONGEST of them, gzip-compressed where its name ends in .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = read_at_most(file, IDX_LONGEST, str(path))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if sha256 is not None:
        check_digest(f"{path} (decompressed)", data, "sha256", sha256)
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path} is not an IDX file of unsigned bytes in {dimensions} dimensions")
    shape = np.frombuffer(data, ">u4", dimensions, 4).astype(int)
    if len(data) - header != int(np.prod(shape)):
        raise DataError(f"{path} holds {len(data) - header} values, its header says {' x '.join(map(str, shape))}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


# ---- CIFAR ----


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets in its two forms; the files' names are the same in folder and archive."""

    name: str
    classes: int
    label_bytes: int  # CIFAR-100 has a coarse label before the fine one
    label_key: bytes
    train: tuple[str, ...]
    test: tuple[str, ...]
    python_folder: str
    binary_folder: str
    python_tar: tuple[str, str]  # name, MD5
    binary_tar: tuple[str, str]
    python_md5: Mapping[str, str]
    records: int  # in a file of the training set
    test_records: int = 10_000
    longest_tar: int = 180_000_000  # the four archives have 168.5 to 170.5 million bytes

    def longest(self, train: bool) -> int:
        """Bytes of a file in either form: a pickled record has 3,106, and twice that where bytes are kept as UTF-8."""
        return (self.records if train else self.test_records) * 6400 + 4096


CIFAR10 = Cifar(
    "cifar-10", 10, 1, b"labels",
    tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), "cifar-10-batches-py", "cifar-10-batches-bin",
    ("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    ("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    records=10_000,
)  # fmt: skip
CIFAR100 = Cifar(
    "cifar-100", 100, 2, b"fine_labels", ("train",), ("test",), "cifar-100-python", "cifar-100-binary",
    ("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    ("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
    {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    records=50_000,
)  # fmt: skip


def cifar(root: Path, spec: Cifar) -> tuple[Split, Split, Path]:
    """Training and test set from the first form found under ``root``: extracted folder or archive, binary or python."""
    python, binary = _python_records, _binary_records
    forms: list[tuple[Path, Callable[..., Any]]] = [
        (root / spec.binary_folder, binary),
        (root / spec.python_folder, python),
        (root / spec.binary_tar[0], binary),
        (root / spec.python_tar[0], python),
    ]
    for path, decode in forms:
        if path.exists():
            read = _folder_reader(path) if path.is_dir() else _tar_reader(path, spec, decode is binary)
            return _split(read, decode, spec, train=True), _split(read, decode, spec, train=False), path
    raise DataError(
        f"no {spec.name} under {root}: expected one of {', '.join(path.name for path, _ in forms)}. Get "
        f"{spec.binary_tar[0]} or {spec.python_tar[0]} from the data set's page (Krizhevsky, University of Toronto) "
        "and name its folder with --root; nothing is downloaded here"
    )


Reader = Callable[[str, int], bytes]


def _folder_reader(folder: Path) -> Reader:
    def read(name: str, longest: int) -> bytes:
        try:
            with (folder / name).open("rb") as file:
                return read_at_most(file, longest, str(folder / name))
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read: {error}; unpack the archive again") from error

    return read


def _tar_reader(path: Path, spec: Cifar, binary: bool) -> Reader:
    """Members straight from the archive: nothing is unpacked, so no member's name can name a place on the disk."""
    try:
        with path.open("rb") as file:
            data = read_at_most(file, spec.longest_tar, str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    check_digest(str(path), data, "md5", (spec.binary_tar if binary else spec.python_tar)[1])
    folder = spec.binary_folder if binary else spec.python_folder

    def read(name: str, longest: int) -> bytes:
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                member = tar.extractfile(f"{folder}/{name}")
                assert member is not None
                return read_at_most(member, longest, f"{folder}/{name} in {path}")
        except (OSError, KeyError, AssertionError, tarfile.TarError, EOFError, zlib.error) as error:
            raise DataError(f"{path} holds no readable {folder}/{name}: {error}") from error

    return read


def _split(read: Reader, decode: Callable[..., Any], spec: Cifar, train: bool) -> Split:
    parts = [decode(read, name, spec, train) for name in (spec.train if train else spec.test)]
    labels = np.concatenate([p[1] for p in parts]).astype(np.int64)
    if labels.min() < 0 or labels.max() >= spec.classes:
        raise DataError(f"{spec.name} is damaged: a label outside 0 .. {spec.classes - 1}")
    return np.concatenate([p[0] for p in parts]).reshape(-1, 3, 32, 32), labels


def _binary_records(read: Reader, name: str, spec: Cifar, train: bool) -> tuple[Images, Any]:
    data = np.frombuffer(read(f"{name}.bin", spec.longest(train)), np.uint8)
    count, size = (spec.records if train else spec.test_records), spec.label_bytes + 3072
    if data.size != count * size:
        raise DataError(f"{name}.bin of {spec.name} has {data.size} bytes, not {count} records of {size}")
    records = data.reshape(count, size)
    return records[:, spec.label_bytes :], records[:, spec.label_bytes - 1]


class _Arrays(pickle.Unpickler):
    """Arrays and plain values. What only other files than the publishers' hold, their MD5 keeps away: containers in
    themselves, memos and text of any size, arrays of objects."""

    NAMES = (
        *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
        *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which only arrays and plain values never need")
        return super().find_class(module, name)


def _python_records(read: Reader, name: str, spec: Cifar, train: bool) -> tuple[Images, Any]:
    data = read(name, spec.longest(train))
    check_digest(f"{name} of {spec.name}", data, "md5", spec.python_md5[name])
    try:
        with warnings.catch_warnings():  # numpy's, of the flags that the publishers' numpy wrote
            warnings.simplefilter("ignore")
            batch = _Arrays(io.BytesIO(data), encoding="bytes").load()
        return batch[b"data"], batch[spec.label_key]
    except Exception as error:
        raise DataError(f"{name} of {spec.name} is not one of its python archives: {error}") from error


# ---- folders of images, one a class (NDSB) ----

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
IMAGE_FORMATS = ("JPEG", "PNG")  # whatever the suffix: Pillow knows forty others, and starts Ghostscript for one
MOST_PIXELS = 1 << 24  # the plankton images have at most a few hundred a side


def class_folders(folder: Path, side: int) -> tuple[Images, Labels, list[str]]:
    """Grey images of ``folder``/<class>/*.jpg, each scaled to ``side`` squared; labels by the classes' sorted names."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: unpack the competition's train.zip there, or name its parent with --root")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).iterdir())
             if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]  # fmt: skip
    if not files:
        raise DataError(f"{folder} holds no <class>/*.jpg")
    images = np.empty((len(files), 1, side, side), np.uint8)
    for i, (path, _) in enumerate(files):
        images[i, 0] = _grey(path, side)
    return images, np.array([label for _, label in files], np.int64), classes


def _grey(path: Path, side: int) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}")
            return np.asarray(image.convert("L").resize((side, side), Image.Resampling.BILINEAR))
    except Exception as error:  # Pillow's decoders fail in many ways on files that are not theirs
        raise DataError(f"{path} is not a readable JPEG or PNG image: {error}") from error
