"""What a record says in a few labelled rows, for the screen and for the page: plain text, not yet escaped."""

from collections.abc import Iterator, Mapping

import numpy as np

from lplr_jax.curves.rate import Decay, RateReport
from lplr_jax.curves.rivals import rivals
from lplr_jax.curves.summary import Summary, step_word, summarise
from lplr_jax.records import Record

Row = tuple[str, str, str]


def summary_rows(record: Record) -> Iterator[Row]:
    """Yield quantity, value and what it says, with units; what the record lacks is left out."""
    word = step_word(record)
    if record.diverged_at is not None:
        words = "loss, gradient or parameters are not finite from there on"
        yield "diverged", f"at {word} {record.diverged_at}", words
    untrusted = record.provenance.get("untrusted")
    for where, reason in untrusted.items() if isinstance(untrusted, Mapping) else ():
        place = f"{word} {where}" if str(where).isdecimal() else str(where)
        yield "untrusted", place, f"left out: {reason}"
    if not np.isfinite(record["loss"]).any():
        return
    summary = summarise(record)
    yield from _kernel_rows(record, word)
    yield from _curvature_rows(record, word)
    yield from _series_rows(record, word)
    yield from _regime_rows(record, summary, word)
    yield from _rate_rows("stable regime", summary.regime_rate, word)
    yield from _rate_rows("middle half", summary.middle_rate, word)


def rival_rows(record: Record) -> Iterator[tuple[str, ...]]:
    """Yield quantity, first, last, least and largest value over the probes, and what other accounts make of it."""
    for rival in rivals(record) if np.isfinite(record["loss"]).any() else ():
        yield (rival.name, *(f"{value:.4g}" for value in rival[2:]), rival.says)


def _series_rows(record: Record, word: str) -> Iterator[Row]:
    epoch, loss, drift = record["epoch"], record["loss"], record["drift"]
    moved = np.flatnonzero(np.isfinite(drift))
    if moved.size:
        largest = f"largest {drift[moved].max():.4g}, in units of the parameters"
        yield "drift ‖θ_T - θ_0‖", f"{drift[moved[-1]]:.4g}", largest
    known = np.flatnonzero(np.isfinite(loss))
    first = f"L_{epoch[known[0]]} = {loss[known[0]]:.5g}"
    of = "" if record.loss == "squared" else f", {record.loss} loss"
    yield (
        "L_T",
        f"{loss[known[-1]]:.5g}",
        f"{word} {epoch[known[-1]]}; {first}, s = {float(record['loss_scale']):g}{of}",
    )
    yield from _accuracy_rows(record, word)


def _accuracy_rows(record: Record, word: str) -> Iterator[Row]:
    if "probe_accuracy" not in record or "probe_epoch" not in record:
        return
    share, epochs = record["probe_accuracy"], record["probe_epoch"]
    order = np.argsort(epochs, kind="stable")
    order = order[np.isfinite(share[order])]
    if order.size:
        count = int(record["kernel_samples"] if "kernel_samples" in record else record["n"])
        first = f"{share[order[0]]:.4g} at {word} {epochs[order[0]]}"
        yield "accuracy", f"{share[order[-1]]:.4g}", f"{word} {epochs[order[-1]]}; {first}; of {count} training samples"


def _regime_rows(record: Record, summary: Summary, word: str) -> Iterator[Row]:
    if not summary.regime.stop:
        yield "stable regime", "none", f"no {word}s past the transient are clear of the proxy for L*"
        return
    start, end = summary.steps(summary.regime)
    yield "stable regime", f"{word}s {start} to {end}", "past the transient, before the proxy decides the PL ratio"
    low, high = summary.envelope
    if not np.isfinite(low):
        return
    yield "PL envelope", f"{low:.4g} (L* = 0)", f"{high:.4g} with the proxy L* = {summary.floor:.4g}; units of L"
    if "ntk_min_eig" in record and "probe_epoch" in record:
        inside = (record["probe_epoch"] >= start) & (record["probe_epoch"] <= end)
        pointwise = record["ntk_min_eig"][inside] / float(record["loss_scale"])
        pointwise = pointwise[np.isfinite(pointwise)]
        if pointwise.size and pointwise.min() > 0:
            factor = low / pointwise.min()
            words = "how far the guaranteed PL constant lies below the measured one"
            yield "envelope / (λ_min/s)", f"{factor:.3g}", words


