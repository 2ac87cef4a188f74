"""Records come back as they went, and what is no record is refused by name."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make
from lplr_jax import files, records, schema
from lplr_jax.records import Record, RecordError


@given(epochs=st.integers(2, 12), probes=st.integers(1, 4), nan_from=st.integers(0, 12))
def test_round_trip(epochs, probes, nan_from, tmp_path_factory):
    record = make(epochs, probes)
    record.arrays["loss"][nan_from:] = np.nan
    path = record.save(tmp_path_factory.mktemp("round") / "deep" / "record.npz")
    back = records.load(path)
    assert back.experiment == "mnist"
    assert back.config == {"width": 3, "seed": 0}
    assert back.provenance == {"device": "cpu"}
    assert set(back.arrays) == set(record.arrays)
    for name, array in record.arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    assert back.diverged_at == (nan_from if nan_from <= epochs else None)
    assert records.load(path.parent).checksum() == record.checksum()


def test_same_record_same_arrays_whatever_the_provenance(tmp_path):
    a, b = make(), Record("mnist", make().arrays, {"seed": 0, "width": 3}, {"device": "tpu", "seconds": 9})
    assert a.checksum() == b.checksum()
    assert a.checksum() != make(loss_scale=np.array(1.0)).checksum()


def test_nothing_is_pickled_and_nothing_is_left_behind(tmp_path):
    path = make().save(tmp_path / "record.npz")
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
        assert json.loads(str(file["config"]))["width"] == 3
        assert int(file["schema_version"]) == records.SCHEMA_VERSION
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.npz"]


def test_a_failed_write_keeps_the_old_record(tmp_path, monkeypatch):
    path = make().save(tmp_path / "record.npz")
    before = path.read_bytes()

    def fail(file, **members):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="no space left"):
        make(loss_scale=np.array(1.0)).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.npz"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": None}, "the record lacks loss"),
        ({"drift": np.zeros(3)}, "drift has 3 entries along 'epoch' where epoch has 7"),
        ({"loss": np.zeros((7, 2))}, r"loss must be numeric with axes \('epoch',\), got float64 of shape \(7, 2\)"),
        ({"loss": np.array(["a"] * 7)}, "loss must be numeric"),
        ({"colour": np.zeros(7)}, "the record holds 'colour', which schema 2 does not know"),
    ],
)
def test_invalid_arrays_are_named(changes, message):
    with pytest.raises(RecordError, match=message):
        make(**changes)


def rewrite(path, **members):
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    content.update(members)
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


def test_files_that_are_no_record_are_refused(tmp_path):
    path = make().save(tmp_path / "record.npz")
    for change, message in (
        ({"schema_version": np.array(99)}, "has schema 99, this version reads up to 2; upgrade"),
        ({"schema_version": None}, "no record: it lacks schema_version"),
        ({"config": None}, "no record: it lacks config"),
        ({"config": np.array("{not json")}, "Expecting property name"),
        ({"loss": np.zeros(7)}, "was altered after it was written"),
        ({"loss": np.array([None] * 7, object)}, "without pickled objects"),
        ({"loss": np.zeros(5)}, "entries along 'epoch'"),
    ):
        make().save(path)
        with pytest.raises(RecordError, match=message):
            records.load(rewrite(path, **change))
    for content in (b"", b"PK\x03\x04 cut off", b"not a zip at all"):
        path.write_bytes(content)
        with pytest.raises(RecordError, match="no readable record"):
            records.load(path)
    whole = make().save(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordError, match="no readable record"):
        records.load(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes.txt", "hello")
    with pytest.raises(RecordError, match=r"lacks|no readable record"):
        records.load(path)
    with pytest.raises(RecordError, match="there is no record at"):
        records.load(tmp_path / "nowhere")


def test_what_was_not_measured_is_absent():
    record = make()
    assert "sharpness" not in record
    with pytest.raises(KeyError, match="sharpness was not measured in this run; it holds"):
        record["sharpness"]


def test_xarray_carries_units_and_coordinates():
    data = make().to_xarray()
    assert data["loss"].dims == ("epoch",)
    assert data["loss"].attrs["units"] == "units of L"
    assert data["ntk_min_eig"].sel(probe=6).item() == 0.25
    assert json.loads(data.attrs["config"])["seed"] == 0


def schema_1_file(path, record, **members):
    """A file of schema 1 as its writer made it: arrays, four texts, and the checksum by its own rule."""
    digest = hashlib.sha256(json.dumps([record.experiment, dict(record.config)], sort_keys=True).encode())
    for name in sorted(record.arrays):
        array = np.ascontiguousarray(record.arrays[name])  # which gives scalars one axis
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    texts = {
        "experiment": record.experiment,
        "config": json.dumps(dict(record.config), sort_keys=True),
        "provenance": json.dumps(dict(record.provenance), sort_keys=True),
        "checksum": f"sha256:{digest.hexdigest()}",
    }
    content = {**record.arrays, **{name: np.array(text) for name, text in texts.items()}, **members}
    np.savez_compressed(path, schema_version=np.array(1), **content)
    return path


def test_schema_1_loads_as_before(tmp_path):
    record = make()
    back = records.load(schema_1_file(tmp_path / "record.npz", record))
    assert back.loss == "squared"
    assert back.checksum() == record.checksum()
    assert set(back.arrays) == set(record.arrays)
    assert "step_size" not in back
    # What came with schema 2 is none of its names, and neither is the text that names a loss.
    for name in ("step_size", "seen", "loss_name"):
        value = np.array("squared") if name == "loss_name" else np.ones(7, np.int64)
        path = schema_1_file(tmp_path / f"{name}.npz", record, **{name: value})
        with pytest.raises(RecordError, match=f"'{name}', which schema 1 does not know"):
            records.load(path)
    altered = schema_1_file(tmp_path / "altered.npz", record, loss=np.ones(7))
    with pytest.raises(RecordError, match="was altered"):
        records.load(altered)


def test_the_loss_is_named_and_enters_the_checksum_unless_it_is_squared(tmp_path):
    squared, logistic = make(), dataclasses.replace(make(), loss="logistic")
    assert squared.loss == "squared"
    assert logistic.checksum() != squared.checksum()
    for record in (squared, logistic):
        assert records.load(record.save(tmp_path / f"{record.loss}.npz")).loss == record.loss
    with pytest.raises(RecordError, match="was altered"):
        records.load(rewrite(tmp_path / "logistic.npz", loss_name=np.array("huber")))
    with pytest.raises(RecordError, match="lacks loss_name"):
        records.load(rewrite(tmp_path / "squared.npz", loss_name=None))
    for bad in ("", "a\x1b[2J", "x" * 65, "a\n"):
        with pytest.raises(RecordError, match="loss must be the name of a loss"):
            dataclasses.replace(make(), loss=bad)


FAR = 10**9


def sparse(**changes):
    """Steps up to 10^9, of which five were seen."""
    changes = {"epoch": np.array([0, 1, 2, FAR - 1, FAR]), "probe_epoch": np.array([0, 2, FAR]), **changes}
    return make(4, 3, **changes)


def test_a_sparse_axis_allocates_nothing_by_step_number(tmp_path):
    tracemalloc.start()
    try:
        record = records.load(sparse().save(tmp_path / "record.npz"))
        text = repr(record)
        assert record.diverged_at is None
        record.to_xarray()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "0 to 1,000,000,000, 5 measured" in text
    assert peak < 50e6, "xarray's modules take some 10 MB, a byte for each step would be 1000"


NAN = np.nan


@pytest.mark.parametrize(
    ("loss", "seen", "expected"),
    [
        ([1, 1, 1, 1, 1], None, None),
        ([1, 1, 1, NAN, NAN], None, FAR - 1),
        ([1, NAN, 1, 1, NAN], None, FAR),
        ([1, NAN, 1, NAN, 1], None, None),
        ([NAN, NAN, NAN, NAN, NAN], None, 0),
        ([1, 1, NAN, NAN, np.inf], None, 2),
        ([1, 1, 1, NAN, NAN], [1, 1, 1, 0, 0], None),
        ([1, 1, 1, NAN, NAN], [1, 1, 1, 0, 1], FAR),
        ([1, NAN, NAN, NAN, NAN], [1, 0, 1, 0, 1], 2),
    ],
)
def test_divergence_is_a_step_number_and_a_gap_is_none(loss, seen, expected):
    seen = None if seen is None else np.array(seen)
    assert sparse(loss=np.array(loss, float), seen=seen).diverged_at == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": np.arange(1, 8), "probe_epoch": None}, "epoch must start with 0, got 1: drift"),
        ({"epoch": np.array([0, 1, 2, 2, 4, 5, 6])}, "epoch must be strictly ascending, got 2 before 2"),
        ({"epoch": np.array([0, 2, 1, 3, 4, 5, 6], np.uint8)}, "epoch must be strictly ascending, got 2 before 1"),
        ({"epoch": np.array([0, 1, 2, 3, 4, 6, 2**53])}, "epoch must be below 2.53, got 9007199254740992 at entry 6"),
        ({"epoch": np.arange(7) * 2, "probe_epoch": np.array([0, 3, 12])}, "among the 7 steps in epoch, 0 to 12; got"),
        ({"probe_epoch": np.array([0, 3, 3])}, "probe_epoch must be distinct, got 3 2 times"),
        ({"seen": np.array([1, 1, 2, 1, 1, 1, 1])}, "seen must be one of 0, 1, got 2 at entry 2"),
        ({"seen": np.ones(7)}, "seen must hold integers, got float64"),
        ({"probe_untrusted": np.array([0.0, 7.0, NAN])}, "must be one of 0, 1, 2, 3, got 7.0 at entry 1"),
        ({"probe_untrusted": np.array([0.5, 1, 2])}, "probe_untrusted must be one of"),
        ({"affine_in_parameters": np.array(NAN)}, "affine_in_parameters must be one of 0, 1, got nan"),
        ({"affine_in_parameters": np.array(2)}, "affine_in_parameters must be one of 0, 1, got 2"),
        ({"kernel_trace": np.array(-1)}, "kernel_trace must be one of 0, 1, got -1"),
        ({"kernel_trace": np.array(NAN)}, "kernel_trace must be one of 0, 1, got nan"),
        ({"smoothness_upper": np.array(0.0)}, "smoothness_upper must be a number > 0, got 0.0; NaN stands"),
        ({"smoothness_upper": np.array(-1.0)}, "smoothness_upper must be a number > 0, got -1.0"),
        ({"ntk_lipschitz_upper": np.array(-1e-300)}, "ntk_lipschitz_upper must be a number >= 0, got -1e-300"),
        ({"radius_certified": np.array(-0.1)}, "radius_certified must be a number >= 0, got -0.1"),
        ({"radius_certified": np.array(np.inf)}, "radius_certified must be finite unless affine"),
        (
            {"radius_certified": np.array(np.inf), "affine_in_parameters": np.array(0)},
            "radius_certified must be finite unless affine",
        ),
        ({"spectrum": np.ones((3, 8))}, "spectrum must have 4 entries along 'eigenvalue', the rows of 4 samples and 1"),
        ({"residual_energy": np.ones((3, 4)), "c": np.array(3)}, "energy must have 12 entries .* and 3 outputs"),
        (
            {"spectrum": np.ones((3, 12)), "c": np.array(3), "kernel_trace": np.array(1)},
            "spectrum must have 4 entries .* the rows of 4 samples, or fewer and spectrum_rest; got 12",
        ),
        ({"spectrum": np.ones((3, 4)), "kernel_samples": np.array(2)}, "spectrum must have 2 entries"),
        ({"spectrum": np.ones((3, 2))}, "spectrum must have 4 entries .*, or fewer and spectrum_rest; got 2"),
        ({"spectrum": np.ones((3, 5)), "spectrum_rest": np.ones(3)}, "spectrum must have 4 entries .* got 5"),
        ({"spectrum": np.ones((3, 2)), "residual_energy_rest": np.ones(3)}, "spectrum must have 4 entries .* got 2"),
        ({"ntk_pair_shift": np.ones((3, 2))}, "ntk_pair_shift must be square in the probes, got 3 by 2"),
        ({"ntk_pair_shift": np.full((3, 3), -1.0)}, "ntk_pair_shift must be a number >= 0, got -1.0 at entry 0, 0"),
        ({"n": np.array(1e18)}, "n must be below 2.53, got 1e[+]18"),
        ({"n": np.array(2**30), "c": np.array(2**23)}, "n c must be below 2.53"),
        ({"p": np.array(2**53)}, "p must be below 2.53"),
        ({"loss_scale": np.array(np.inf)}, "loss_scale must be a finite number > 0, got inf"),
        ({"loss_scale": np.array(NAN)}, "loss_scale must be a finite number > 0, got nan"),
        ({"learning_rate": np.array(np.inf)}, "learning_rate must be a finite number > 0, got inf"),
        ({"step_deviation": np.full(7, -1e-9)}, "step_deviation must be a number >= 0, got -1e-09 at entry 0"),
        ({"step_rounding": np.full(7, -1.0)}, "step_rounding must be a number >= 0"),
        ({"parameter_eps": np.array(0.0)}, "parameter_eps must be a number > 0 and at most 1, got 0.0"),
        ({"parameter_eps": np.array(1.5)}, "parameter_eps must be a number > 0 and at most 1, got 1.5"),
        ({"parameter_eps": np.array(NAN)}, "parameter_eps must be a number > 0 and at most 1, got nan"),
        ({"subset_ids": np.array([1, 2, 1])}, "subset_ids must be distinct, got 1 2 times"),
        ({"subset_ids": np.array([0, 4])}, "subset_ids must lie in the run's samples 0 to 3, got 0 to 4"),
        ({"grad_sq_norm": np.full(7, -1.0)}, "grad_sq_norm must be a number >= 0, got -1.0 at entry 0"),
        ({"drift": np.full(7, -1.0)}, "drift must be a number >= 0"),
        ({"accuracy": np.full(7, 1.01)}, "accuracy must be a number >= 0 and at most 1, got 1.01"),
        ({"ntk_assembly_error": np.full(3, -1.0)}, "ntk_assembly_error must be a number >= 0"),
        ({"ntk_shift": np.ones(3, complex)}, "ntk_shift must be numeric"),
        ({"kernel_trace": np.array(True)}, "kernel_trace must be numeric"),
        ({"seen": np.ones(7, bool)}, "seen must be numeric"),
    ],
)  # fmt: skip
def test_numbers_are_held_against_what_they_may_be(changes, message):
    with pytest.raises(RecordError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"smoothness_upper": np.array(5e-324), "ntk_lipschitz_upper": np.array(0.0)},
        {"smoothness_upper": np.array(np.inf), "ntk_lipschitz_upper": np.array(np.inf)},
        {"smoothness_upper": np.array(NAN), "radius_certified": np.array(NAN)},
        {"radius_certified": np.array(np.inf), "affine_in_parameters": np.array(1)},
        {"radius_certified": np.array(np.inf), "ntk_lipschitz_upper": np.array(0.0)},
        {"radius_certified": np.array(0.0)},
        {"probe_untrusted": np.array([NAN, 0, 3]), "spectrum": np.full((3, 4), NAN)},
        {"spectrum": np.ones((3, 12)), "c": np.array(3)},
        {"spectrum": np.ones((3, 2)), "kernel_samples": np.array(2)},
        {"spectrum": np.ones((3, 4)), "c": np.array(3), "kernel_trace": np.array(1)},
        {"n": np.array(2**53 - 1)},
        {"loss_scale": np.array(1.5), "learning_rate": np.array(NAN)},
        {"step_size": np.full(7, -1.0), "step_deviation": np.full(7, NAN), "step_rounding": np.full(7, np.inf)},
        {"seen": np.array([1, 0, 1, 0, 0, 1, 1], np.uint8), "parameter_eps": np.array(2.0**-23)},
        {"probe_epoch": np.array([6, 0, 3])},
        {"probe_epoch": np.array([0, 3, 6], np.uint64), "epoch": np.arange(7, dtype=np.int8)},
        {"subset_ids": np.array([3, 0])},
    ],
)
def test_what_a_record_may_hold_passes(changes, tmp_path):
    record = make(**changes)
    assert records.load(record.save(tmp_path / "record.npz")).checksum() == record.checksum()


def test_names_of_the_ground_are_names_of_records():
    assert records.SCHEMA is schema.SCHEMA
    assert records.REQUIRED is schema.REQUIRED
    assert records.atomic_write is files.atomic_write
    assert set(schema.SINCE_2) | set(schema.INTEGERS) <= set(schema.SCHEMA)


def test_the_short_form_says_what_happened():
    text = repr(
        make(ntk_min_eig_lower=np.full(3, 0.2499), ntk_min_eig_upper=np.full(3, 0.2501), epoch=np.arange(0, 14, 2),
             probe_epoch=np.array([0, 6, 12]))
    )  # fmt: skip
    assert text.splitlines() == [
        "<Record 'mnist'",
        "  problem: n = 4, c = 1, p = 9, squared loss, s = 4, η = 0.1",
        "  steps: 0 to 12, 7 measured",
        "  probes: 3, at steps 0 to 12",
        "  end: finite to the last measured step",
        "  loss: 1 (step 0) to 0.1653 (step 12)",
        "  λ_0: 0.25, in [0.2499, 0.2501]>",
    ]
    bare = make(probe_epoch=None, ntk_min_eig=None, loss=np.full(7, NAN), learning_rate=np.array(NAN))
    assert [line.split(":")[0] for line in repr(bare).splitlines()[1:]] == ["  problem", "  steps", "  probes", "  end"]
    assert "diverged at step 0" in repr(bare)


def test_a_dataset_is_made_without_xarray_until_it_is_asked_for():
    code = "import sys, lplr_jax.records; assert not {'xarray', 'pandas', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    pairs = np.arange(9.0).reshape(3, 3)
    data = sparse(ntk_pair_shift=pairs).to_xarray()
    assert data["ntk_pair_shift"].sel(probe=2, other_probe=FAR).item() == 5.0
    assert data["loss"].sel(epoch=FAR).item() == pytest.approx(np.exp(-1.2))
    assert data.attrs["loss"] == "squared"
