"""Loaders on small files in the data sets' own formats and on the real ones here."""

import dataclasses
import gzip
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest

from fused_rect.study import data, formats
from fused_rect.study.formats import DataError

pytest.importorskip("PIL")

# ---- CIFAR in all its forms ----


def made(spec, seed=0):
    """Small files of ``spec``: {folder/name: bytes}, what they hold, and the spec with their sizes and checksums."""
    rng = np.random.default_rng(seed)
    spec = dataclasses.replace(spec, records=3, test_records=2)
    files, pixels, labels = {}, [], []
    for name in (*spec.train, *spec.test):
        n = 2 if name in spec.test else 3
        x, y = rng.integers(0, 256, (n, 3072), np.uint8), rng.integers(0, spec.classes, n, np.uint8)
        coarse = rng.integers(0, 20, (n, spec.label_bytes - 1), np.uint8)
        files[f"{spec.binary_folder}/{name}.bin"] = np.concatenate([coarse, y[:, None], x], 1).tobytes()
        batch = {b"data": x, spec.label_key: y.tolist(), b"batch_label": b"some text"}
        files[f"{spec.python_folder}/{name}"] = pickle.dumps(batch, 2)
        pixels.append(x)
        labels.append(y)
    md5 = {n: hashlib.md5(files[f"{spec.python_folder}/{n}"]).hexdigest() for n in (*spec.train, *spec.test)}
    spec = dataclasses.replace(spec, python_md5=md5)
    train = np.concatenate(pixels[:-1]).reshape(-1, 3, 32, 32), np.concatenate(labels[:-1])
    return spec, files, train, (pixels[-1].reshape(-1, 3, 32, 32), labels[-1])


def put(root, spec, files, form):
    """Write one form of the data set under ``root``; returns the spec, with the archive's checksum where it is one."""
    folder = spec.binary_folder if "binary" in form else spec.python_folder
    mine = {name: text for name, text in files.items() if name.startswith(f"{folder}/")}
    if "folder" in form:
        (root / folder).mkdir()
        for name, text in mine.items():
            (root / name).write_bytes(text)
        return spec
    field = "binary_tar" if "binary" in form else "python_tar"
    path = root / getattr(spec, field)[0]
    with tarfile.open(path, "w:gz") as tar:
        for name, text in mine.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return dataclasses.replace(spec, **{field: (path.name, hashlib.md5(path.read_bytes()).hexdigest())})


FORMS = ("binary folder", "python folder", "binary archive", "python archive")


@pytest.mark.parametrize("spec", [formats.CIFAR10, formats.CIFAR100], ids=lambda s: s.name)
@pytest.mark.parametrize("form", FORMS)
def test_cifar(spec, form, tmp_path):
    spec, files, expected_train, expected_test = made(spec)
    spec = put(tmp_path, spec, files, form)
    train, test, _ = formats.cifar(tmp_path, spec)
    for found, expected in ((train, expected_train), (test, expected_test)):
        assert found[0].dtype == np.uint8 and found[1].dtype == np.int64
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("form", FORMS)
def test_damaged_cifar_is_named(form, tmp_path):
    spec, files, *_ = made(formats.CIFAR10)
    put_spec = put(tmp_path, spec, files, form)
    victim = next(p for p in sorted(tmp_path.rglob("*")) if p.is_file())
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(DataError, match=victim.name.split(".")[0]):
        formats.cifar(tmp_path, put_spec)


def test_missing_cifar_says_where_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz.*--root"):
        data.load("cifar-10", tmp_path)
    with pytest.raises(DataError, match="--root"):
        data.load("cifar-100")


def test_missing_member_is_named(tmp_path):
    spec, files, *_ = made(formats.CIFAR10)
    del files["cifar-10-batches-bin/data_batch_3.bin"]
    for form in ("binary folder", "binary archive"):
        spec = put(tmp_path, spec, files, form)
    with pytest.raises(DataError, match="data_batch_3"):
        formats.cifar(tmp_path, spec)


def test_cifar_label_out_of_range(tmp_path):
    spec, files, *_ = made(formats.CIFAR10)
    name = "cifar-10-batches-bin/data_batch_1.bin"
    files[name] = b"\x0a" + files[name][1:]
    put(tmp_path, spec, files, "binary folder")
    with pytest.raises(DataError, match="label outside"):
        formats.cifar(tmp_path, spec)


def test_published_sizes():
    assert (formats.CIFAR10.records * (1 + 3072), formats.CIFAR100.records * (2 + 3072)) == (30_730_000, 153_700_000)


# ---- IDX ----


