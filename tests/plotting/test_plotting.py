"""The figure shows what the record holds, from the npz alone."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from builders import make
from lplr_jax import plotting, theory
from lplr_jax.plotting.panels import grid, verdict_strip
from lplr_jax.plotting.style import styled
from lplr_jax.records import Record

T = 400


def run_record(**changes):
    t = np.arange(T + 1.0)
    loss = np.exp(-0.01 * t) + 0.05
    probe_epoch = np.arange(0, T + 1, 50)
    arrays = {
        "epoch": np.arange(T + 1),
        "loss": loss,
        "grad_sq_norm": 0.2 * loss,
        "drift": np.sqrt(t) / 20,
        "probe_epoch": probe_epoch,
        "ntk_min_eig": np.full(probe_epoch.size, 0.02),
        "ntk_max_eig": np.full(probe_epoch.size, 2e5),
        "ntk_min_eig_subset": np.full(probe_epoch.size, 0.2),
        "subset_ids": np.arange(3),
    }
    record = make(T, probe_epoch.size, **{**arrays, **changes})
    record.config["epochs"] = T  # so that a step is called an epoch
    return record


def panels(figure):
    return dict(zip("abcd", figure.axes, strict=True))


def curve(axes, label):
    (line,) = [line for line in axes.lines if line.get_label().startswith(label)]
    return line.get_ydata()


def test_four_panels_show_the_record():
    record = run_record()
    axes = panels(plotting.four_panel(record))
    np.testing.assert_array_equal(curve(axes["a"], "all n"), record["ntk_min_eig"])
    np.testing.assert_array_equal(curve(axes["a"], "random subset of 3"), record["ntk_min_eig_subset"])
    np.testing.assert_array_equal(axes["b"].lines[0].get_ydata(), record["drift"])
    np.testing.assert_allclose(curve(axes["c"], r"$\frac{1}{2}"), 0.1)
    np.testing.assert_allclose(curve(axes["c"], r"$\lambda"), 0.02 / 4)
    np.testing.assert_array_equal(curve(axes["d"], "$L_t$"), record["loss"])
    gap = record["loss"] - record["loss"][-1]
    np.testing.assert_array_equal(curve(axes["d"], "$L_t-"), np.where(gap > 0, gap, np.nan))
    assert axes["d"].get_yscale() == "log"
    for panel in axes.values():
        assert panel.get_xlabel() == "epoch"
        assert "[" in panel.get_ylabel(), "every axis says its units"


def test_title_and_marks_say_what_was_run():
    record = run_record()
    figure = plotting.four_panel(record)
    title = figure.get_suptitle()
    for part in ("width 3", "η = 0.1", "n = 4", "s = 4", "p = 9"):
        assert part in title
    # L - L_T >= L / 2 while e^(-t/100) >= 0.05 + 2 e^(-4): t <= 244.
    labels = [text.get_text() for text in panels(figure)["b"].get_legend().get_texts()]
    assert labels == ["stable regime, epochs 0 to 244", "the proxy for L* decides the PL ratio"]


def test_no_text_overlaps_and_none_leaves_the_figure():
    figure = plotting.four_panel(run_record())
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    page = figure.bbox
    boxes = []
    for axes in figure.axes:
        # Matplotlib keeps labels for ticks beyond the limits, which it does not draw.
        ticks = []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        texts = [axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title, *ticks]
        visible = [text for text in texts if text.get_text() and text.get_visible()]
        boxes += [(text.get_text(), text.get_window_extent(renderer)) for text in visible]
        if axes.get_legend() is not None:
            boxes.append(("legend", axes.get_legend().get_window_extent(renderer)))
    for name, box in boxes:
        assert box.x0 >= page.x0 - 1, name
        assert box.x1 <= page.x1 + 1, name
        assert box.y0 >= page.y0 - 1, name
        assert box.y1 <= page.y1 + 1, name
    labels = [(name, box) for name, box in boxes if name != "legend"]
    for i, (first, a) in enumerate(labels):
        for second, b in labels[i + 1 :]:
            # Labels may touch, by two pixels, but not cover each other.
            width = min(a.x1, b.x1) - max(a.x0, b.x0)
            height = min(a.y1, b.y1) - max(a.y0, b.y0)
            assert width <= 2 or height <= 2, f"{first!r} covers {second!r}"


@pytest.mark.parametrize("kind", ["diverged", "negative", "short", "no subset", "bounds"])
def test_unusual_runs_are_drawn(kind, tmp_path):
    record = run_record()
    if kind == "diverged":
        for name in ("loss", "grad_sq_norm", "drift"):
            record.arrays[name][70:] = np.nan
        record.arrays["ntk_min_eig"][2:] = np.nan
    elif kind == "negative":
        record.arrays["ntk_min_eig"][:] = -1e-3
    elif kind == "short":
        record = make(2, 2)
    elif kind == "no subset":
        record = run_record(ntk_min_eig_subset=None, subset_ids=None)
    else:
        record = run_record(
            ntk_min_eig_lower=record["ntk_min_eig"] * 0.9, ntk_min_eig_upper=record["ntk_min_eig"] * 1.1
        )
    figure = plotting.four_panel(record)
    for path in plotting.save(figure, tmp_path / "figure.png"):
        assert path.stat().st_size > 5000
    if kind == "diverged":
        assert "diverged at epoch 70" in figure.get_suptitle()


def test_same_record_same_bytes(tmp_path):
    first, second = (
        plotting.save(plotting.four_panel(run_record()), tmp_path / name / "figure.png") for name in ("one", "two")
    )
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert first[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert first[1].read_bytes()[:5] == b"%PDF-"


def test_a_figure_needs_no_model_no_jax_and_no_backend(tmp_path):
    """In a fresh process, whatever backend and style the user has: the bytes are those of this one."""
    path = run_record().save(tmp_path / "record.npz")
    (tmp_path / "matplotlibrc").write_text("backend: svg\naxes.facecolor: red\nfont.size: 30\n")
    code = (
        "import os, sys; from lplr_jax import plotting, records\n"
        f"plotting.save(plotting.plot(records.load({str(path)!r})), {str(tmp_path / 'f.png')!r})\n"
        "assert not {'jax', 'flax', 'xarray', 'neural_tangents', 'mlxtend', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "import matplotlib\n"
        "assert os.environ['MPLBACKEND'] == sys.argv[1]\n"
        "assert matplotlib.get_backend(auto_select=False) == sys.argv[2], matplotlib.get_backend(auto_select=False)\n"
        "assert matplotlib.rcParams['font.size'] == 30\n"
    )
    expected = plotting.save(plotting.four_panel(run_record()), tmp_path / "here.png")[0].read_bytes()
    for named, found in (("nonsense", "svg"), ("pdf", "pdf")):
        settings = {"MPLBACKEND": named, "MATPLOTLIBRC": str(tmp_path), "JAX_PLATFORMS": "no_such_backend"}
        subprocess.run([sys.executable, "-c", code, named, found], check=True, env={**os.environ, **settings})
        assert (tmp_path / "f.png").read_bytes() == expected
        (tmp_path / "f.png").unlink()


def foreign(seed=0, **changes):
    """A run of somebody else's loop: sparse steps, no probes, no step size, a config of its own."""
    steps = np.unique(np.concatenate([np.arange(8), np.geomspace(8, 10**9, 60).astype(np.int64)]))
    loss = np.exp(-2e-9 * steps) + 0.1 + 0.01 * seed
    arrays = {"epoch": steps, "loss": loss, "grad_sq_norm": 0.1 * loss, "drift": np.sqrt(steps)}
    arrays |= {"learning_rate": np.array(np.nan), "probe_epoch": None, "ntk_min_eig": None}
    record = make(steps.size - 1, 3, **{**arrays, **changes})
    return dataclasses.replace(record, experiment="mine", config={"optimizer": "adam"}, provenance={})


