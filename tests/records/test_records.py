"""Records come back as they went, and what is no record is refused by name."""

import json
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make
from lplr_jax import records
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
        ({"colour": np.zeros(7)}, "the record holds 'colour', which schema 1 does not know"),
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
        ({"schema_version": np.array(99)}, "has schema 99, this version reads up to 1; upgrade"),
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
