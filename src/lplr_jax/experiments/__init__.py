"""The experiments of the paper, each a config and a function from it to records; the list of them imports no JAX."""

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lplr_jax.experiments.experiment import Experiment


class Listed(NamedTuple):
    """An experiment by its module, which defines it as EXPERIMENT, and what it is for in one line."""

    module: str
    help: str


REGISTRY = {
    "mnist": Listed(
        "lplr_jax.experiments.mnist",
        "Binary MNIST: train, measure every latent variable, draw the four panels (paper, section 6.1).",
    ),
    "ablation": Listed(
        "lplr_jax.experiments.ablation",
        "Width ablation: one η for all widths, predicted from 2/β, then watched (paper, section 6.2).",
    ),
    "boundary": Listed(
        "lplr_jax.experiments.boundary",
        "Find the largest step size that descends, for every width, and hold it against 2/β.",
    ),
    "width": Listed(
        "lplr_jax.experiments.width",
        "Network width from λ_min(Θ_0): λ_0 against width with its proved interval, and where it stops growing.",
    ),
    "initialisation": Listed(
        "lplr_jax.experiments.initialisation",
        "Initialisations side by side, and the figures of the paper's earlier version.",
    ),
    "cifar": Listed(
        "lplr_jax.experiments.cifar",
        "CIFAR-10, five classes: residual network, SGD, several seeds, and the kernel of a subset (section 6.3).",
    ),
    "transformer": Listed(
        "lplr_jax.experiments.transformer",
        "A causal transformer on text, by SGD and Adam: its kernel on fixed rows, and where the gradient lies in it.",
    ),
    "edge": Listed(
        "lplr_jax.experiments.edge",
        "Edge of stability as published: sharpness rises to 2/η on CIFAR-10 and hovers, critical sharpness beside it.",
    ),
    "steps": Listed(
        "lplr_jax.experiments.steps",
        "Step rules against width: which keep drift, kernel and PL ratio stable without a tuned η.",
    ),
    "noise": Listed(
        "lplr_jax.experiments.noise",
        "Mini-batches of several sizes and seeds: predicted noise ball or its absence, and a test along the runs.",
    ),
}
"""Every experiment by its name; one more is a module and a line here."""


def find(name: str) -> "Experiment":
    """Import an experiment.

    Raises:
        KeyError: for a name that is not in the registry.
    """
    return importlib.import_module(REGISTRY[name].module).EXPERIMENT
