"""What the per-epoch diagnostics cost: an epoch with them against a bare optax epoch, alternating in one process.

Run as `python benchmarks/training.py --width 128`; prints the ratio of medians.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import optax

from lplr_jax import data
from lplr_jax.models import MLP
from lplr_jax.training import Objective, init_state, train_epochs


@partial(jax.jit, static_argnames=("loss", "optimizer", "epochs"), donate_argnames=("params", "opt_state"))
def bare_epochs(params, opt_state, x, y, *, loss, optimizer, epochs):
    """The same epochs with nothing recorded but the loss, as optax's documentation writes them."""

    def body(carry, _):
        params, opt_state = carry
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return jax.lax.scan(body, (params, opt_state), length=epochs)


def seconds(function):
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=50, help="epochs of one compiled chunk")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    digits = data.load("mnist")
    batch = (jnp.asarray(digits.x), jnp.asarray(digits.y))
    model, optimizer = MLP(options.width), optax.sgd(1e-4)
    params = model.init(jax.random.key(0), batch[0][:1])
    objective = Objective(model.apply, "mean")
    settings = {"optimizer": optimizer, "epochs": options.epochs}

    def ours():
        return train_epochs(init_state(params, optimizer), batch, params, objective=objective, **settings)

    def bare():
        state = init_state(params, optimizer)
        return bare_epochs(state.params, state.opt_state, *batch, loss=objective.value, **settings)

    seconds(ours), seconds(bare)  # compile
    pairs = [(seconds(ours), seconds(bare)) for _ in range(options.repeats)]
    ratios = sorted(a / b for a, b in pairs)
    with_diagnostics, without = (statistics.median(column) / options.epochs for column in zip(*pairs, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    print(f"width {options.width}, n = {digits.n}, {options.repeats} alternating chunks of {options.epochs} epochs")
    print(f"ratio with / without diagnostics: {with_diagnostics / without:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
