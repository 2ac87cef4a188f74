"""A checkpoint gives back every byte of its own run, and nothing else: not damage, not another run's."""

import errno
import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lplr_jax import archives
from lplr_jax.runs import checkpoint
from lplr_jax.runs.checkpoint import Checkpoints, ConfigMismatchError, Identity

STATE = {"w": jnp.arange(3, dtype=jnp.float32)}
ONE = Identity.of("mnist", {"width": 8, "data_checksum": "a"})


def saved_in(folder, epochs=(0, 1), identity=ONE, state=STATE):
    """Checkpoints of several epochs side by side, as a kill between the last write and the clearing leaves them."""
    store = Checkpoints(folder, identity=identity)
    for epoch in epochs:
        store.save(epoch, state, {"loss": np.arange(3.0) + epoch}, remembered={"kernel": np.eye(2) + epoch})
        shutil.copytree(folder / f"epoch_{epoch:08d}", folder.parent / f"spare-{epoch}")
    for epoch in epochs:
        spare = folder.parent / f"spare-{epoch}"
        shutil.rmtree(folder / f"epoch_{epoch:08d}", ignore_errors=True)
        spare.rename(folder / f"epoch_{epoch:08d}")
    return folder


def content(saved):
    """All that a checkpoint gives back, as something that can be compared."""
    leaves = [(np.asarray(leaf).tobytes(), str(leaf.dtype)) for leaf in jax.tree.leaves(saved.state)]
    arrays = {name: value.tobytes() for name, value in saved.arrays.items()}
    memory = {at: {name: value.tobytes() for name, value in kept.items()} for at, kept in saved.memory.items()}
    return saved.epoch, leaves, arrays, memory, saved.facts


