"""Table 1 of the width ablation, from arms and their records (paper, section 6.2)."""

import math
from collections.abc import Sequence

import numpy as np

from lplr_jax.curves.stability import observe
from lplr_jax.curves.summary import summarise
from lplr_jax.experiments.step_size import Arm, judged
from lplr_jax.records import Record
from lplr_jax.reports.tables import Cell, Quantity, Table, last_finite, mean_of

PAPER_DRIFT = {"common": 1.870, "smaller": 0.158}
"""Final drift of the paper's two arms of width 1024 (Table 1); its η, epochs and scalings are not known to us."""

QUANTITIES = (
    Quantity("learning_rate", "η (calibrated)", r"$\eta$ (calibrated)", "step size"),
    Quantity("p", "p", "$p$", "parameters"),
    Quantity("lambda_0", "λ_0", r"$\lambda_0$", "λ_min of the full kernel at epoch 0, output²/parameter²"),
    Quantity("lambda_t", "λ_T", r"$\lambda_T$", "the same at the last probe of the run"),
    Quantity("lambda_t_lower", "λ_T ≥ (proved)", r"$\lambda_T \geq$ (proved)", "proved lower bound of λ_T"),
    Quantity(
        "ntk_drift_subset",
        "NTK drift, subset",
        r"$|\lambda_T-\lambda_0|/\lambda_0$, subset",
        "|λ_T - λ_0|/λ_0 on the random subset, as in the paper",
    ),
    Quantity("ntk_drift", "NTK drift, all", r"$|\lambda_T-\lambda_0|/\lambda_0$", "the same on the full kernel"),
    Quantity("loss_t", "L_T", "$L_T$", "last training loss, units of L with scale s"),
    Quantity("drift_t", "drift, final", r"$\|\theta_T-\theta_0\|$", "‖θ_T - θ_0‖₂"),
    Quantity("drift_max", "drift, largest", r"$\max_t\|\theta_t-\theta_0\|$", "largest ‖θ_t - θ_0‖₂"),
    Quantity("drift_paper", "drift, final, paper", r"$\|\theta_T-\theta_0\|$, paper", "Table 1; another set-up"),
    Quantity("pl_zero", "least PL ratio, L* = 0", r"least PL ratio, $L^*=0$", "over the stable regime, units of L"),
    Quantity("pl_proxy", "least PL ratio, proxy", "least PL ratio, proxy", "the same with L* = least recorded loss"),
    Quantity(
        "pl_excess",
        "PL ratio / (λ_min/s)",
        r"PL ratio$/(\lambda_{\min}/s)$",
        "least PL ratio with L* = 0 over the least λ_min/s in the regime: how loose the kernel's guarantee is",
    ),
    Quantity("factor_zero", "factor/epoch, L* = 0", r"factor/epoch, $L^*=0$", "contraction, middle half of the run"),
    Quantity("factor_proxy", "factor/epoch, proxy", "factor/epoch, proxy", "the same for the gap to the proxy"),
    Quantity("law_zero", "law of L", "law of $L$", "which law fits L better over the middle half"),
    Quantity("law_proxy", "law of the gap", "law of the gap", "the same for the gap to the proxy"),
    Quantity("boundary", "2/β at θ_0", r"$2/\beta$ at $\theta_0$", "β = λ_max(∇²L(θ_0)), float32 products"),
    Quantity("eta_beta", "η β at θ_0", r"$\eta\beta$ at $\theta_0$", "descent lemma: at most 1; boundary: 2"),
    Quantity("eta_beta_t", "η β at θ_T", r"$\eta\beta$ at $\theta_T$", "the same at the last probe"),
    Quantity("predicted", "predicted", "predicted", "before the first step, from η β at θ_0"),
    Quantity("observed", "observed", "observed", "by the rule of diagnostics.observe on loss and drift"),
    Quantity("diverged", "diverged", "diverged", "epoch from which loss, gradient or parameters are not finite"),
    Quantity("verdict", "prediction", "prediction", "whether the observed outcome was among the predicted ones"),
)


