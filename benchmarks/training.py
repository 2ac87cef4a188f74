"""What an epoch costs: ours with every diagnostic, a bare optax loop, a PyTorch loop, and the matrix products alone.

Run as `python benchmarks/training.py --widths 128,256,512,1024`. All take turns in one process, so that a busy machine
slows them alike; times are medians. PyTorch takes part where it is installed, with its own products beside XLA's: the
two libraries multiply at different speeds, and the floor of each is its own.
"""

import argparse
import importlib.util
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lplr_jax import data
from lplr_jax.losses import Objective
from lplr_jax.models import MLP
from lplr_jax.training import init_state, train_epochs


@partial(jax.jit, static_argnames=("loss", "optimizer", "epochs"), donate_argnames=("params", "opt_state"))
def bare_epochs(params, opt_state, x, y, *, loss, optimizer, epochs):
    """The same epochs with nothing recorded but the loss, as optax's documentation writes them."""

    def body(carry, _):
        params, opt_state = carry
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return jax.lax.scan(body, (params, opt_state), length=epochs)


def products(weights, inputs, cotangents):
    """The products of one forward and backward pass, no gradient to the first layer's input among them."""
    forward = [h @ w for h, w in zip(inputs, weights, strict=True)]
    gradients = [h.T @ d for h, d in zip(inputs, cotangents, strict=True)]
    backward = [d @ w.T for d, w in zip(cotangents[1:], weights[1:], strict=True)]
    return forward, gradients, backward


def operands(params, x):
    """Weights, inputs and cotangents of the right shapes, as NumPy arrays."""
    weights = [np.asarray(leaf["kernel"]) for leaf in params["params"].values()]
    rng = np.random.default_rng(0)
    inputs = [np.asarray(x), *(rng.normal(size=(x.shape[0], w.shape[0])).astype(x.dtype) for w in weights[1:])]
    cotangents = [rng.normal(size=(x.shape[0], w.shape[1])).astype(x.dtype) for w in weights]
    return weights, inputs, cotangents


def floor(params, x, epochs):
    """A function that does XLA's products of so many epochs."""
    given, compiled = jax.tree.map(jnp.asarray, operands(params, x)), jax.jit(products)

    def run():
        for _ in range(epochs):
            out = jax.block_until_ready(compiled(*given))
        return out

    return run


def torch_floor(params, x, epochs):
    """A function that does PyTorch's products of so many epochs."""
    import torch

    given = jax.tree.map(lambda array: torch.from_numpy(np.array(array)), operands(params, x))

    def run():
        for _ in range(epochs):
            products(*given)

    return run


def torch_epochs(params, x, y, epochs, rate):
    """The same network, loss and steps in PyTorch on the CPU; returns a function that runs so many epochs."""
    import torch

    leaves = list(params["params"].values())
    layers = []
    for index, leaf in enumerate(leaves):
        layer = torch.nn.Linear(*leaf["kernel"].shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.array(leaf["kernel"]).T.copy()))
            layer.bias.copy_(torch.from_numpy(np.array(leaf["bias"])))
        layers += [layer] if index == len(leaves) - 1 else [layer, torch.nn.Softplus()]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    inputs, targets = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y))

    def run():
        for _ in range(epochs):
            optimizer.zero_grad()
            loss = 0.5 * torch.mean((model(inputs) - targets) ** 2)
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    return run


def seconds(function):
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def measure(width, epochs, repeats):
    """Seconds an epoch of every turn, by method."""
    digits = data.load("mnist")
    batch = (jnp.asarray(digits.x), jnp.asarray(digits.y))
    rate = 1e-4
    model, optimizer = MLP(width), optax.sgd(rate)
    params = model.init(jax.random.key(0), batch[0][:1])
    objective = Objective(model.apply, "mean")
    settings = {"optimizer": optimizer, "epochs": epochs}

    def ours():
        return train_epochs(init_state(params, optimizer), batch, params, objective=objective, **settings)

    def bare():
        state = init_state(params, optimizer)
        return bare_epochs(state.params, state.opt_state, *batch, loss=objective.value, **settings)

    methods = {"ours": ours, "bare optax": bare, "products alone": floor(params, batch[0], epochs)}
    if importlib.util.find_spec("torch"):
        methods["PyTorch"] = torch_epochs(params, *batch, epochs, rate)
        methods["PyTorch's products"] = torch_floor(params, batch[0], epochs)
        # The same numbers, or the comparison means nothing.
        expected = float(ours()[1].loss[-1])
        found = torch_epochs(params, *batch, epochs, rate)()
        assert abs(found - expected) <= 1e-4 * expected, (found, expected)
    for method in methods.values():
        seconds(method)  # compile
    times = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            times[name].append(seconds(method) / epochs)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="128,256,512,1024", help="with commas")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of one turn")
    parser.add_argument("--repeats", type=int, default=9, help="turns of every method")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.repeats} turns of {options.epochs} epochs")
    columns = ("ours", "bare optax", "products alone", "PyTorch", "PyTorch's products")
    head = ["width", *(f"{name}, ms" for name in columns)]
    head += ["ours / products (quartiles)", "ours / bare", "PyTorch / ours"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for width in map(int, options.widths.split(",")):
        times = measure(width, options.epochs, options.repeats)
        median = {name: statistics.median(values) for name, values in times.items()}
        # Each turn is compared with the one beside it: a machine that slows down slows both.
        ratios = sorted(a / b for a, b in zip(times["ours"], times["products alone"], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        cells = [f"{1000 * median[name]:.1f}" if name in median else "-" for name in columns]
        torch_ratio = f"{median['PyTorch'] / median['ours']:.2f}" if "PyTorch" in median else "-"
        cells += [f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})"]
        cells += [f"{median['ours'] / median['bare optax']:.3f}", torch_ratio]
        print(f"| {width} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