KINDS = {
    "float32": np.float32([1.5, -0.0, np.nan]),
    "float64": np.float64([5e-324, np.inf]),
    "big-endian": np.array([1.0, 2.0], ">f8"),
    "complex": np.complex64([1 + 2j]),
    "bool": np.array([True, False]),
    "text": np.array(["θ", "long"]),
    "0-d": np.array(7),
    "empty": np.zeros((0, 3), np.float32),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "bfloat16": np.array([[1.5, -2.0]], ml_dtypes.bfloat16),
    "bfloat16 0-d": np.array(1.5, ml_dtypes.bfloat16),
    "bfloat16 empty": np.zeros((0, 2), ml_dtypes.bfloat16),
    "float8": np.array([0.5, 2.0], ml_dtypes.float8_e4m3fn),
    "int4": np.array([-8, 7], ml_dtypes.int4),
    "scalar": np.float32(0.1),
    "Python int": 3,
    "Python float": 0.1,
    "Python bool": True,
    "jax": jnp.arange(4, dtype=jnp.uint8),
    "jax bfloat16": jnp.full((2, 2), 1.25, jnp.bfloat16),
    "jax 0-d": jnp.asarray(2.5),
    "jax empty": jnp.zeros((0,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_leaf_comes_back(kind, tmp_path):
    leaf = KINDS[kind]
    remembered = {} if isinstance(leaf, int | float) else {"it": np.asarray(leaf)}
    Checkpoints(tmp_path / "c").save(0, [leaf], {"it": np.asarray(leaf)}, remembered=remembered)
    saved = Checkpoints(tmp_path / "c").latest([leaf])
    (found,) = saved.state
    assert type(found) is type(leaf)
    here = np.asarray(leaf)
    for there in (np.asarray(found), saved.arrays["it"], *(kept["it"] for kept in saved.memory.values())):
        assert (there.dtype, there.shape) == (here.dtype, here.shape)
        assert there.tobytes() == here.tobytes()
    assert all(array.flags.writeable for array in saved.arrays.values())


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_come_back_and_one_of_another_generator_does_not(impl, tmp_path):
    keys = {"one": jax.random.key(3, impl=impl), "many": jax.random.split(jax.random.key(4, impl=impl), 3)}
    Checkpoints(tmp_path / "c").save(0, keys, {})
    like = jax.tree.map(lambda key: jax.random.clone(key), keys)
    found = Checkpoints(tmp_path / "c").latest(like).state
    for name, key in keys.items():
        assert jax.random.key_impl(found[name]) == jax.random.key_impl(key)
        np.testing.assert_array_equal(jax.random.key_data(found[name]), jax.random.key_data(key))
    other = jax.random.key(3, impl="rbg" if impl == "threefry2x32" else "threefry2x32")
    with pytest.raises(OSError, match=r"it holds key<\w+> of shape \(\) where this run has key<\w+>"):
        Checkpoints(tmp_path / "c").latest({**keys, "one": other})


def test_64_bits_stay_64_outside_of_their_scope(tmp_path):
    with jax.enable_x64(True):
        state = [jnp.asarray(0.1), jnp.asarray(2**40)]
    Checkpoints(tmp_path / "c").save(0, state, {})
    found = Checkpoints(tmp_path / "c").latest(state).state
    assert [str(leaf.dtype) for leaf in found] == ["float64", "int64"]
    assert [np.asarray(leaf).item() for leaf in found] == [0.1, 2**40]


@pytest.mark.slow
def test_a_state_of_many_leaves(tmp_path):
    state = [np.full((), i) for i in range(15_000)]
    Checkpoints(tmp_path / "c").save(0, state, {})
    assert [leaf.item() for leaf in Checkpoints(tmp_path / "c").latest(state).state] == list(range(15_000))


@pytest.mark.parametrize("name", ["θ", "a/b", "../a", "", "a.as-int4"])
def test_names_that_would_not_come_back_are_refused(name, tmp_path):
    for arguments in ({"arrays": {}, "remembered": {name: np.ones(1)}}, {"arrays": {f"{name}\0": np.ones(1)}}):
        with pytest.raises(ValueError, match="the name of an array must be letters"):
            Checkpoints(tmp_path / "c").save(0, STATE, **arguments)
    with pytest.raises(ValueError, match="must hold numbers"):
        Checkpoints(tmp_path / "c").save(0, STATE, {"x": np.array([None])})
    assert Checkpoints(tmp_path / "c").latest(STATE) is None


def flips(original, bits):
    """The content with every bit of every byte flipped, or with one bit of every byte."""
    for at in range(len(original)):
        for bit in range(8) if bits == "every" else (at % 8,):
            changed = bytearray(original)
            changed[at] ^= 1 << bit
            yield bytes(changed)


@pytest.mark.parametrize("bits", ["one a byte", pytest.param("every", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["epoch_00000001/manifest.json", "epoch_00000001/arrays.npz", "memory/epoch_00000000.npz"]
)
def test_whatever_bit_flips_it_is_refused(name, bits, tmp_path):
    folder = saved_in(tmp_path / "c", epochs=(0, 1))
    shutil.rmtree(folder / "epoch_00000000")
    expected = content(Checkpoints(folder, identity=ONE).latest(STATE))
    path = folder / name
    original = path.read_bytes()

    def refused(changed):
        path.write_bytes(changed)
        try:
            found = content(Checkpoints(folder, identity=ONE).latest(STATE))
        except OSError as error:
            return all(words in str(error) for words in ("no checkpoint can be read", str(folder), "with --force"))
        assert found == expected
        return False

    assert all(map(refused, flips(original, bits))), "every bit of these files is held against a digest"
    assert all(map(refused, (original[:-1], b"", original * 2)))
    refused(original + b" ")
    assert not refused(original)


def test_damage_sends_the_run_to_the_one_before(tmp_path, caplog):
    folder = saved_in(tmp_path / "c")
    path = folder / "epoch_00000001" / "arrays.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(folder, identity=ONE).latest(STATE).epoch == 0
    assert "epoch_00000001 is not taken, so the run goes on from the checkpoint before it" in caplog.text
    assert "does not match the digest in the manifest" in caplog.text


def test_another_probes_memory_is_not_taken(tmp_path):
    folder = saved_in(tmp_path / "c", epochs=(0, 1, 2))
    one, two = (folder / "memory" / f"epoch_0000000{at}.npz" for at in (0, 1))
    assert one.stat().st_size == two.stat().st_size, "so that its size tells nothing"
    shutil.copy(one, two)
    assert Checkpoints(folder, identity=ONE).latest(STATE).epoch == 0, "the last that rests on what is still there"


def test_a_manifest_that_disagrees_with_its_folder_is_not_taken(tmp_path):
    folder = saved_in(tmp_path / "c", epochs=(4,))
    (folder / "epoch_00000004").rename(folder / "epoch_00000006")
    with pytest.raises(OSError, match=r"epoch_00000006: its manifest is of epoch 4"):
        Checkpoints(folder, identity=ONE).latest(STATE)


def test_a_checkpoint_of_another_run_is_not_taken(tmp_path, caplog):
    others = {
        "another config": Identity.of("mnist", {"width": 9, "data_checksum": "a"}),
        "another data": Identity.of("mnist", {"width": 8, "data_checksum": "b"}),
        "another experiment": Identity.of("cifar", {"width": 8, "data_checksum": "a"}),
        "no config": Identity(),
    }
    folder = saved_in(tmp_path / "c", epochs=(4,))
    for name, identity in others.items():
        with pytest.raises(
            ConfigMismatchError, match=r"epoch_00000004 is of a run of another (config|data): .*--force"
        ):
            Checkpoints(folder, identity=identity).latest(STATE)
        assert Checkpoints(saved_in(tmp_path / name / "c", identity=identity), identity=identity).latest(STATE)
        with pytest.raises(ConfigMismatchError):
            Checkpoints(tmp_path / name / "c", identity=ONE).latest(STATE)
    shutil.copytree(tmp_path / "another data" / "c" / "epoch_00000001", folder / "epoch_00000009")
    shutil.copytree(tmp_path / "another data" / "c" / "epoch_00000001", folder / "epoch_00000005")
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(folder, identity=ONE).latest(STATE).epoch == 4, "its own is still there"
    assert caplog.text.count("is not taken, so the run goes on") == 2


def test_identity_is_that_of_the_content():
    assert Identity.of("a", {"x": 1, "y": (1, 2)}) == Identity.of("a", {"y": [1, 2], "x": 1})
    assert Identity.of("a", {"x": 1}) != Identity.of("a", {"x": 1.0})
    assert Identity.of("a", {"x": "1"}) != Identity.of("a", {"x": 1})


def test_an_earlier_layout_is_refused_in_one_sentence(tmp_path):
    target = tmp_path / "c" / "epoch_00000004"
    (target / "arrays").mkdir(parents=True)
    (target / "manifest.json").write_text(
        json.dumps({"epoch": 4, "leaves": 1, "empty": {}, "digest": "", "memory": {}})
    )
    said = rf"^{target} was written by an earlier version, which this one does not read; start afresh with --force, .*$"
    with pytest.raises(ValueError, match=said):
        Checkpoints(tmp_path / "c").latest(STATE)


def forged(folder, **changes):
    """Change fields of a manifest and sign it anew, as only somebody who means it would."""
    path = next(folder.glob("epoch_*")) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest |= {name: value for name, value in changes.items() if value is not ...}
    manifest = {name: value for name, value in manifest.items() if changes.get(name) is not ...}
    path.write_text(json.dumps({**manifest, "sha256": checkpoint.digest(manifest)}))


HASH = "0" * 64
THREE_BYTES = {"sha256": HASH, "bytes": 3}
FORGERIES = [
    *[("epoch", value, "epoch of the manifest must be") for value in (None, "4", 4.0, True, [4], -1, ...)],
    *[("files", value, "'files' of the manifest is") for value in (None, 3, "x", [], ...)],
    ("files", {}, "names no arrays.npz"),
    *[
        ("files", {"arrays.npz": value}, "has no SHA-256 of")
        for value in (None, 3, "x", {}, {"sha256": 3}, {"sha256": "x"})
    ],
    *[
        ("files", {"arrays.npz": {"sha256": HASH, "bytes": value}}, "size of arrays.npz")
        for value in (None, "1", -1, 10**30)
    ],
    ("files", {"arrays.npz": THREE_BYTES}, "expected 3 bytes"),
    *[
        ("files", {name: THREE_BYTES, "arrays.npz": THREE_BYTES}, "is no name of what")
        for name in ("../x.npz", "memory/epoch_00000009.npz", "memory/epoch_000000000.npz", "/etc/passwd", "memory/x")
    ],
    *[("state", value, "'state' of the manifest is") for value in (None, 3, {}, "x", ...)],
    *[("state", [value], "an array of the state is") for value in (None, 3, "x", ["<f4"], [3, [3]], ["<f4", 3], {})],
    *[("state", [["<f4", [value]]], "side of an array of the state must be") for value in (None, "3", -3, 3.0, [3])],
    ("state", [], "it holds a state of 0 arrays, this run has 1"),
    ("state", [["<f8", [3]]], "it holds <f8 of shape (3,) where this run has <f4 of shape (3,)"),
    *[("facts", value, "'facts' of the manifest is") for value in (None, 3, [], "x", ...)],
    *[("run", value, "'run' of the manifest is") for value in (3, [], {}, ...)],
    *[("data", value, "'data' of the manifest is") for value in (3, [], {}, ...)],
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "said"), FORGERIES)
def test_every_field_of_a_manifest_is_checked(field, value, said, tmp_path):
    folder = saved_in(tmp_path / "c", epochs=(4,))
    forged(folder, **{field: value})
    with pytest.raises(OSError, match="no checkpoint can be read") as refusal:
        Checkpoints(folder, identity=ONE).latest(STATE)
    assert said in str(refusal.value)


@pytest.mark.parametrize("value", [1, 3, "2", None, ...])
def test_a_manifest_of_another_format_is_refused(value, tmp_path):
    folder = saved_in(tmp_path / "c", epochs=(4,))
    forged(folder, format=value)
    with pytest.raises(
        ValueError, match=r"epoch_00000004 has format .*, this version reads 2; upgrade, or start afresh"
    ):
        Checkpoints(folder, identity=ONE).latest(STATE)


def test_members_that_are_not_what_they_say_are_refused(tmp_path):
    folder = saved_in(tmp_path / "c", epochs=(4,))
    path = folder / "epoch_00000004" / "arrays.npz"
    for members in (
        {"array-loss": np.ones(1)},
        {"state-0.as-float32": np.ones((3, 4), np.uint8)},
        {"state-0.as-finfo": np.ones((3, 4), np.uint8)},
        {"state-0.as-bfloat16": np.ones((3, 4), np.uint8)},
        {"state-0.as-bfloat16": np.float32(1)},
        {"state-0": np.array([None] * 3)},
    ):
        np.savez(path, **members)
        files = json.loads((path.parent / "manifest.json").read_text())["files"]
        files["arrays.npz"] = {"sha256": archives.sha256(path), "bytes": path.stat().st_size}
        forged(folder, files=files)
        with pytest.raises(OSError, match="no checkpoint can be read"):
            Checkpoints(folder, identity=ONE).latest(STATE)


@pytest.mark.parametrize("where", ["arrays.npz", "manifest.json", "memory", "fsync"])
def test_no_room_leaves_the_one_before(where, tmp_path, monkeypatch):
    folder = saved_in(tmp_path / "c", epochs=(4,))
    before = content(Checkpoints(folder, identity=ONE).latest(STATE))
    store = Checkpoints(folder, identity=ONE)
    store.latest(STATE)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(path, arrays):
        path.write_bytes(b"half of it")
        full()

    writes = iter([write, checkpoint.write_npz] if where == "memory" else [checkpoint.write_npz, write])
    with monkeypatch.context() as patched:
        if where in ("arrays.npz", "memory"):
            patched.setattr(checkpoint, "write_npz", lambda path, arrays: next(writes)(path, arrays))
        elif where == "manifest.json":
            patched.setattr(checkpoint, "canonical", full)
        else:
            patched.setattr(checkpoint, "sync_tree", full)
        with pytest.raises(OSError, match="No space left on device") as refusal:
            store.save(5, STATE, {}, remembered={"kernel": np.eye(2)})
    assert refusal.value.errno == errno.ENOSPC
    assert "epoch_00000005" in refusal.value.filename
    assert not list(folder.rglob(".*")), "nothing half-written is left"
    assert content(Checkpoints(folder, identity=ONE).latest(STATE)) == before
    store.save(5, STATE, {})
    assert Checkpoints(folder, identity=ONE).latest(STATE).epoch == 5


def test_no_room_is_foreseen(tmp_path, monkeypatch):
    folder = saved_in(tmp_path / "c", epochs=(4,))
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    monkeypatch.setattr(checkpoint, "write_npz", lambda *_: pytest.fail("something was written"))
    for arguments in ({"arrays": {"x": np.zeros(20_000)}}, {"arrays": {}, "remembered": {"x": np.zeros(20_000)}}):
        with pytest.raises(OSError, match=r"bytes are needed, 100,000 are free\).*epoch_00000005") as refusal:
            Checkpoints(folder, identity=ONE).save(5, STATE, **arguments)
        assert refusal.value.errno == errno.ENOSPC


def test_epochs_are_ordered_as_numbers(tmp_path):
    folder = saved_in(tmp_path / "c", epochs=(99_999_999, 100_000_000))
    (folder / "epoch_x").mkdir()
    assert Checkpoints(folder, identity=ONE).latest(STATE).epoch == 100_000_000
