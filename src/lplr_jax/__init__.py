"""lplr-jax: which hypotheses of local Polyak-Łojasiewicz theory hold on a training run.

The modules, each importing only from those above it: `checks`, `archives`, `linalg`, `data`, `layouts`, `models`,
`training`, `ntk`, `diagnostics`, `records`, `theory`, `plotting`, `experiments`, `cli`.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lplr-jax")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