def texts(figure):
    """Everything that a figure says, without ticks."""
    found = [figure.get_suptitle()]
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
        found += [text.get_text() for text in axes.texts]
        if axes.get_legend():
            found += [text.get_text() for text in axes.get_legend().get_texts()]
    return found


def letters(figure):
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left").startswith("(")]


def test_a_foreign_run_is_titled_by_what_there_is(tmp_path):
    figure = plotting.four_panel(foreign())
    assert figure.get_suptitle() == "mine: n = 4,  s = 4,  p = 9"
    assert letters(figure) == [
        "(a)  drift from the initialisation",
        "(b)  PL ratio for every admissible L*",
        "(c)  loss and its gap to the proxy",
    ]
    said = texts(figure)
    assert not any(word in text.lower() for text in said for word in ("none", "nan", "not recorded", "epoch")), said
    assert [axes.get_xlabel() for axes in figure.axes] == ["step"] * 3
    # The others fill the space: the last one is as wide as both above it.
    figure.canvas.draw()
    boxes = [axes.get_position() for axes in figure.axes]
    assert boxes[2].x1 - boxes[2].x0 > 0.99 * (boxes[1].x1 - boxes[0].x0)
    assert any("stable regime, steps 0 to" in text for text in said)
    plotting.save(figure, tmp_path / "figure")
    named = plotting.four_panel(dataclasses.replace(foreign(learning_rate=np.array(0.5)), loss="huber"))
    assert named.get_suptitle() == "mine: η = 0.5,  n = 4,  s = 4,  p = 9,  huber loss"


NAN = np.nan


@pytest.mark.parametrize(
    ("lost", "shown"),
    [
        (("grad_sq_norm",), ["drift", "loss"]),
        (("drift",), ["PL ratio", "loss"]),
        (("grad_sq_norm", "drift"), ["loss"]),
    ],
)
def test_a_panel_without_numbers_is_not_drawn(lost, shown):
    record = foreign()
    for name in lost:
        record.arrays[name][:] = NAN
    figure = plotting.four_panel(record)
    assert len(figure.axes) == len(shown)
    for letter, word, axes in zip("abc", shown, figure.axes, strict=False):
        assert axes.get_title(loc="left").startswith(f"({letter})  {word}")


@pytest.mark.parametrize(
    "absent",
    ["probe_epoch", "ntk_min_eig", "ntk_max_eig", "ntk_min_eig_subset", "subset_ids", "ntk_min_eig_lower",
     "ntk_min_eig_upper"],
)  # fmt: skip
def test_any_optional_array_may_be_missing(absent, monkeypatch):
    monkeypatch.setattr(theory, "verify", lambda record: ())  # what claims make of such records is tested there
    bounds = {name: np.full(9, 0.02) for name in ("ntk_min_eig_lower", "ntk_min_eig_upper")}
    record = run_record(**{**bounds, absent: None})
    figure = plotting.four_panel(record)
    assert len(figure.axes) == (3 if absent in ("probe_epoch", "ntk_min_eig") else 4)
    assert "certified interval" not in texts(figure) or absent not in bounds


def test_a_run_too_short_for_rates_has_no_box():
    figure = plotting.four_panel(make(1, 2))
    assert not figure.axes[-1].texts
    assert not any("fits" in text for text in texts(figure))


def test_the_strip_of_verdicts_takes_the_lines_it_needs():
    one = theory.verify(run_record())
    claims = [f"claim_number_{index}" for index in range(16)]
    many = [dataclasses.replace(one[index % len(one)], claim=claim) for index, claim in enumerate(claims)]
    for verdicts, least, most in ((one, 1, 2), (many, 2, 3), (many * 4, 7, 10)):
        with styled():
            figure, panels = grid(4, 11, 9)
            verdict_strip(figure, verdicts)
            figure.canvas.draw()
        (strip,) = [artist for artist in figure.artists if hasattr(artist, "get_child")]
        rows = strip.get_child().get_children()
        assert least <= len(rows) <= most
        renderer = figure.canvas.get_renderer()
        box = strip.get_window_extent(renderer)
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        below = min(axes.get_tightbbox(renderer).y0 for axes in panels)
        assert box.y1 <= below, "the strip does not cover the panels"
        words = [word.get_text() for row in rows for word in row.get_children()]
        assert [word[2:] for word in words[:-1]] == [verdict.claim for verdict in verdicts]


def accurate(record):
    return dataclasses.replace(record, arrays={**record.arrays, "accuracy": np.linspace(0, 1, record["loss"].size)})


def kind(figure):
    """Which figure it is, told by a word that only one of them has."""
    said = " ".join(texts(figure))
    marks = {"admissible L*": "four_panel", "exact training loss": "cifar", "thin line": "ablation",
             "squared gradient norm": "initialisation"}  # fmt: skip
    return [name for mark, name in marks.items() if mark in said]


def test_plot_chooses_by_what_the_records_hold():
    one, two = run_record(), run_record(learning_rate=np.array(0.05))
    assert kind(plotting.plot(one)) == ["four_panel"]
    assert kind(plotting.plot([one])) == ["four_panel"]
    assert kind(plotting.plot(foreign())) == ["four_panel"]
    assert kind(plotting.plot([one, two])) == ["ablation"]
    assert kind(plotting.plot([foreign(), foreign(1)])) == ["ablation"]
    assert kind(plotting.plot([accurate(one), accurate(two)])) == ["cifar"]
    assert kind(plotting.plot(accurate(run_record(kernel_samples=np.array(2))))) == ["cifar"]
    assert kind(plotting.plot(accurate(one))) == ["four_panel"]
    # Accuracies on different steps have no mean.
    assert kind(plotting.plot([accurate(one), accurate(foreign())])) == ["ablation"]
    inits = [dataclasses.replace(one, config={"init": init}) for init in ("he", "smaller", "he")]
    figure = plotting.plot(inits)
    assert kind(figure) == ["initialisation"]
    assert {text.split(":")[0] for text in texts(figure) if ": gap to" in text} == {"he", "smaller", "he (2)"}
    assert kind(plotting.plot({"first": inits[0], "second": inits[1]})) == ["initialisation"]
    # The name of the experiment decides nothing.
    assert kind(plotting.plot(dataclasses.replace(one, experiment="cifar"))) == ["four_panel"]
    for bad in ([], {}):
        with pytest.raises(ValueError, match="there is no record to draw"):
            plotting.plot(bad)


@pytest.mark.parametrize("bad", [None, "record.npz", [None], 3])
def test_plot_refuses_what_is_no_record(bad, without_type_checks):
    with pytest.raises(TypeError, match="record"):
        plotting.plot(bad)


def test_arms_of_no_width_are_told_apart():
    diverged = foreign(1)
    diverged.arrays["loss"][40:] = NAN
    figure = plotting.ablation([foreign(), diverged])
    (legend,) = figure.legends
    at = int(diverged["epoch"][40])
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["mine, run 1: monotone descent", f"mine, run 2: diverged at step {at}"]
    assert letters(figure)[0] == "(a)  drift from the initialisation"


def test_more_than_four_initialisations_are_all_drawn():
    figure = plotting.initialisation({f"init {index}": run_record() for index in range(7)})
    labels = [text for text in texts(figure) if text.endswith("gap to the proxy")]
    assert len(labels) == 7


def test_loss_against_width_is_taken_at_a_step():
    steps = np.array([0, 5, 250, 400])
    arms = []
    for width in (2, 4):
        record = make(3, 2, epoch=steps, loss=np.array([4.0, 2.0, 1.0 / width, 0.1]), probe_epoch=steps[[0, 3]])
        arms.append(dataclasses.replace(record, config={"width": width, "epochs": 400}))
    missing = make(3, 2, epoch=np.array([0, 5, 251, 400]), probe_epoch=np.array([0, 400]))
    figure = plotting.initialisation({"he": arms[0]}, [*arms, dataclasses.replace(missing, config={"width": 8})])
    line = figure.axes[2].lines[0]
    np.testing.assert_array_equal(line.get_xdata(), [2, 4])
    np.testing.assert_array_equal(line.get_ydata(), [0.5, 0.25])


def test_text_from_files_draws_no_mathematics_and_steers_nothing(tmp_path):
    evil = {"data": {"source": "a $\\frac{$ b\n\x1b[2J\u202e" + "x" * 500}}
    record = dataclasses.replace(run_record(), provenance=evil, config={"width": "$w$\0", "depth": 2})
    figure = plotting.four_panel(record)
    title = figure.get_suptitle()
    assert "\x1b" not in title
    assert "\u202e" not in title
    assert r"\$w\$\x00" in title
    assert all(len(line) <= 150 for line in title.split("\n"))
    plotting.save(figure, tmp_path / "figure")


def test_a_fit_that_leaves_the_floats_is_drawn_as_far_as_it_goes():
    """A loss that grew by 10³⁰ in 40 steps, drawn over a run of 2,000: 10¹⁵⁰⁰ at its end, were it to go on."""
    epoch = np.arange(2001)
    loss = np.where(epoch <= 40, 10.0 ** (np.minimum(epoch, 40) * 0.75), np.nan)
    arrays = {"loss_scale": 1.0, "learning_rate": 0.1, "n": 2, "c": 1, "p": 3}
    arrays |= {"epoch": epoch, "loss": loss, "grad_sq_norm": loss, "drift": epoch * 1.0}
    figure = plotting.four_panel(Record("grows", {name: np.asarray(array) for name, array in arrays.items()}, {}))
    assert figure.axes