def idx_files(folder, gz=True):
    rng = np.random.default_rng(0)
    digests, values = {}, []
    for name in data.FASHION_MNIST_SHA256:
        n = 5 if "train" in name else 4
        shape = (n, 28, 28) if "images" in name else (n,)
        array = rng.integers(0, 10, shape, np.uint8)
        text = bytes((0, 0, 8, len(shape))) + np.array(shape, ">u4").tobytes() + array.tobytes()
        (folder / (f"{name}.gz" if gz else name)).write_bytes(gzip.compress(text) if gz else text)
        digests[name] = hashlib.sha256(text).hexdigest()
        values.append(array)
    return digests, values


@pytest.mark.parametrize("gz", [True, False])
def test_idx(gz, tmp_path):
    digests, (train, train_labels, test, test_labels) = idx_files(tmp_path, gz)
    found = data.fashion_mnist(tmp_path, digests)
    np.testing.assert_array_equal(found.train_images[:, 0], train)
    np.testing.assert_array_equal(found.train_labels, train_labels)
    np.testing.assert_array_equal(found.test_images[:, 0], test)
    np.testing.assert_array_equal(found.test_labels, test_labels)


def test_damaged_idx_is_named(tmp_path):
    digests, _ = idx_files(tmp_path)
    with pytest.raises(DataError, match=r"train-images.*sha256"):
        data.fashion_mnist(tmp_path, {**digests, "train-images-idx3-ubyte": "0" * 64})
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="t10k-images"):
        data.fashion_mnist(tmp_path, digests)
    path.unlink()
    with pytest.raises(DataError, match=r"t10k-images.*apt-get install dataset-fashion-mnist"):
        data.fashion_mnist(tmp_path, digests)


@pytest.mark.parametrize("text", [b"", b"\x00\x00\x08\x01\x00\x00\x00\x05ab", b"\x00\x00\x09\x01\x00\x00\x00\x01a"])
def test_not_idx(text, tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(text)
    with pytest.raises(DataError, match="labels"):
        formats.idx(path, 1, None)


@pytest.mark.skipif(not data.FASHION_MNIST.is_dir(), reason="apt-get install dataset-fashion-mnist")
def test_real_fashion_mnist():
    found = data.load("fashion-mnist")
    assert found.train_images.shape == (60_000, 1, 28, 28) and found.test_images.shape == (10_000, 1, 28, 28)
    assert (
        np.bincount(found.train_labels).tolist() == [6000] * 10
        and np.bincount(found.test_labels).tolist() == [1000] * 10
    )


# ---- folders, digits, resizing ----


def test_ndsb(tmp_path):
    from PIL import Image

    for name, level in (("copepod", 40), ("acantharia", 200)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (20 + i, 31), level + i).save(tmp_path / "train" / name / f"{i}.jpg")
    found = data.ndsb(tmp_path, side=16, train=4)
    assert found.classes == 2 and found.train_images.shape == (4, 1, 16, 16) and len(found.test_labels) == 2
    images = np.concatenate([found.train_images, found.test_images])
    labels = np.concatenate([found.train_labels, found.test_labels])
    for image, label in zip(images, labels):  # classes by their sorted names: acantharia is 0
        assert abs(image.mean() - (41 if label else 201)) < 3
    (tmp_path / "train" / "copepod" / "1.jpg").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"1\.jpg"):
        data.ndsb(tmp_path, side=16, train=4)
    (tmp_path / "train" / "copepod" / "1.jpg").unlink()
    with pytest.raises(DataError, match="5 images, not more than the 25000"):
        data.ndsb(tmp_path, side=16)


def test_digits_and_their_fingerprint():
    found = data.load("digits")
    assert (len(found.train_labels), len(found.test_labels), found.classes) == (1297, 500, 10)
    assert found.train_images.max() == 255
    other = dataclasses.replace(found, test_labels=found.test_labels[::-1])
    assert found.fingerprint() == data.load("digits").fingerprint() != other.fingerprint()


def test_auto_falls_back_to_the_digits(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "FASHION_MNIST", tmp_path / "nowhere")
    assert data.load("auto").name == "digits"


def test_resized_averages_blocks():
    images = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    np.testing.assert_array_equal(data.resized(images, 2)[0, 0], [[2, 4], [10, 12]])  # 2.5, 4.5, .. round to even
    assert data.resized(images, 0) is images
    with pytest.raises(ValueError, match="divide 4"):
        data.resized(images, 3)


def test_unknown_data():
    with pytest.raises(ValueError, match="mnist-1d"):
        data.load("mnist-1d")