def row(arm: Arm, record: Record) -> dict[str, float | int | str]:
    """Return every quantity of one arm, by the keys of `QUANTITIES`."""
    summary, s = summarise(record), float(record["loss_scale"])
    eigs, subset = record["ntk_min_eig"], record["ntk_min_eig_subset"]
    inside = (record["probe_epoch"] >= summary.regime.start) & (record["probe_epoch"] < summary.regime.stop)
    guaranteed = eigs[inside & np.isfinite(eigs)].min(initial=math.inf) / s
    eta, sharpness = float(record["learning_rate"]), record["sharpness"]
    seen = observe(record["loss"], record["drift"])
    predicted, verdict = judged(record, seen.outcome)
    return {
        "learning_rate": eta,
        "p": int(record["p"]),
        "lambda_0": float(eigs[0]),
        "lambda_t": last_finite(eigs),
        "lambda_t_lower": last_finite(record["ntk_min_eig_lower"]),
        "ntk_drift_subset": abs(last_finite(subset) - subset[0]) / abs(subset[0]),
        "ntk_drift": abs(last_finite(eigs) - eigs[0]) / abs(eigs[0]),
        "loss_t": last_finite(record["loss"]) if record.diverged_at is None else math.inf,
        "drift_t": last_finite(record["drift"]) if record.diverged_at is None else math.inf,
        "drift_max": float(np.nanmax(record["drift"])) if record.diverged_at is None else math.inf,
        "drift_paper": PAPER_DRIFT[arm.kind] if arm.config.width == 1024 else math.nan,
        "pl_zero": summary.envelope[0],
        "pl_proxy": summary.envelope[1],
        "pl_excess": summary.envelope[0] / guaranteed if 0 < guaranteed < math.inf else math.nan,
        "factor_zero": summary.middle_rate.zero.factor,
        "factor_proxy": summary.middle_rate.proxy.factor,
        "law_zero": summary.middle_rate.zero.law,
        "law_proxy": summary.middle_rate.proxy.law,
        "boundary": 2 / float(sharpness[0]),
        "eta_beta": eta * float(sharpness[0]),
        "eta_beta_t": eta * last_finite(sharpness),
        "predicted": predicted,
        "observed": seen.outcome,
        "diverged": "no" if record.diverged_at is None else f"at epoch {record.diverged_at}",
        "verdict": verdict,
    }


def _cell(values: Sequence[float | int | str]) -> Cell:
    first = values[0]
    if isinstance(first, str):
        counts = {value: values.count(value) for value in dict.fromkeys(values)}
        return first if len(counts) == 1 else ", ".join(f"{count} {value}" for value, count in counts.items())
    if isinstance(first, int):
        return first
    # η is the same for all seeds by construction, and has no deviation.
    return mean_of([float(value) for value in (dict.fromkeys(values) if len(set(values)) == 1 else values)])


def table(done: Sequence[tuple[Arm, Record]]) -> Table:
    """Return Table 1: one column for each width and step size, mean ± deviation over seeds."""
    groups: dict[tuple[int, str], list[dict[str, float | int | str]]] = {}
    for arm, record in done:
        groups.setdefault((arm.config.width, arm.kind), []).append(row(arm, record))
    rows = [one for group in groups.values() for one in group]
    hits, misses = (sum(one["verdict"] == word for one in rows) for word in ("hit", "miss"))
    seeds = len(next(iter(groups.values())))
    quantities = QUANTITIES
    if not any(width == 1024 for width, _ in groups):
        quantities = tuple(quantity for quantity in QUANTITIES if quantity.key != "drift_paper")
    notes = [
        f"Predictions: {hits} of {len(rows)} hit, {misses} missed. "
        + ("One seed." if seeds == 1 else f"Mean ± standard deviation over {seeds} seeds."),
        "Units: s = n unless --loss-scale sum; PL ratios in units of L, kernels in output²/parameter².",
    ]
    if quantities is QUANTITIES:
        notes.append("The paper's drifts are of another set-up: its η, epochs and scalings are not known to us.")
    return Table(
        "Width ablation: full-batch gradient descent on digits 3 and 8",
        tuple(f"m = {width}" + (", smaller η" if kind == "smaller" else "") for width, kind in groups),
        quantities,
        {
            quantity.key: [_cell([one[quantity.key] for one in group]) for group in groups.values()]
            for quantity in quantities
        },
        tuple(notes),
    )
