"""Everything that an accelerator is for, in one command of at most eight minutes: a table and a JSON.

    python benchmarks/accelerator.py             all of it; tables to benchmarks/results/accelerator-DEVICE.{md,json}
    python benchmarks/accelerator.py --small     a size at which all of it runs on two CPU cores
    python benchmarks/accelerator.py --only kernels

Parts run one after the other, each in a process of its own, so that each has its own peak of memory and one that fails
ends no other. What the time does not reach is said to be left out. Numbers are held against the CPU of the same
machine in float64. Data are the digits that come with the package, and images drawn at random where only time counts.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ntk
import training
from lplr_jax import diagnostics, linalg, load, verify
from lplr_jax.experiments import ablation, cifar, mnist
from lplr_jax.losses import Objective
from lplr_jax.ntk import engine, neural_tangents
from lplr_jax.training import MiniBatches, init_state, momentum_sgd

RESULTS = Path(__file__).parent / "results"
LIMIT = 480.0
"""Seconds of the whole."""
T4 = {"jacobian": 243.0, "ntvp": 81.4, "structured": 3.46}
"""Milliseconds on a T4 in neural-tangents' notebook of empirical kernels: 3072-2048³-8, n = 16, float32."""
PRECISIONS = (("float32", "highest"), ("float32", "tensorfloat32"), ("float64", "highest"))
KERNELS = {
    False: (
        "mlp-1000-128",
        "mlp-1000-512",
        "mlp-4000-512",
        "mlp-4000-1024",
        "mlp10-200-512-full",
        "mlp10-200-512-trace",
    ),
    True: ("mlp-200-128",),
}
IMAGES = {False: ("cnn-32", "resnet16-32", "resnet64-32"), True: ("cnn-4",)}
FEW = {"cnn-4": {"model": "cnn", "n": 4, "m": 8, "c": 5}}
"""A case of images for a CPU, beside those of benchmarks/ntk.py."""
COMPARED = 1000
"""Samples up to which the CPU makes a kernel once more: a larger one takes it too long."""

Row = dict[str, Any]


def timed(run: Callable[[], Any], rounds: int = 7) -> float:
    """Median seconds, after one call to compile and one to settle; of one round where a call takes long."""
    ntk.seconds(run)
    first = ntk.seconds(run)
    return first if first > 2.0 else statistics.median(ntk.seconds(run) for _ in range(rounds))


def copies_to_host(run: Callable[[], Any]) -> str:
    """Whether a call copies anything from the device to the host; on a CPU the question has no meaning."""
    if jax.default_backend() == "cpu":
        return "-"
    try:
        with jax.transfer_guard_device_to_host("disallow"):
            jax.block_until_ready(run())
    except Exception as error:
        return str(error).splitlines()[0][:120]
    return "none"


def relative(value: Any, reference: Any) -> float:
    """Largest difference over the largest entry."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def kernels(small: bool) -> Iterator[Row]:
    """The cases of benchmarks/ntk.py in three precisions, against a plain Jacobian and the CPU's float64."""
    host = jax.devices("cpu")[0]
    for name in (*KERNELS[small], *IMAGES[small]):
        reference = None
        for dtype, precision in reversed(PRECISIONS):
            case = {**(FEW.get(name) or ntk.cases()[f"{name}-f{dtype[-2:]}"]), "dtype": dtype}
            outputs = case.get("outputs", "full")
            with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision(precision):
                apply_fn, params, x = ntk.problem(**case)
                run = lambda f=apply_fn, p=params, a=x, o=outputs: engine.kernel(f, p, a, outputs=o)  # noqa: E731
                row = {"case": name, "dtype": dtype, "products": precision, "engine": timed(run)}
                theta = run()
                row["copies to the host"] = copies_to_host(run)
                size = sum(leaf.size for leaf in jax.tree.leaves(params))
                jacobian = x.shape[0] * case.get("c", 1) * size * x.dtype.itemsize
                if 2 * jacobian <= (1.5e9 if small else 20e9):
                    plain = jax.jit(lambda p, a, f=apply_fn, o=outputs: ntk.jacobian_kernel(f, p, a, o))
                    row["vmap(jacrev)"] = timed(lambda plain=plain, p=params, a=x: plain(p, a))
                if reference is None and case["n"] <= COMPARED:
                    with jax.default_device(host):
                        there = jax.tree.map(np.asarray, (params, x))
                        reference = np.asarray(engine.kernel(apply_fn, *there, outputs=outputs))
                if reference is not None:
                    row["difference from the CPU"] = relative(theta, reference)
                del theta
            yield row


