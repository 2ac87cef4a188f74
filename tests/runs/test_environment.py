"""The settings of JAX that decide numbers: recorded, part of a run's identity, and told when they change."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from lplr_jax.records import Record
from lplr_jax.runs import environment, recorder
from lplr_jax.runs import folder as run_folder
from lplr_jax.runs.folder import ConfigMismatchError

CONFIG = {"width": 8}


@pytest.fixture
def setting():
    """Set a setting of JAX for one test."""
    before = {name: getattr(jax.config, name) for name in (*environment.DECIDING, *environment.ROUNDING)}
    yield lambda name, value: jax.config.update(name, value)
    for name, value in before.items():
        jax.config.update(name, value)


CHANGED = {"jax_default_prng_impl": "rbg", "jax_threefry_partitionable": False, "jax_random_seed_offset": 7}


def test_the_defaults_are_those_of_jax():
    assert set(CHANGED) == set(environment.DECIDING)
    for name, default in environment.DECIDING.items():
        assert getattr(jax.config, name) == default
    assert environment.unusual_settings() == {}
    assert environment.unusual_settings({}) == {}  # a record from before they were recorded


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), CHANGED.items())
def test_each_changes_what_a_seed_gives_and_is_recorded(name, value, setting):
    def drawn():
        jax.clear_caches()
        return np.asarray(jax.random.normal(jax.random.key(3), (3, 5)))

    before, plain = environment.describe_environment(), drawn()
    setting(name, value)
    assert (drawn() != plain).any()
    after = environment.describe_environment()
    assert (before["settings"][name], after["settings"][name]) == (environment.DECIDING[name], value)
    assert environment.unusual_settings() == environment.unusual_settings(after["settings"]) == {name: value}
    json.dumps(after)


def claim(folder):
    with run_folder.claimed(folder, "test", CONFIG):
        (folder / "note").touch()  # a bare config is removed


def test_a_folder_is_of_one_generator(setting, tmp_path):
    claim(tmp_path / "a")
    written = json.loads((tmp_path / "a" / run_folder.CONFIG).read_text())
    assert written == {"experiment": "test", "config": CONFIG}, "the default leaves no key"
    plain = run_folder.identity_of("test", CONFIG)
    setting("jax_default_prng_impl", "rbg")
    assert run_folder.identity_of("test", CONFIG) != plain
    with pytest.raises(ConfigMismatchError, match="jax_default_prng_impl absent there, rbg asked for"):
        claim(tmp_path / "a")
    claim(tmp_path / "b")
    claim(tmp_path / "b")
    setting("jax_default_prng_impl", "threefry2x32")
    with pytest.raises(ConfigMismatchError, match="jax_default_prng_impl rbg there, absent asked for"):
        claim(tmp_path / "b")


def test_a_record_alone_says_of_which_generator_it_is(setting, tmp_path):
    series = {"loss": [1.0], "grad_sq_norm": [1.0], "drift": [0.0], "epoch": [0]}
    scalars = dict.fromkeys(("loss_scale", "learning_rate", "n", "c", "p"), 1)
    arrays = {name: np.asarray(value) for name, value in {**series, **scalars}.items()}
    record = Record("test", arrays, CONFIG, {"settings": {"jax_default_prng_impl": "rbg"}})
    record.save(tmp_path / "record.npz")
    with pytest.raises(ConfigMismatchError, match="jax_default_prng_impl rbg there"):
        run_folder.check_config(tmp_path, "test", CONFIG)
    setting("jax_default_prng_impl", "rbg")
    run_folder.check_config(tmp_path, "test", CONFIG)
    dataclasses.replace(record, provenance={"settings": ["no mapping"]}).save(tmp_path / "record.npz")
    with pytest.raises(ConfigMismatchError, match="rbg asked for"):
        run_folder.check_config(tmp_path, "test", CONFIG)


def test_what_changes_last_digits_is_told_on_resume(setting, caplog):
    before = json.loads(json.dumps(environment.describe_environment()))
    recorder._warn_of_changes(before)
    assert not caplog.records
    setting("jax_default_matmul_precision", "bfloat16")
    with caplog.at_level(logging.WARNING):
        recorder._warn_of_changes(before)
    assert "'jax_default_matmul_precision': 'bfloat16'" in caplog.records[0].getMessage()