def _kernel_rows(record: Record, word: str) -> Iterator[Row]:
    if "ntk_min_eig" not in record or "probe_epoch" not in record:
        return
    min_eig, epochs = record["ntk_min_eig"], record["probe_epoch"]
    measured = np.flatnonzero(np.isfinite(min_eig))
    if not measured.size:
        return
    measured = measured[np.argsort(epochs[measured])]
    end, least = measured[-1], measured[np.argmin(min_eig[measured])]
    (start,) = np.flatnonzero(epochs == 0) if (epochs == 0).any() else (None,)
    # Θ_0 may be missing, or could not be trusted: then there is nothing to compare the others with.
    begins = start is not None and np.isfinite(min_eig[start])
    if begins:
        words = f"λ_min of the full kernel at {word} 0"
        if "ntk_max_eig" in record:
            words += f"; λ_max / λ_min = {record['ntk_max_eig'][start] / min_eig[start]:.2g}"
        yield "λ_0", f"{min_eig[start]:.4g}", words
    words = f"{word} {epochs[end]}; least at any probe {min_eig[least]:.4g} ({word} {epochs[least]})"
    yield "λ_T", f"{min_eig[end]:.4g}", words
    if not begins:
        return
    if "ntk_min_eig_subset" in record:
        subset, flattery = record["ntk_min_eig_subset"], "above the full one"
        if min_eig[start] > 0:
            flattery = f"{subset[start] / min_eig[start]:.3g} times the full one at {word} 0"
        size = f"{record['subset_ids'].size} samples, " if "subset_ids" in record else ""
        yield "λ_min, subset", f"{subset[start]:.4g}, {subset[end]:.4g}", f"{size}both ends; {flattery}"
    if "ntk_shift" in record and np.isfinite(record["ntk_shift"][end]):
        shift = record["ntk_shift"][end]
        share = shift / abs(min_eig[start]) if min_eig[start] else np.inf
        yield "‖Θ_T - Θ_0‖₂", f"{shift:.3g}", f"{share:.2g} times |λ_0|: L_Θ r(R) is at least this"


def _curvature_rows(record: Record, word: str) -> Iterator[Row]:
    epochs = record.arrays.get("probe_epoch")
    if epochs is None:
        return
    curvatures = (
        ("sharpness", _sharpness_rows),
        ("critical_step", _critical_rows),
        ("curvature_min", _least_curvature_rows),
    )
    for name, rows in curvatures:
        values = record.arrays.get(name, np.full(epochs.size, np.nan))
        measured = np.flatnonzero(np.isfinite(values))
        if measured.size:
            measured = measured[np.argsort(epochs[measured])]
            yield from rows(record, word, values[measured], epochs[measured])


def _sharpness_rows(record: Record, word: str, sharpness: np.ndarray, epochs: np.ndarray) -> Iterator[Row]:
    eta, top = float(record["learning_rate"]), int(np.argmax(sharpness))
    if sharpness[0] > 0:
        largest = f"largest measured β = {sharpness[top]:.4g} ({word} {epochs[top]})"
        yield "2/β", f"{2 / sharpness[0]:.4g}", f"β = λ_max(∇²L) at {word} {epochs[0]}; {largest}; units of η"
    if np.isfinite(eta):
        ends = f"{eta * sharpness[0]:.3g}, {eta * sharpness[-1]:.3g}"
        yield "η β", ends, "both ends; the descent lemma wants at most 1"


def _critical_rows(record: Record, word: str, steps: np.ndarray, epochs: np.ndarray) -> Iterator[Row]:
    eta = float(record["learning_rate"])
    beside = f", against 2/η = {2 / eta:.4g}" if np.isfinite(eta) else ""
    words = f"{word}s {epochs[0]} and {epochs[-1]}{beside}; η_c = {steps[0]:.4g} at first, by forward passes"
    yield "critical sharpness 2/η_c", f"{2 / steps[0]:.4g}, {2 / steps[-1]:.4g}", words


def _least_curvature_rows(record: Record, word: str, curvature: np.ndarray, epochs: np.ndarray) -> Iterator[Row]:
    bottom = int(np.argmin(curvature))
    yield (
        "least curvature",
        f"{curvature[bottom]:.4g}",
        f"λ_min(∇²L), least at any probe ({word} {epochs[bottom]})",
    )


def _rate_rows(name: str, report: RateReport, word: str) -> Iterator[Row]:
    if report.zero.epochs == 0:
        return
    yield f"{name}, L* = 0", *_decay_cells(report.zero, word)
    if report.proxy.epochs:
        yield f"{name}, proxy", *_decay_cells(report.proxy, word)
    cuts = ", ".join(f"{decay.factor:.6f} (T = {cut})" for cut, decay in report.refits if decay.epochs)
    words = {
        True: f"set by the proxy: rates differ by {report.spread:.0%}",
        False: f"rates differ by {report.spread:.0%}",
        None: "a rate is missing",
    }
    yield f"{name}, cut earlier", cuts or "none", words[report.set_by_proxy]


def _decay_cells(decay: Decay, word: str) -> tuple[str, str]:
    low, high = decay.local_factors
    better = {"undecided": "exponential and power law fit alike"}.get(decay.law, f"{decay.law} fits better")
    return (
        f"{decay.factor:.6f} per {word}",
        f"{better} (R² {decay.exponential_r2:.3f} against {decay.power_r2:.3f}); local factors {low:.5f} to {high:.5f}",
    )