def notebook(small: bool) -> Iterator[Row]:
    """The network of neural-tangents' notebook; a smaller one where a Jacobian of it would be too much for a CPU."""
    width, inputs = (256, 768) if small else (2048, 3072)
    params = ntk.mlp_params([inputs, width, width, width, 8], "float32")
    x = ntk.images(16, (inputs,), "float32")
    methods: dict[str, Callable[[], Any]] = {"engine": lambda: engine.kernel(ntk.mlp, params, x)}
    plain = jax.jit(lambda p, a: ntk.jacobian_kernel(ntk.mlp, p, a, "full"))
    methods["vmap(jacrev)"] = lambda: plain(params, x)
    for peer in T4 if neural_tangents.available() is None else ():
        methods[peer] = lambda peer=peer: neural_tangents.kernel(ntk.mlp, params, x, implementation=peer)
    reference = methods["engine"]()
    for method, run in methods.items():
        row = {"network": f"{inputs}-{width}³-8", "n": 16, "method": method, "ms": 1000 * timed(run)}
        if not small:
            row["T4, ms"] = T4.get(method)
        yield {**row, "difference from the engine": relative(run(), reference)}


def epochs(small: bool) -> Iterator[Row]:
    """Training against its products."""
    for width in (128,) if small else (128, 512, 1024):
        times = training.measure(width, 3 if small else 100, 3 if small else 7)
        median = {name: 1000 * statistics.median(values) for name, values in times.items()}
        row = {"width": width} | {f"{name}, ms an epoch": median[name] for name in ("ours", "bare optax")}
        row["products, ms an epoch"] = median["products alone"]
        yield {**row, "ours / products": median["ours"] / median["products alone"]}


def least(small: bool) -> Iterator[Row]:
    """λ_min of the digits end to end, and which of its seconds are the device's."""
    for width in (128,) if small else (128, 1024):
        problem = mnist.set_up(mnist.MnistConfig(width=width, n_train=400 if small else 1000))
        arguments = problem.apply_fn, problem.params, problem.x

        def whole(arguments: Any = arguments) -> linalg.MinEig:
            return diagnostics.empirical_ntk_min_eig(*arguments)

        whole()
        began = time.perf_counter()
        found = whole()
        row = {"width": width, "n": len(problem.y), "λ_min": found.value, "seconds": time.perf_counter() - began}
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), (problem.params, problem.x))
            row["seconds on the device (Θ)"] = timed(lambda wide=wide, f=problem.apply_fn: engine.kernel(f, *wide))
        row["seconds on the host (eigenvalue, proof)"] = row["seconds"] - row["seconds on the device (Θ)"]
        with jax.default_device(jax.devices("cpu")[0]):
            there = jax.tree.map(np.asarray, arguments[1:])
            alone = diagnostics.empirical_ntk_min_eig(arguments[0], *there)
        row["width of the interval / λ_min"] = (found.upper - found.lower) / found.value
        row["the CPU's interval meets it"] = found.lower <= alone.upper and alone.lower <= found.upper
        yield row


