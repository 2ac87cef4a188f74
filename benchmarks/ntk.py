"""Times the kernel engine against neural-tangents, a plain Jacobian and the floor of any structured method.

    python benchmarks/ntk.py                 every case, a table on the screen and in benchmarks/results/ntk.{md,json}
    python benchmarks/ntk.py --quick         the smallest case of each kind
    python benchmarks/ntk.py mlp-1000-512    cases whose name contains the text

Each case runs in a process of its own, all methods in turn in that process: warm-up first, then rounds in which every
method runs once, after a call that is not timed where that takes less than a second; the median is reported. There are
5 rounds, 25 for methods that take less than 0.2 s, and one for those that take longer than 3 s, which the table marks.
A method whose arrays would not fit in memory is left out. The floor is the matrix products that any structured method
must do: forward and backward sweeps, and half of each Gram product, since Θ is symmetric.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import networks
import sequences
from lplr_jax.ntk import engine, neural_tangents

RESULTS = Path(__file__).parent / "results"
ROUNDS, MANY = 5, 25
QUICK, SETTLING, SLOW = 0.2, 1.0, 3.0
MEMORY = 6e9  # bytes that a method may need before it is left out
PEERS = ("structured", "jacobian", "ntvp", "auto")


class CNN(nn.Module):
    """Three 3x3 convolutions with stride, and a dense layer."""

    width: int = 32
    outputs: int = 5

    @nn.compact
    def __call__(self, x):  # noqa: D102
        for factor, stride in ((1, 1), (2, 2), (4, 2)):
            x = nn.relu(nn.Conv(self.width * factor, (3, 3), (stride, stride))(x))
        return nn.Dense(self.outputs)(x.mean(axis=(1, 2)))


class ResNet(nn.Module):
    """Three stages of two residual blocks with GroupNorm, of width w, 2w, 4w."""

    width: int = 16
    outputs: int = 5

    @nn.compact
    def __call__(self, x):  # noqa: D102
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        for stage in range(3):
            for block in range(2):
                features = self.width * 2**stage
                stride = 2 if stage and not block else 1
                y = nn.relu(nn.GroupNorm(8)(x))
                skip = nn.Conv(features, (1, 1), (stride, stride), use_bias=False)(y) if stride > 1 else x
                y = nn.Conv(features, (3, 3), (stride, stride), use_bias=False)(y)
                y = nn.Conv(features, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(8)(y)))
                x = skip + y
        return nn.Dense(self.outputs)(nn.relu(nn.GroupNorm(8)(x)).mean(axis=(1, 2)))


def mlp(params: Any, x: jax.Array) -> jax.Array:
    """Softplus network from a list of (weight, bias)."""
    for weight, bias in params[:-1]:
        x = jax.nn.softplus(x @ weight + bias)
    return x @ params[-1][0] + params[-1][1]


def mlp_params(sizes: list[int], dtype: Any) -> list[tuple[jax.Array, jax.Array]]:
    rng = np.random.default_rng(0)
    return [
        (jnp.asarray(rng.normal(size=(a, b)) * np.sqrt(2 / a), dtype), jnp.zeros((b,), dtype))
        for a, b in itertools.pairwise(sizes)
    ]


def images(n: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).uniform(size=(n, *shape)), dtype)


def cases() -> dict[str, dict[str, Any]]:
    """Every case by name."""
    found: dict[str, dict[str, Any]] = {}
    for dtype in ("float64", "float32"):
        bits = dtype[-2:]
        for n in (200, 1000, 4000):
            for m in (128, 512, 1024):
                found[f"mlp-{n}-{m}-f{bits}"] = {"model": "mlp", "n": n, "m": m, "dtype": dtype}
        for outputs in ("full", "trace"):
            for m in (128, 512, 1024):
                name = f"mlp10-200-{m}-{outputs}-f{bits}"
                found[name] = {"model": "mlp", "n": 200, "m": m, "c": 10, "outputs": outputs, "dtype": dtype}
        found[f"cnn-32-f{bits}"] = {"model": "cnn", "n": 32, "m": 32, "c": 5, "dtype": dtype}
        for m in (16, 64):
            for n in (8, 32):
                found[f"resnet{m}-{n}-f{bits}"] = {"model": "resnet", "n": n, "m": m, "c": 5, "dtype": dtype}
    return {**found, **sequences.cases(), **networks.cases()}


def problem(
    *, model: str, n: int, m: int, c: int = 1, outputs: str = "full", dtype: str = "float64", **settings: Any
) -> tuple[Any, Any, jax.Array]:
    """Function, parameters and samples of a case."""
    del outputs
    if model == "mlp":
        hidden = [m] * (settings.get("depth", 5) - 1)
        return mlp, mlp_params([784, *hidden, c], dtype), images(n, (784,), dtype)
    if f"{model}-{m}-f64" in networks.cases():
        return networks.problem(model, n=n, m=m, c=c, dtype=dtype)
    if model not in ("cnn", "resnet"):
        return sequences.problem(model, n=n, m=m, c=c, dtype=dtype, **settings)
    net = {"cnn": CNN, "resnet": ResNet}[model](width=m, outputs=c)
    x = images(n, (32, 32, 3), dtype)
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), net.init(jax.random.key(0), x[:1]))
    return net.apply, params, x


def jacobian_kernel(apply_fn: Any, params: Any, x: jax.Array, outputs: str) -> jax.Array:
    """J Jᵀ from vmap over samples of reverse-mode Jacobians."""
    jac = jax.vmap(jax.jacrev(lambda p, one: apply_fn(p, one[None])[0]), (None, 0))(params, x)
    total: Any = 0
    for leaf in jax.tree.leaves(jac):
        n, c = leaf.shape[:2]
        flat = leaf.reshape(n, -1) if outputs == "trace" else leaf.reshape(n * c, -1)
        total = total + jax.lax.dot(flat, flat.T, precision=jax.lax.Precision.HIGHEST)
    return total


def mlp_floor(params: Any, x: jax.Array, outputs: str) -> Any:
    """The products alone: forward, backward, and half of each Gram product."""
    results, acts = [], [x]
    for weight, _ in params[:-1]:
        acts.append(acts[-1] @ weight)
    n, c = x.shape[0], params[-1][0].shape[1]
    delta = jnp.broadcast_to(params[-1][0].T[None], (n, c, params[-1][0].shape[0])).reshape(n * c, -1)
    deltas = [delta]
    for weight, _ in params[-2:0:-1]:
        deltas.append(deltas[-1] @ weight.T)
    results.append(acts[-1] @ params[-1][0])
    for h in acts:
        results.append(h[: n // 2] @ h.T)
    for delta in deltas:
        flat = delta.reshape(n, -1) if outputs == "trace" else delta
        results.append(flat[: flat.shape[0] // 2] @ flat.T)
    return results


# Seconds on the clock, or with --cpu those that all cores of the process worked: for a machine that others use too.
clock = time.perf_counter


def seconds(run: Callable[[], Any]) -> float:
    start = clock()
    jax.block_until_ready(run())
    return clock() - start


class Starting:
    """Seconds of tracing, lowering and compiling, as JAX reports them, since the last question."""

    STEPS = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")

    def __init__(self) -> None:
        self._seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, **_: Any) -> None:
        if event.rpartition("/")[2] in self.STEPS:
            self._seconds += duration

    def seconds(self) -> float:
        """The sum since the last call."""
        found, self._seconds = self._seconds, 0.0
        return found


def run_case(name: str, peers: list[str]) -> dict[str, Any]:
    """All methods of one case, in this process."""
    case, starting = cases()[name], Starting()
    dtype, outputs = case["dtype"], case.get("outputs", "full")
    with jax.enable_x64(dtype == "float64"):
        apply_fn, params, x = problem(**case)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        jacobian = x.shape[0] * case.get("c", 1) * size * x.dtype.itemsize
        seconds(lambda: jax.jit(lambda a: a + 1)(x))  # start-up of the backend is nobody's first call
        cotangent = jnp.ones_like(apply_fn(params, x))
        pulled = jax.jit(lambda p, a, ct: jax.vjp(lambda q: apply_fn(q, a), p)[1](ct))
        starting.seconds()
        first_vjp = seconds(lambda: pulled(params, x, cotangent))
        start = {"vjp": starting.seconds()}
        methods: dict[str, Callable[[], Any]] = {
            "engine": lambda: engine.kernel(apply_fn, params, x, outputs=outputs),  # type: ignore[arg-type]
        }
        first = {"vjp": first_vjp, "engine": seconds(methods["engine"])}
        start["engine"] = starting.seconds()
        for peer in peers if neural_tangents.available() is None else ():
            # NTK-vector products hold tangents for all pairs at once: seen to need three times the Jacobian.
            need = {"structured": 0, "jacobian": 2, "ntvp": 4, "auto": 2}[peer] * jacobian
            if need <= MEMORY:
                methods[peer] = lambda peer=peer: neural_tangents.kernel(
                    apply_fn, params, x, None, implementation=peer, outputs=outputs
                )
        if 2 * jacobian <= MEMORY and "jacobian" in peers:
            naive = jax.jit(lambda p, a: jacobian_kernel(apply_fn, p, a, outputs))
            methods["vmap+jacrev"] = lambda: naive(params, x)
        if case["model"] == "mlp":
            floor = jax.jit(lambda p, a: mlp_floor(p, a, outputs))
            methods["floor"] = lambda: floor(params, x)
        times: dict[str, list[float]] = {}
        reference = np.asarray(methods["engine"]())
        errors, second, refused = {}, {}, {}
        for method, run in methods.items():
            if method != "engine":
                try:
                    first[method] = seconds(run)
                except Exception as error:  # a peer may have no rule for what a network holds
                    refused[method] = f"{type(error).__name__}: {error}"[:200]
                    continue
            began = clock()
            value = jax.block_until_ready(run())
            second[method] = clock() - began
            if method not in ("engine", "floor"):
                errors[method] = float(np.max(np.abs(np.asarray(value) - reference)) / np.max(np.abs(reference)))
            del value
        for turn in range(MANY):
            for method, run in methods.items():
                if method in refused:
                    continue
                if turn >= (1 if second[method] > SLOW else ROUNDS if second[method] > QUICK else MANY):
                    continue
                if second[method] < SETTLING:
                    seconds(run)  # the memory that another method took and left is not this one's to pay for
                times.setdefault(method, []).append(seconds(run))
    return {
        "case": name,
        "median": {m: statistics.median(t) for m, t in times.items()},
        "least": {m: min(t) for m, t in times.items()},
        "rounds": {m: len(t) for m, t in times.items()},
        "first": first,
        "start": start,
        "difference": errors,
        "refused": refused,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The medians as a Markdown table."""
    methods = ("engine", *PEERS, "vmap+jacrev", "floor")
    head = ["case", *methods, "best other / engine", "engine / floor", "tracing and compiling / vjp's"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in results:
        median = result["median"]
        cells = [
            f"{median[m]:.4g}{'*' if result['rounds'][m] < ROUNDS else ''}" if m in median else "" for m in methods
        ]
        best = min((median[p] for p in (*PEERS, "vmap+jacrev") if p in median), default=None)
        cells.append(f"{best / median['engine']:.2f}" if best else "")
        cells.append(f"{median['engine'] / median['floor']:.2f}" if "floor" in median else "")
        cells.append(f"{result['start']['engine'] / result['start']['vjp']:.2f}")
        lines.append("| " + " | ".join([result["case"], *cells]) + " |")
    return "\n".join(lines)


def growth() -> dict[str, Any]:
    """Fitted exponents of the engine's time in n, m, c and depth, beside those of the counted multiply-adds."""
    sweeps = {
        "n": [{"n": n, "m": 512} for n in (500, 1000, 2000, 4000)],
        "m": [{"n": 1000, "m": m} for m in (256, 512, 1024, 2048)],
        "c": [{"n": 200, "m": 512, "c": c} for c in (2, 4, 8, 16)],
        "depth": [{"n": 1000, "m": 512, "depth": d} for d in (3, 5, 9, 17)],
    }
    found = {}
    with jax.enable_x64(True):
        for variable, points in sweeps.items():
            values, times, counted = [], [], []
            for point in points:
                apply_fn, params, x = problem(model="mlp", **point)
                run = lambda f=apply_fn, p=params, a=x: engine.kernel(f, p, a)  # noqa: E731
                seconds(run)
                times.append(statistics.median(seconds(run) for _ in range(ROUNDS)))
                swept = point["n"] * (1 + 2 * point.get("c", 1)) * sum(w.size for w, _ in params)
                counted.append(engine.explain(apply_fn, params, x).multiply_adds + swept)
                values.append(point.get(variable))
            slope = lambda y, v=values: float(np.polyfit(np.log(v), np.log(y), 1)[0])  # noqa: E731
            found[variable] = {
                "values": values,
                "seconds": times,
                "time": slope(times),
                "multiply_adds": slope(counted),
            }
    return found


def digits() -> dict[str, Any]:
    """All MNIST digits 3 and 8 (mnist_3v8.npz in the folder LPLR_TEST_DATA), width 128, float64."""
    with np.load(Path(os.environ["LPLR_TEST_DATA"]) / "mnist_3v8.npz") as file:
        pixels = file["x_train"].reshape(len(file["x_train"]), -1) / 255.0
    with jax.enable_x64(True):
        params, x = mlp_params([784, 128, 128, 128, 128, 1], "float64"), jnp.asarray(pixels)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        theta: Any = None

        def run() -> Any:
            nonlocal theta
            theta = None  # one result at a time
            theta = engine.kernel(mlp, params, x)
            return theta

        first, again = seconds(run), seconds(run)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        held = {"n": len(pixels), "result_bytes": theta.nbytes, "extra_bytes": peak - before - theta.nbytes}
    return {"first": first, "seconds": again, **held}


def write(
    folder: Path, results: list[dict[str, Any]], exponents: dict[str, Any] | None, every: dict[str, Any] | None = None
) -> str:
    """Writes ntk.md and ntk.json; returns the text of the former."""
    text = [
        f"Seconds (median of {ROUNDS} to {MANY}, * of one), {platform.machine()}, jax {jax.__version__}.",
        "",
        table(results),
    ]
    if exponents:
        text += ["", "Growth of the time, fitted, beside that of the counted multiply-adds:", ""]
        text += ["| in | over | exponent of time | of multiply-adds |", "|---|---|---|---|"]
        for variable, fit in exponents.items():
            over = ", ".join(map(str, fit["values"]))
            text.append(f"| {variable} | {over} | {fit['time']:.2f} | {fit['multiply_adds']:.2f} |")
    if every:
        text += ["", f"All {every['n']:,} digits 3 and 8, width 128, float64: {every['seconds']:.1f} s, first call "]
        text[-1] += f"{every['first']:.1f} s, {every['extra_bytes'] / 1e9:.2f} GB above the result."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ntk.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    (folder / "ntk.json").write_text(
        json.dumps({"cases": results, "growth": exponents, "digits": every}, indent=1), encoding="utf-8"
    )
    return "\n".join(text)


def main() -> None:
    """Runs cases in processes of their own and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("select", nargs="*", help="run the cases whose name contains one of these")
    parser.add_argument("--quick", action="store_true", help="the smallest case of each kind")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="implementations to time")
    parser.add_argument("--no-growth", action="store_true", help="leave the fitted exponents out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for ntk.md and ntk.json")
    parser.add_argument("--cpu", action="store_true", help="count the seconds of all cores, not those on the clock")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cpu:
        global clock
        clock = time.process_time
    if args.one:
        whole = {"growth": growth, "digits": digits}.get(args.one)
        print(json.dumps(whole() if whole else run_case(args.one, args.peers)))
        return
    names = [name for name in cases() if not args.select or any(text in name for text in args.select)]
    if args.quick:
        names = ["mlp-200-128-f64", "mlp10-200-128-trace-f64", "cnn-32-f32", "resnet16-8-f32"]
    if not names:
        parser.error(f"no case contains {', '.join(args.select)}; there are {', '.join(cases())}")
    results = []
    for name in names:
        command = [sys.executable, __file__, "--one", name, "--peers", *args.peers, *["--cpu"] * args.cpu]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
            continue
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print("\n".join(table(results[-1:]).splitlines()[0 if len(results) == 1 else 2 :]), flush=True)
        write(args.out, results, None)
    if not (args.no_growth or args.quick):
        extra = {}
        for part in ("growth", *(("digits",) if "LPLR_TEST_DATA" in os.environ else ())):
            command = [sys.executable, __file__, "--one", part]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            extra[part] = json.loads(done.stdout.splitlines()[-1])
        print(write(args.out, results, extra["growth"], extra.get("digits")))


if __name__ == "__main__":
    main()
