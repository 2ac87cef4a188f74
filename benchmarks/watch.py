"""What it costs to watch a loop: the default MNIST problem through `lplr_jax.watch` against our own loop.

Ratios of wall time in one process, each after a short run that compiles: loss and gradient handed over, and not. Also
the microseconds of a call where nothing is due.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from lplr_jax import Probes, watch
from lplr_jax.experiments import mnist


def watched(config: mnist.MnistConfig, *, handed: bool) -> None:
    problem, optimizer = mnist.set_up(config), optax.sgd(config.learning_rate)
    resolved, every, beside = mnist.resolve(config)
    gradient = jax.value_and_grad(problem.objective.value)

    @jax.jit
    def step(params: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
        with jax.default_matmul_precision("highest"):
            loss, grads = gradient(params, x, y)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return loss, grads, optax.apply_updates(params, updates)

    probes = Probes(
        every,
        beside=beside,
        hessian=resolved.hessian_probes,
        spectrum=resolved.spectrum_probes,
        search=resolved.search_steps,
    )
    params = problem.params
    with watch(problem, probes=probes) as look:
        for t in range(config.epochs + 1):
            loss, grads, after = step(params, *problem.data)
            look(t, params, **({"loss": loss, "grads": grads} if handed else {}))
            params = after


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def idle_microseconds(calls: int = 20_000) -> float:
    problem = mnist.set_up(dataclasses.replace(mnist.PRESETS["smoke"], width=8, n_train=20))
    look = watch(problem, probes=Probes(at=[0], search=0, hessian=0), every=10**9)
    look(0, problem.params)
    look(1, problem.params)
    return timed(lambda: [look(t, problem.params) for t in range(2, calls + 2)]) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    config = dataclasses.replace(mnist.PRESETS["default"], epochs=arguments.epochs)
    short = dataclasses.replace(config, epochs=40)
    runs = {
        "lplr mnist": mnist.run,
        "watched, handed over": lambda one: watched(one, handed=True),
        "watched, not handed over": lambda one: watched(one, handed=False),
    }
    for run in runs.values():
        run(short)
    spent = {name: [timed(lambda run=run: run(config)) for _ in range(arguments.rounds)] for name, run in runs.items()}
    own = float(np.median(spent["lplr mnist"]))
    for name, seconds in spent.items():
        print(f"{name:26} {np.median(seconds):7.1f} s   {np.median(seconds) / own:.2f} times our own loop")
    print(f"a call where nothing is due: {idle_microseconds():.1f} microseconds")


if __name__ == "__main__":
    main()