def run_of_mnist(small: bool) -> Iterator[Row]:
    """`make mnist` as it is typed, on the device and on the CPU: verdicts, and how far the numbers are apart."""
    preset = "smoke" if small else "default"
    records, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for where in ("device", *(() if jax.default_backend() == "cpu" else ("cpu",))):
            out = Path(folder) / where
            command = [sys.executable, "-m", "lplr_jax", "mnist", "--preset", preset, "--out", str(out)]
            environment = {**os.environ, **({"JAX_PLATFORMS": "cpu"} if where == "cpu" else {})}
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            rows.append({"where": where, "preset": preset, "seconds": time.perf_counter() - began})
            rows[-1]["exit code"] = done.returncode
            if done.returncode == 0:
                records[where] = load(out)
                spent = records[where].provenance.get("seconds", {})
                rows[-1] |= {f"{name}, s": value for name, value in spent.items() if isinstance(value, float)}
                rows[-1]["verdicts"] = {one.claim: one.outcome for one in verify(records[where])}
        if len(records) == 2:
            one, two = records["device"], records["cpu"]
            rows[0]["same verdicts"] = rows[0]["verdicts"] == rows[1]["verdicts"]
            for name in ("loss", "ntk_min_eig", "sharpness"):
                known = np.isfinite(one[name]) & np.isfinite(two[name])
                rows[0][f"{name}, difference from the CPU"] = relative(one[name][known], two[name][known])
    yield from rows


def seeds(small: bool) -> Iterator[Row]:
    """The arms of one width that differ in the seed: one program by vmap, and one after the other."""
    base = mnist.MnistConfig(
        width=32 if small else 512, epochs=20 if small else 200, learning_rate=1e-3, n_train=100 if small else 1000
    )
    configs = [replace(base, seed=seed) for seed in range(2 if small else 8)]
    row: Row = {"width": base.width, "epochs": base.epochs, "seeds": len(configs)}
    for name, groups in (("vmap", [configs]), ("one after the other", [[config] for config in configs])):
        for _ in range(2):  # the first compiles
            began = time.perf_counter()
            for group in groups:
                ablation.train_together(group)
            row[f"{name}, s"] = time.perf_counter() - began
    yield {**row, "gain": row["one after the other, s"] / row["vmap, s"]}


def cifar_epochs(small: bool) -> Iterator[Row]:
    """Epochs of the CIFAR network of the preset "paper", with and without the exact diagnostics; random images."""
    config = cifar.PRESETS["smoke" if small else "paper"]
    rng, n = np.random.default_rng(0), config.n_train
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.npz"
        labels = np.arange(n) % 5  # the five classes that are taken unless others are named
        np.savez(path, x_train=rng.integers(0, 256, (n, 32, 32, 3), np.uint8), y_train=labels)
        setting = cifar.set_up(replace(config, data=path))
    initial = setting.model.init(jax.random.key(0), setting.x[:1])
    steps = -(-n // config.batch_size)
    optimizer = momentum_sgd(config.learning_rate, config.momentum, schedule=config.schedule, steps=100 * steps)
    objective = Objective(setting.model.apply, config.loss_scale)
    for every in (1,) if small else (1, 1000):
        trainer = MiniBatches(
            (setting.x, setting.y), initial, objective=objective, optimizer=optimizer,
            batch_size=config.batch_size, micro_batch=config.samples_at_a_time(), every=every,
        )  # fmt: skip
        state, _ = trainer.advance(init_state(initial, optimizer, seed=0), 1)
        count = 1 if small else 3
        began = time.perf_counter()
        jax.block_until_ready(trainer.advance(state, count)[0].params)
        row = {"preset": "smoke" if small else "paper", "images": n, "width": config.width}
        row["exact diagnostics"] = "every epoch" if every == 1 else "none"
        yield {**row, "seconds an epoch": (time.perf_counter() - began) / count}


PARTS: dict[str, tuple[str, Callable[[bool], Iterator[Row]], float]] = {
    "kernels": ("Kernels, seconds", kernels, 150),
    "notebook": ("The network of neural-tangents' notebook", notebook, 40),
    "training": ("Training against its products", epochs, 45),
    "least": ("λ_min end to end", least, 60),
    "mnist": ("`make mnist`", run_of_mnist, 120),
    "seeds": ("An arm with vmap over seeds", seeds, 60),
    "cifar": ("CIFAR-10 epochs", cifar_epochs, 60),
}
"""Title, function, and the seconds that a part may take before the next one's are touched, by name."""


def one_part(name: str, small: bool) -> None:
    """Print what a part finds, a line of JSON each, and last what memory it took."""
    for row in PARTS[name][1](small):
        print(json.dumps({"row": row}), flush=True)
    stats = jax.devices()[0].memory_stats() or {}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"host_bytes": host, "device_bytes": stats.get("peak_bytes_in_use")}), flush=True)


