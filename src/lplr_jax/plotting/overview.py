"""What several runs show together: the paper's condition, what accounts for the decrease, where zero loss is proved."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from lplr_jax import theory
from lplr_jax.plotting.style import styled
from lplr_jax.records import Record
from lplr_jax.theory.claims.floor_pl import window_of
from lplr_jax.theory.claims.interpolation import certificate_of
from lplr_jax.theory.evidence import Evidence

COLUMNS = ("run", "excess", "share_floor", "share_min", "k", "drift", "zero_loss", "refuted")


def collect(records: Iterable[Record]) -> list[dict[str, str]]:
    """Return one row a record, as it is written to the table; empty where the record does not tell."""
    rows = []
    for record in records:
        evidence, verdicts = Evidence(record), theory.verify(record)
        condition, window, found = verdicts["compatibility"], window_of(evidence), certificate_of(evidence)
        shares = ("", "", "")
        if window is not None and verdicts["floor_pl"].met:
            shares = (window.share(), window.share(window.bound_all), window.k)
        name = f"width {record.config.get('width')}, η = {float(record['learning_rate']):g}"
        row = {
            "run": name,
            "excess": condition.measured / condition.bound if condition.bound > 0 else "",
            "share_floor": shares[0],
            "share_min": shares[1],
            "k": shares[2],
            "drift": evidence.radius,
            "zero_loss": found.radius if found is not None and not found.reason else "",
            "refuted": " ".join(v.claim for v in verdicts if v.outcome == "refuted"),
        }
        rows.append({key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in row.items()})
    return rows


def _number(row: Mapping[str, str], name: str) -> float:
    """Return a cell as a number, NaN where it is empty."""
    return float(row[name]) if row[name] else float("nan")


def write(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Write the table."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([row[name] for name in COLUMNS] for row in rows)


def read(path: Path) -> list[dict[str, str]]:
    """Read the table."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def overview(rows: Sequence[Mapping[str, str]]) -> Figure:
    """Return three panels, the runs from top to bottom: condition, share of the decrease, distances."""
    names, at = [row["run"] for row in rows], np.arange(len(rows))
    with styled():
        figure = Figure(figsize=(13, 1.6 + 0.55 * len(rows)), layout="constrained")
        first, second, third = figure.subplots(1, 3, sharey=True)
        first.barh(at, [_number(row, "excess") for row in rows], color="C1", height=0.6)
        first.axvline(1, color="0.2", linestyle="--", linewidth=1)
        first.set_xscale("log")
        first.set_xlabel("$L_\\Theta r / \\lambda_0$: the theorem asks for less than 1")
        first.set_title("the paper's condition is refuted", loc="left")
        wide = [100 * _number(row, "share_floor") for row in rows]
        second.barh(at - 0.16, wide, color="C2", height=0.32, label="PL with a floor, one window, one k (ours)")
        narrow = [100 * _number(row, "share_min") for row in rows]
        second.barh(at + 0.16, narrow, color="C0", height=0.32, label="$\\lambda_{\\min}$")
        for place, row, value in zip(at, rows, wide, strict=True):
            words = f" k = {row['k']}" if np.isfinite(value) else "not in force: the loss rises, or steps too long"
            second.text(value if np.isfinite(value) else 1, place - 0.16, words, va="center", fontsize=8)
        second.set_xlim(0, 100)
        second.set_xlabel("share of the decrease of log L that is accounted for, %")
        second.set_title("what accounts for the decrease", loc="left")
        second.legend(loc="lower right", fontsize=8)
        third.plot([_number(row, "drift") for row in rows], at, "o", color="C0", label="drift of the run")
        reach = [_number(row, "zero_loss") for row in rows]
        third.plot(reach, at, "*", color="C2", markersize=12, label="zero loss proved within (ours)")
        third.set_xlim(left=0)
        third.set_xlabel("distance from the initialisation, in parameters")
        third.set_title("how far, and where L* = 0 is a theorem", loc="left")
        third.legend(loc="lower right", fontsize=8)
        first.set_yticks(at, names)
        first.invert_yaxis()
    return figure
