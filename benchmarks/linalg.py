"""Cost of a certified λ_min at scale, in units of one Cholesky factorisation timed in the same process.

Usage: python benchmarks/linalg.py [n] [--eigvalsh]
"""

import argparse
import resource
import time

import numpy as np
from scipy.linalg import eigvalsh
from scipy.linalg.lapack import dpotrf

from lplr_jax.linalg import min_eig


def kernel_like(n: int, *, dimension: int = 784, seed: int = 0) -> np.ndarray:
    """Return a positive matrix of condition about 1e7 and the size of a kernel: a Gram matrix with a nugget."""
    x = np.random.default_rng(seed).random((n, dimension))
    matrix = x @ x.T
    matrix[np.arange(n), np.arange(n)] += 1e-7 * n * dimension / 4
    return matrix


def seconds(function, *args):
    """Return wall and processor seconds, of which the second bears other load on the machine better, and the result."""
    wall, processor = time.perf_counter(), time.process_time()
    result = function(*args)
    return np.array([time.perf_counter() - wall, time.process_time() - processor]), result


def ratio(elapsed: np.ndarray, unit: np.ndarray) -> str:
    wall, processor = elapsed / unit
    return f"{wall:.2f} (processor time {processor:.2f})"


def cholesky(matrix: np.ndarray) -> None:
    _, info = dpotrf(np.array(matrix.T, order="F"), lower=1, clean=0, overwrite_a=1)
    if info:
        raise SystemExit(f"the benchmark matrix is not positive definite (info {info})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", nargs="?", type=int, default=11_982)
    parser.add_argument(
        "--eigvalsh", action="store_true", help="time the dense eigensolver too (minutes at the default n)"
    )
    options = parser.parse_args()
    matrix = kernel_like(options.n)
    cholesky(matrix[:500, :500])
    before, _ = seconds(cholesky, matrix)
    elapsed, result = seconds(min_eig, matrix)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    after, _ = seconds(cholesky, matrix)
    unit = np.minimum(before, after)
    print(f"n = {options.n}: one Cholesky {unit[0]:.2f} s (processor {unit[1]:.2f} s), the lesser of before and after")
    print(f"min_eig with proof: {elapsed[0]:.2f} s, ratio {ratio(elapsed, unit)}")
    print(f"λ_min = {result.value:.9g}, in [{result.lower:.9g}, {result.upper:.9g}], proved: {result.proved}")
    print(f"peak memory of the process: {peak / matrix.nbytes:.2f} matrices of {matrix.nbytes / 1e9:.2f} GB")
    if options.eigvalsh:
        dense, values = seconds(eigvalsh, matrix)
        print(f"eigvalsh: {dense[0]:.2f} s, ratio {ratio(dense, unit)}; λ_min = {values[0]:.9g}")


if __name__ == "__main__":
    main()
