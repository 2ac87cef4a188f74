"""The empirical neural tangent kernel of any pure function."""

from lplr_jax.ntk.empirical import KERNELS, empirical_ntk, explain, precision_scope

__all__ = ["KERNELS", "empirical_ntk", "explain", "precision_scope"]
