"""The figure shows what the record holds, from the npz alone."""

import os
import subprocess
import sys

import numpy as np
import pytest

from builders import make
from lplr_jax import plotting

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
    return make(T, probe_epoch.size, **{**arrays, **changes})


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


def test_a_figure_needs_no_model(tmp_path):
    """Redrawing imports no data and no peer, and starts no JAX backend: none of the name exists here."""
    path = run_record().save(tmp_path / "record.npz")
    code = (
        "import sys; from lplr_jax import plotting, records\n"
        f"plotting.save(plotting.four_panel(records.load({str(path)!r})), {str(tmp_path / 'f.png')!r})\n"
        "assert 'neural_tangents' not in sys.modules and 'mlxtend' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "no_such_backend"})
    assert (tmp_path / "f.png").exists()
