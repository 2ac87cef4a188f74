"""Figures from records. No model, no data: everything can be redrawn from its npz."""

from lplr_jax.plotting.ablation import ablation, initialisation
from lplr_jax.plotting.boundary import boundary
from lplr_jax.plotting.cifar import cifar, scope_note
from lplr_jax.plotting.panels import four_panel
from lplr_jax.plotting.style import save

__all__ = ["ablation", "boundary", "cifar", "four_panel", "initialisation", "save", "scope_note"]
