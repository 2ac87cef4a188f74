"""Counts what a certified λ_min of many samples takes, from rates measured on this machine; with --run, does it.

Seconds are those that all cores work, which other load on the machine moves less than the clock's.

    python benchmarks/large.py 12000 30000 60000        operations, bytes and seconds of each
    python benchmarks/large.py 12000 --run              the same, and beside it what it took

The kernel is that of the width-128 softplus network on n digits: those of the package, moved by up to two pixels and
with noise of a hundredth, as there are no more. `storage="packed"`: half a matrix, factorised twice and filled three
times, since the proof forms the kernel once more on the host.
"""

import argparse
import itertools
import os
import resource
import time

import numpy as np
from scipy.linalg.lapack import dpftrf

from lplr_jax import data, diagnostics
from lplr_jax.experiments import mnist
from lplr_jax.ntk import engine, explain
from lplr_jax.ntk.empirical import cast_floating, precision_scope
from lplr_jax.ntk.memory import budget
from lplr_jax.packed import Packed
from lplr_jax.parameters import count_parameters

FACTORISATIONS, FILLINGS = 2, 3
SAMPLE = 3000
"""Rows at which the rates are measured."""


def digits(n: int) -> np.ndarray:
    """Return n images of 784 pixels, each of one digit, one move and noise of its own."""
    images = data.load("mnist").x.reshape(-1, 28, 28)
    rng, moves = np.random.default_rng(0), list(itertools.product(range(-2, 3), repeat=2))
    found = np.empty((n, 784), np.float32)
    for i in range(n):
        down, right = moves[i // len(images) % len(moves)]
        found[i] = np.roll(images[i % len(images)], (down, right), axis=(0, 1)).reshape(-1)
        found[i] += 0.01 * rng.standard_normal(784).astype(np.float32)
    return found


def flops(n: int, problem: mnist.Digits, x: np.ndarray) -> tuple[float, float]:
    """Floating-point operations of one kernel, and of one factorisation, of n samples."""
    few = explain(problem.apply_fn, problem.params, x[:SAMPLE])
    pairs = few.multiply_adds * (n / SAMPLE) ** 2
    sweeps = 3.0 * n * count_parameters(problem.params)
    return 2.0 * (pairs + sweeps), n**3 / 3


def rates(problem: mnist.Digits, x: np.ndarray) -> tuple[float, float]:
    """Operations a second of a kernel and of a factorisation, both at `SAMPLE` rows, the second time that they run."""
    of_kernel, of_factor = flops(SAMPLE, problem, x)
    spent = []
    for _ in range(2):
        with precision_scope("float64"):
            params, few = cast_floating((problem.params, x[:SAMPLE]), "float64")
            began = time.process_time()
            theta = np.asarray(engine.kernel(problem.apply_fn, params, few))
            spent.append([time.process_time() - began])
        half = Packed(SAMPLE)
        half.add(0, 0, theta)
        began = time.process_time()
        _, info = dpftrf(SAMPLE, half.flat, uplo="L", overwrite_a=1)
        spent[-1].append(time.process_time() - began)
        if info:
            raise SystemExit(f"the kernel of {SAMPLE} digits is not positive definite in float64")
    return of_kernel / spent[-1][0], of_factor / spent[-1][1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, nargs="+", help="samples")
    parser.add_argument("--run", action="store_true", help="do it as well: minutes to hours")
    options = parser.parse_args()
    problem = mnist.set_up(mnist.MnistConfig(width=128))
    x = digits(max(*options.n, SAMPLE))
    kernel_rate, factor_rate = rates(problem, x)
    room = budget(None)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}: kernels at {kernel_rate / 1e9:.1f}, factorisations at "
        f"{factor_rate / 1e9:.1f} Gflop/s and core, measured at n = {SAMPLE:,}"
    )
    heads = ("n", "kernels, Tflop", "factorisations, Tflop", "packed, GB", "core s, counted", "core s (on the clock)")
    print(f"| {' | '.join(heads)} | peak above start, GB |")
    print("|---|---|---|---|---|---|---|")
    for n in options.n:
        kernels, factors = (
            count * one for count, one in zip((FILLINGS, FACTORISATIONS), flops(n, problem, x), strict=True)
        )
        counted = kernels / kernel_rate + factors / factor_rate
        cells = [f"{n:,}", f"{kernels / 1e12:.2f}", f"{factors / 1e12:.2f}", f"{4 * n * (n + 1) / 1e9:.2f}"]
        cells += [f"{counted:.0f}", "", ""]
        if options.run:
            before, began = (
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                (time.process_time(), time.perf_counter()),
            )
            found = diagnostics.empirical_ntk_min_eig(
                problem.apply_fn, problem.params, x[:n], storage="packed", memory_budget=min(room, 2**29)
            )
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            core, clock = time.process_time() - began[0], time.perf_counter() - began[1]
            cells[-2:] = [f"{core:.0f} ({clock:.0f})", f"{(peak - before) / 1e9:.2f}"]
            print(f"{found!r}", flush=True)
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
