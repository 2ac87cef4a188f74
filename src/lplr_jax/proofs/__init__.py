"""Enclosures: the rounding of the kernel, balls around a point, programs that are affine in their parameters."""