def gather(name: str, small: bool, seconds: float) -> Row:
    """Run a part in a process of its own, for so many seconds at most; what it had found by then counts."""
    command = [sys.executable, "-u", __file__, "--one", name, *["--small"] * small]
    began, found = time.perf_counter(), {"rows": [], "ended": "whole"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        try:
            if process.wait(timeout=seconds):
                err.seek(0)
                found["ended"] = f"failed: {(err.read().strip().splitlines() or ['?'])[-1][:300]}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            found["ended"] = f"cut off after {seconds:.0f} s"
        out.seek(0)
        for line in out:
            told = json.loads(line) if line.startswith("{") else {}
            found["rows"] += [told.pop("row")] if "row" in told else []
            found |= told
    return {**found, "seconds": time.perf_counter() - began}


def shown(value: Any) -> str:
    """A cell of the table."""
    if isinstance(value, dict):
        counts = {outcome: list(value.values()).count(outcome) for outcome in dict.fromkeys(value.values())}
        return ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def table(report: Row) -> str:
    """The report as Markdown."""
    machine = report["machine"]
    lines = [
        f"{machine['device']}, {machine['platform']}, jax {machine['jax']}, {machine['cores']} cores, "
        f"{report['seconds']:.0f} s in all, {report['cpu_seconds']:.0f} s of all cores"
        f"{', --small' if report['small'] else ''}."
    ]
    if machine["backend"] == "cpu":
        lines.append("A dry run on a CPU: it shows that all of it runs. No figure of an accelerator is in it.")
    for name, part in report["parts"].items():
        lines += ["", f"## {PARTS[name][0]}", ""]
        heads = list(dict.fromkeys(key for row in part["rows"] for key in row))
        if heads:
            lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            lines += [f"| {' | '.join(shown(row.get(head)) for head in heads)} |" for row in part["rows"]]
            lines.append("")
        memory = [
            f"{part[key] / 1e9:.2f} GB on the {key[:-6]}" for key in ("host_bytes", "device_bytes") if part.get(key)
        ]
        ended = "" if part["ended"] == "whole" else f", {part['ended']}"
        lines.append(f"{part['seconds']:.0f} s{ended}{'; peak ' + ', '.join(memory) if memory else ''}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the parts and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small sizes: a dry run on a CPU")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the tables")
    parser.add_argument("--name", help="of the tables [default: accelerator-<device>]")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one_part(options.one, options.small)
        return
    asked = "import jax; d = jax.devices()[0]; print(d.device_kind, jax.default_backend(), sep='\\t')"
    # In a process of its own, as one that knows the device keeps memory of it.
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    kind, backend = told.splitlines()[-1].split("\t")
    device = platform.processor() or platform.machine() if backend == "cpu" else kind
    machine = {"device": device, "backend": backend, "platform": platform.platform(terse=True)}
    machine |= {"jax": jax.__version__, "cores": os.cpu_count()}
    report: Row = {"machine": machine, "small": options.small, "parts": {}}
    began, stem = time.perf_counter(), "-".join(kind.lower().split())
    name = options.name or f"accelerator-{stem}"
    for part in options.only:
        left = LIMIT - (time.perf_counter() - began)
        if left < 10:
            report["parts"][part] = {"rows": [], "ended": "left out: no time was left", "seconds": 0.0}
        else:
            # A part may use what the ones before it left over.
            spare = left - sum(PARTS[later][2] for later in options.only[options.only.index(part) + 1 :])
            limit = left if options.small else min(left, max(PARTS[part][2], spare))
            report["parts"][part] = gather(part, options.small, limit)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        report |= {"seconds": time.perf_counter() - began, "cpu_seconds": spent.ru_utime + spent.ru_stime}
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.md").write_text(table(report), encoding="utf-8")
        (options.out / f"{name}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        print(f"{part}: {report['parts'][part]['seconds']:.0f} s, {report['parts'][part]['ended']}", flush=True)
    print(table(report))


if __name__ == "__main__":
    main()
