"""Figures from records. No model, no data, no JAX: everything can be redrawn from its npz."""

from lplr_jax.plotting import backend  # before anything that imports matplotlib

backend.import_matplotlib()

from lplr_jax.plotting.ablation import ablation, initialisation  # noqa: E402
from lplr_jax.plotting.boundary import boundary  # noqa: E402
from lplr_jax.plotting.choice import plot  # noqa: E402
from lplr_jax.plotting.cifar import cifar, scope_note  # noqa: E402
from lplr_jax.plotting.edge import edge  # noqa: E402
from lplr_jax.plotting.growing import Growing, growing  # noqa: E402
from lplr_jax.plotting.losses import losses  # noqa: E402
from lplr_jax.plotting.overview import overview  # noqa: E402
from lplr_jax.plotting.panels import four_panel  # noqa: E402
from lplr_jax.plotting.spectral import spectral  # noqa: E402
from lplr_jax.plotting.style import save  # noqa: E402
from lplr_jax.plotting.width import against_width  # noqa: E402

__all__ = [
    "Growing",
    "ablation",
    "against_width",
    "boundary",
    "cifar",
    "edge",
    "four_panel",
    "growing",
    "initialisation",
    "losses",
    "overview",
    "plot",
    "save",
    "scope_note",
    "spectral",
]
