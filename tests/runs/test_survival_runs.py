"""Interrupted ablations, boundaries and initialisations; random kills of whole commands."""

import random
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest

import survival
from builders import cifar_like, write_batch
from lplr_jax import records
from lplr_jax.experiments import ablation, boundary, initialisation, mnist, step_size
from lplr_jax.experiments.descent_search import Bracket
from lplr_jax.runs.checkpoint import Checkpoints


class Stop(Exception):  # noqa: N818
    """The run is ended here, as by a kill."""


class Stopping:
    """An observer that ends the run at an epoch, before its probe."""

    def __init__(self, at):
        self._at = at

    def resume(self, epoch):
        pass

    def chunk(self, epoch, loss):
        if epoch == self._at:
            raise Stop

    def probe(self, epoch, values):
        pass


@pytest.mark.slow
def test_seeds_trained_together_go_on_where_they_stopped(tmp_path):
    configs = [
        mnist.MnistConfig(
            width=4, epochs=6, probe_every=2, n_train=20, seed=seed, hessian_probes=0, spectrum_probes=0, search_steps=0
        )
        for seed in (0, 1)
    ]
    wholes = [mnist.run(c, advance=a) for c, a in zip(configs, ablation.train_together(configs), strict=True)]
    assert wholes[0].checksum() != wholes[1].checksum()
    for config, advance in zip(configs, ablation.train_together(configs), strict=True):
        with pytest.raises(Stop):
            mnist.run(
                config, advance=advance, checkpoints=Checkpoints(tmp_path / str(config.seed)), observer=Stopping(4)
            )
    for config, advance, whole in zip(configs, ablation.train_together(configs), wholes, strict=True):
        record = mnist.run(config, advance=advance, checkpoints=Checkpoints(tmp_path / str(config.seed)))
        assert record.provenance["resumed_at"] == [2]
        assert record.checksum() == whole.checksum()


def test_a_group_with_a_seed_that_is_done_is_trained_as_a_whole(tmp_path, monkeypatch):
    config = ablation.AblationConfig(widths="4,8", seeds="0,1", epochs=4, probe_every=2, n_train=20, hessian_probes=1)
    groups = []

    def together(configs):
        groups.append([(config.width, config.seed) for config in configs])
        raise Stop

    monkeypatch.setattr(ablation, "train_together", together)
    monkeypatch.setattr(step_size, "initial_sharpness", lambda config: float(config.width))
    (tmp_path / "m4-seed0").mkdir()
    (tmp_path / "m4-seed0" / "record.npz").write_bytes(b"")
    with pytest.raises(Stop):
        ablation.run(config, tmp_path, together=True)
    assert groups == [[(4, 0), (4, 1)]]


def stop_at(words):
    said = []

    def say(line):
        said.append(line)
        if words is not None and words in line:
            raise Stop

    return said, say


def test_a_boundary_goes_on_after_the_widths_that_are_done(tmp_path, monkeypatch):
    measured = []

    def find(objective, params, batch, *, start, steps, tolerance):
        measured.append(start)
        return Bracket(start, start * (1 + tolerance), len(measured))

    monkeypatch.setattr(boundary, "find_boundary", find)
    monkeypatch.setattr(boundary, "initial_sharpness", lambda config: float(config.width))
    config = boundary.BoundaryConfig(widths="4,8,16", n_train=20)
    _, say = stop_at("width 16: predicted")
    with pytest.raises(Stop):
        boundary.run_in(config, tmp_path, say=say)
    assert measured == [0.5, 0.25]
    assert not (tmp_path / "boundary.json").exists()
    said, say = stop_at(None)
    points = boundary.run_in(config, tmp_path, say=say)
    assert measured == [0.5, 0.25, 0.125], "none is measured twice"
    assert "goes on after width 8" in said
    assert points == boundary.load(tmp_path / "boundary.json")
    assert [point.width for point in points] == [4, 8, 16]
    assert [path.name for path in tmp_path.iterdir()] == ["boundary.json"]
    assert boundary.run_in(config, tmp_path, say=say) == points
    assert len(measured) == 3


@pytest.mark.slow
def test_initialisations_go_on_where_they_stopped(tmp_path):
    config = initialisation.InitialisationConfig(inits="he,antisymmetric", width=4, epochs=4, probe_every=2, n_train=20)
    whole = initialisation.run(config, tmp_path / "whole")
    observers = iter([Stopping(None), Stopping(2)])

    @contextmanager
    def follow(run, epochs):
        yield next(observers)

    with pytest.raises(Stop):
        initialisation.run(config, tmp_path / "cut", follow=follow)
    done = initialisation.run(config, tmp_path / "cut")
    for (arm, record), (_, again) in zip(whole, done, strict=True):
        assert again.checksum() == record.checksum(), arm.name
        assert records.load(tmp_path / "cut" / arm.name).checksum() == record.checksum()
    assert done[1][1].provenance["resumed_at"] == [0]
    one, two = ((tmp_path / name / "predictions.json").read_bytes() for name in ("whole", "cut"))
    assert one == two


def left_by(folder):
    """What an experiment leaves behind: arrays by checksum, tables and figures by their bytes.

    Of the report that it is there and whole: it tells the command and the seconds of a run.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            if path.name == "record.npz":
                found[name] = records.load(path).checksum()
            elif path.name == "report.html":
                found[name] = path.read_text(encoding="utf-8").rstrip().endswith("</html>")
            else:
                found[name] = path.read_bytes()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["mnist", "ablation", "cifar"])
def test_twenty_kills_at_random_moments(experiment, tmp_path):
    """Half of the kills by the clock, half at a write chosen at random; whatever was done in between is compared."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    command = [experiment, "--preset", "smoke"]
    if experiment == "cifar":
        write_batch(tmp_path / "images" / "data_batch_1.bin", *cifar_like(300))
        command += ["--data", str(tmp_path / "images")]
    command += ["--out"]
    code, said = survival.run(whole, [*command, str(whole)])
    assert code == 0, said
    writes = int(said.rpartition("writes: ")[2])
    seconds = survival.seconds_of(folder, [*command, str(folder)])
    expected = left_by(whole)
    assert left_by(folder) == expected
    shutil.rmtree(folder)
    draw, kills, resumed, finished = random.Random(20), 0, 0, 0
    while kills < 20:
        if kills % 2:
            code, said = survival.run(folder, [*command, str(folder)], kill_at=draw.randint(1, writes))
            resumed += "goes on from epoch" in said
        else:
            code = survival.shoot_after(folder, [*command, str(folder)], draw.uniform(0.2, 1.0) * seconds)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if code == 0:
            assert left_by(folder) == expected
            shutil.rmtree(folder)
            finished += 1
    code, said = survival.run(folder, [*command, str(folder)])
    assert code == 0, said
    assert left_by(folder) == expected
    assert resumed, "no kill hit a run that had saved anything"
    print(f"{kills} kills, {resumed} seen to go on, {finished + 1} finished")
    assert np.isfinite(seconds)
