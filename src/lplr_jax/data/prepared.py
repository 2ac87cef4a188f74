"""Images through tensorflow-datasets: a prepared directory without TensorFlow, a download where that is possible."""

from __future__ import annotations

import functools
import hashlib
import http.client
import importlib.metadata
import importlib.util
import json
import logging
import math
import re
import struct
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lplr_jax import archives
from lplr_jax.data.problem import (
    AbsentError,
    DataError,
    Pool,
    Problem,
    UnusableError,
    checked_labels,
    damaged,
    reading,
)

log = logging.getLogger("lplr_jax.data")

PROBE_SECONDS = 3.0

_FEATURES_BYTES = 2**16
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type", "proto_cls")
_FEATURE_CLASS = r"tensorflow_datasets(\.\w+)+"
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

# MD5 of the uncompressed train-labels-idx1-ubyte, as published with the data.
_MNIST_LABELS_MD5 = "a25bea736e30d166cdddb491f175f624"


def open_prepared(problem: Problem, path: Path) -> Pool:
    """Read a prepared array_record directory: the root, the data set's folder in it, or one version in that."""
    name = problem.name
    near = [*path.glob(f"{name}/*"), *(path.glob("*") if path.name == name else ())]
    near += [path] if path.parent.name == name else []
    versions = [folder for folder in near if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)]
    ready = [folder for folder in versions if any(folder.glob(f"{name}-train.array_record*"))]
    if not ready and versions:
        raise UnusableError(f"array_record files, the format read without TensorFlow, in {versions[0]}")
    if not ready:
        raise AbsentError(f"{name}/<version>/{name}-train.array_record* in {path}")
    folder = max(ready, key=lambda folder: [int(part) for part in folder.name.split(".")])
    _check_folder(folder)
    with _tensorflow_datasets(folder) as tfds:
        read = functools.partial(
            tfds.data_source, f"{name}:{folder.name}", split="train", data_dir=folder.parent.parent, download=False
        )
        packed, decoded = read(decoders={"image": tfds.decode.SkipDecoding()}), read()
        if not 0 < len(packed) <= problem.largest:
            raise damaged(folder, f"1 to {problem.largest:,} images", f"{len(packed):,}")
        rows = packed.__getitems__(range(len(packed)))
        labels = checked_labels(np.array([row["label"] for row in rows]), folder)
    source = f"tensorflow-datasets {importlib.metadata.version('tensorflow-datasets')} ({name} {folder.name})"
    order = _original_order([row.get("id", b"") for row in rows], labels)
    if order is None:
        order = np.arange(len(rows))
        source = f"{source[:-1]}, shuffled)"
        log.warning("%s: %s is stored shuffled, and its original order cannot be told", problem.title, folder)

    def images(wanted: np.ndarray) -> np.ndarray:
        with _tensorflow_datasets(folder):
            rows_wanted = order[wanted].tolist()
            # A PNG says its size ahead of its pixels, so that none is unpacked into more than is wanted.
            heads = {bytes(rows[row]["image"][:24]) for row in rows_wanted}
            if wrong := heads - {_PNG + struct.pack(">II", *problem.shape[1::-1])}:
                raise damaged(folder, f"PNG images of {problem.shape[:2]} pixels", repr(wrong.pop()))
            pixels = np.stack([row["image"] for row in decoded.__getitems__(rows_wanted)])
            if pixels.dtype != np.uint8 or pixels[0].size != math.prod(problem.shape):
                raise damaged(folder, f"uint8 images of shape {problem.shape}", f"{pixels.dtype} {pixels.shape[1:]}")
        return pixels.reshape(-1, *problem.shape)

    return Pool(labels[order], images, source, str(folder), tuple(sorted(folder.iterdir())))


def _check_folder(folder: Path) -> None:
    """Refuse what the library would wait for or run: pipes among the files, and features of other packages.

    It imports the module of every feature class that features.json names, whatever that module is.
    """
    for file in folder.iterdir():
        if not file.is_file():
            raise damaged(folder, "ordinary files", f"{file.name}, which is none")
    path = folder / "features.json"
    with reading(path, "the features as JSON"):
        todo = [json.loads(archives.read_text(path, most_bytes=_FEATURES_BYTES))]
    while todo:
        content = todo.pop()
        if isinstance(content, dict):
            for key, name in content.items():
                if key in _CLASS_KEYS and not (isinstance(name, str) and re.fullmatch(_FEATURE_CLASS, name)):
                    raise damaged(path, "features of tensorflow_datasets alone", repr(name))
            todo.extend(content.values())
        elif isinstance(content, list):
            todo.extend(content)


def _original_order(ids: list[bytes], labels: np.ndarray) -> np.ndarray | None:
    """The stored rows in the order of the original files, or None where that cannot be established.

    CIFAR-10 carries ids "train_00000" and up. MNIST has none, but tensorflow-datasets sorts its records by the MD5 of
    split name and index; the order this gives is believed only if it makes the labels those of the original file.
    """
    index = [re.fullmatch(rb"train_(\d{1,9})", id_) for id_ in ids]
    if all(index):
        return np.argsort([int(match[1]) for match in index if match], kind="stable")
    digests = [hashlib.md5(b"train%d" % i, usedforsecurity=False).digest() for i in range(len(labels))]
    order = np.argsort(sorted(range(len(labels)), key=digests.__getitem__))
    file = struct.pack(">II", 0x801, len(labels)) + labels[order].astype(np.uint8).tobytes()
    return order if hashlib.md5(file, usedforsecurity=False).hexdigest() == _MNIST_LABELS_MD5 else None


def download(problem: Problem, path: Path) -> Pool:
    """Let tensorflow-datasets download and prepare; unaided it takes minutes to find out that there is no network."""
    if importlib.util.find_spec("tensorflow") is None:
        raise AbsentError("TensorFlow, which a download needs (it is not installed)")
    if not host_answers(problem.url):
        raise UnusableError(f"an answer from {problem.url} (none within {PROBE_SECONDS:g} s)")
    log.info("%s: tensorflow-datasets downloads it to %s", problem.title, path)
    with _tensorflow_datasets(path, f"tensorflow-datasets to download {problem.title}") as tfds:
        tfds.data_source(
            problem.name, split="train", data_dir=path, download=True, builder_kwargs={"file_format": "array_record"}
        )
    return open_prepared(problem, path)


def host_answers(url: str) -> bool:
    """Whether the host gives any HTTP answer in time; in a thread, as name look-up knows no timeout."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS):
                answered.set()
        except urllib.error.HTTPError as refusal:
            refusal.close()
            answered.set()
        except (OSError, ValueError, http.client.HTTPException):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


@contextmanager
def _tensorflow_datasets(place: Path, what: str = "what tensorflow-datasets can read") -> Iterator[Any]:
    """The module, with its warnings and absl's chatter held back; whatever it raises becomes a DataError."""
    absl = logging.getLogger("absl")
    before = absl.disabled
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            absl.disabled = True
            import tensorflow_datasets

            yield tensorflow_datasets
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{place}: needs tensorflow-datasets ({error}): pip install 'lplr-jax[tfds]'") from error
    except Exception as error:  # its readers raise whatever their C++ side does
        raise damaged(place, what, f"{type(error).__name__}: {error}") from error
    finally:
        absl.disabled = before
