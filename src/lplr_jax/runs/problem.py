"""A training problem as a value, and what is to be measured of its runs, and when."""

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lplr_jax import checks, diagnostics, parameters
from lplr_jax.losses import Loss, Objective, Squared
from lplr_jax.measurement.noise import Batches
from lplr_jax.measurement.probe import KernelProbe
from lplr_jax.ntk.checks import sample_values
from lplr_jax.ntk.empirical import Precision, check_kernel_name
from lplr_jax.ntk.memory import bytes_of, total_memory
from lplr_jax.proofs.assembly import Proof, check_proof
from lplr_jax.types import ApplyFn, Params

MOST_PROBES = 10_000
"""Most kernel probes of a run; every pair of them is compared, so this is 800 MB. Calibrated."""

MOST = {"width": 10**6, "depth": 1_000, "epochs": 10**7, "seed": 2**32 - 1}
"""Largest values of some fields: beyond them nothing fits a machine, or two seeds would give the same keys."""


def check_learning_rate(name: str, value: float) -> None:
    """Raise ValueError for a step size that is not positive and finite in the precision of training."""
    tiny, largest = (float(getattr(np.finfo(np.float32), end)) for end in ("tiny", "max"))
    if not tiny <= checks.number(name, value, above=0) <= largest:
        raise ValueError(f"{name} must be a finite number > 0 in float32, {tiny:.2g} to {largest:.2g}, got {value}")


def check_memory(params: Params, width: int) -> None:
    """Raise ValueError where four copies of the parameters, as training needs, exceed the machine; shapes will do."""
    needed, there = 4 * bytes_of(params), total_memory()
    if needed > there:
        raise ValueError(
            f"width = {width} makes {parameters.count_parameters(params):,} parameters; training needs "
            f"{needed / 2**30:,.0f} GiB, this machine has {there / 2**30:,.0f}: lower --width"
        )


def check_seconds(name: str, value: float) -> None:
    """Raise ValueError for a number of seconds that is not finite or below 0."""
    if not (isinstance(value, int | float | np.number) and 0 <= value < math.inf):
        raise ValueError(f"{name} must be a finite number of seconds >= 0, got {checks.shown(value)}")


def probe_epochs(epochs: int, every: int) -> tuple[int, ...]:
    """Return the epochs at which the kernel is probed: every `every` epochs and both ends.

    Raises:
        ValueError: if there is no epoch to run, or the interval is not positive.
    """
    checks.whole("epochs", epochs, least=1)
    checks.whole("probe_every", every, least=1)
    if epochs // every > MOST_PROBES:
        raise ValueError(
            f"probe_every must be at least {-(-epochs // MOST_PROBES)} for epochs = {epochs}, "
            f"or there are more than {MOST_PROBES:,} probes; got {every}"
        )
    return tuple(sorted({*range(0, epochs + 1, every), epochs}))


def spread(epochs: Sequence[int], count: int) -> frozenset[int]:
    """Return `count` of the epochs, evenly spread with both ends; all of them where there are fewer."""
    checks.whole("count", count, least=0)
    places = np.linspace(0, len(epochs) - 1, min(count, len(epochs))).round().astype(int)
    return frozenset(epochs[place] for place in places)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """A function, where its parameters start, its data and its loss: L(θ) = (1/s) Σ_i ℓ(f(θ, x_i), y_i).

    It is a pytree of `params`, `x` and `y`, so it can be an argument of a jitted function; closing over it would copy
    the data into the program.

    Attributes:
        apply_fn: pure function from parameters and inputs to outputs (n, c) or (n,), each row from its own sample.
        params: θ_0, a pytree.
        x: inputs, an array (n, ...) or a pytree of such arrays.
        y: targets (n, c) or (n,), as the loss wants them.
        loss: one of `lplr_jax.losses`; `Squared("mean")` is ‖f - y‖²/(2n).
        name: what the run is called in its record, of letters, digits, - and _.

    Raises:
        TypeError: for what is no function, no array or no loss.
        ValueError: for shapes that do not fit, numbers that are not finite, or a name that cannot be one of a file.

    Example:
        >>> import jax.numpy as jnp
        >>> problem = Problem(lambda w, x: x @ w, jnp.zeros((2, 1)), jnp.eye(2), jnp.ones((2, 1)))
        >>> problem.n, problem.c, problem.p, problem.s
        (2, 1, 2, 2.0)
    """

    apply_fn: ApplyFn
    params: Params
    x: Any
    y: Any
    loss: Loss = field(default=Squared("mean"), kw_only=True)
    name: str = field(default="run", kw_only=True)

    def __post_init__(self) -> None:
        checks.function("apply_fn", self.apply_fn, "(params, x) -> outputs (n, c)")
        checks.instance("loss", self.loss, Loss, 'such as losses.Squared("mean") or losses.Logistic()')
        checks.name("name", self.name)
        parameters.split(self.params)  # says what cannot be trained
        object.__setattr__(self, "params", parameters.still(parameters.strong(self.params)))
        leaves = [leaf for leaf in jax.tree.leaves(self.x) if hasattr(leaf, "shape")]
        lengths = {leaf.shape[0] if leaf.shape else None for leaf in leaves}
        if len(lengths) != 1 or None in lengths:
            shapes = ", ".join(str(leaf.shape) for leaf in leaves) or "no arrays"
            raise ValueError(f"x must hold arrays (n, ...) of one number of samples n, got {shapes}")
        if getattr(self.y, "shape", ())[:1] != (lengths.pop(),):
            raise ValueError(f"y must have one row a sample of x, got {checks.shown(self.y)} for x of {self.n} samples")
        if not np.isfinite(np.asarray(self.y, np.float64)).all():
            raise ValueError("y holds numbers that are not finite; clean the data")
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.x):
            if getattr(leaf, "is_fully_addressable", True):  # what other processes hold is not looked at
                sample_values(f"x{jax.tree_util.keystr(path)}", leaf)
        outputs = self._outputs
        of_theta = self.reduced  # JAX traces arrays alone, and params may carry functions along
        value = jax.eval_shape(of_theta.objective.value, of_theta.params, self.x, self.y)  # says what does not fit
        self.loss.targets(self.y, outputs.shape, outputs.dtype)  # and which targets the loss is not defined for
        if value.shape:
            raise ValueError(f"the loss must be one number, got shape {value.shape}")

    def __repr__(self) -> str:
        """Say its sizes and no arrays."""
        return f"Problem({self.name!r}: n = {self.n}, c = {self.c}, p = {self.p}, loss = {self.loss!r})"

    def tree_flatten(self) -> tuple[tuple[Any, Any, Any], tuple[ApplyFn, Loss, str]]:
        """Return what is traced, and what is not."""
        return (self.params, self.x, self.y), (self.apply_fn, self.loss, self.name)

    @classmethod
    def tree_unflatten(cls, static: tuple[ApplyFn, Loss, str], traced: tuple[Any, Any, Any]) -> "Problem":
        """Return a problem of these parts, unchecked: they may be tracers."""
        problem = object.__new__(cls)
        named = dict(zip(("apply_fn", "loss", "name"), static, strict=True))
        for name, value in {**named, **dict(zip(("params", "x", "y"), traced, strict=True))}.items():
            object.__setattr__(problem, name, value)
        return problem

    @property
    def objective(self) -> Objective:
        """The function to be minimised, which is static to a jitted function."""
        return Objective(self.apply_fn, self.loss)

    @property
    def data(self) -> tuple[Any, Any]:
        """Inputs and targets."""
        return self.x, self.y

    @cached_property
    def reduced(self) -> "Problem":
        """The same problem in θ alone, a list of arrays, where `params` carry other leaves along; else itself."""
        apply_fn, theta = parameters.theta_alone(self.apply_fn, self.params)
        if theta is self.params:
            return self
        return Problem.tree_unflatten((apply_fn, self.loss, self.name), (theta, *self.data))

    def theta(self, params: Params) -> Params:
        """Return what the parameters of `reduced` are in a tree of this problem's structure."""
        return parameters.strong(params if self.reduced is self else parameters.split(params).values)

    @property
    def n(self) -> int:
        """Samples."""
        return int(self.y.shape[0])

    @cached_property
    def c(self) -> int:
        """Outputs per sample."""
        shape = self._outputs.shape
        return int(shape[1]) if len(shape) > 1 else 1

    @property
    def _outputs(self) -> jax.ShapeDtypeStruct:
        """Shape and type of the outputs."""
        return jax.eval_shape(self.reduced.apply_fn, self.reduced.params, self.x)

    @cached_property
    def p(self) -> int:
        """Parameters."""
        return parameters.count_parameters(self.params)

    @cached_property
    def s(self) -> float:
        """The number s by which the sum of losses is divided."""
        return float(self.loss.scale_of(self.n, self.c))

    def numbers(self, learning_rate: float = math.nan) -> dict[str, np.ndarray]:
        """Return the scalars of a record of this problem, by record name."""
        scalars = {
            "loss_scale": np.float64(self.s),
            "learning_rate": np.float64(learning_rate),
            "n": np.int64(self.n),
            "c": np.int64(self.c),
            "p": np.int64(self.p),
        }
        if isinstance(self.loss, Squared):
            scalars["target_norm"] = np.float64(np.linalg.norm(np.asarray(self.y, np.float64)))
        return {name: np.asarray(value) for name, value in scalars.items()}

    def digest(self) -> dict[str, str]:
        """Return the SHA-256 of θ_0 and of the data, which tell one problem from another."""
        return {
            "initial_checksum": _digest((self.params, jax.tree.structure(self.params))),
            "data_checksum": _digest(self.data),
        }


_PLACE = re.compile(r" at 0x[0-9a-fA-F]+")


def without_places(text: str) -> str:
    """Return a text without where objects lie in memory, of which no two processes agree."""
    return _PLACE.sub("", text)


def key_data(leaf: Any) -> Any:
    """Return the numbers of a random key, and any other leaf as it is."""
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = key_data(leaf)
        text = np.frombuffer(without_places(repr(leaf)).encode(), np.uint8) if not hasattr(leaf, "dtype") else leaf
        array = np.ascontiguousarray(text)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class Probes:
    """What the probes of a run measure, and at which steps: a value, whoever runs.

    Attributes:
        every: steps between probes; "log" for steps spaced by factors of √2; None for a fortieth of the run, or "log"
            where its length is not known. Both ends are always probed.
        at: steps to probe instead.
        subset: samples of a subset whose kernel is measured instead of that of all: how many, or which.
        kernel: one of `lplr_jax.ntk.KERNELS`.
        hessian: probes, evenly spread, at which the Hessian's extremes are measured, 0 for none. Where the length of
            the run is not known: at the first, whenever the number of probes has doubled, and at the last one.
        spectrum: probes, evenly spread, at which the whole spectrum is kept, or "all".
        search: power iterations of the search for a lower estimate of L_Θ after the last step; 0 for none.
        beside: samples of a random subset whose λ_min stands beside that of all, as the paper measures it: how many, or
            which; None for none.
        hessian_precision: precision of the Hessian's products and eigenvalues.
        seed: of random subsets and of the search.
        certify_floor: seconds of two cores for a network of zero loss near the last step, and its certificate; 0 for
            none. Squared loss and a kernel of all samples alone.
        proof: whether λ_min is proved for networks that are not only dense and convolutional, which takes seconds a
            sample (`diagnostics.certified_min_eig`): "auto" at step 0, where that is about a minute at most; "always"
            at every probe, whatever it takes; "never" not.

    Raises:
        ValueError: for a number out of range.
    """

    every: int | Literal["log"] | None = None
    at: Collection[int] | None = None
    subset: int | Sequence[int] | np.ndarray | None = field(default=None, kw_only=True)
    kernel: str = field(default="auto", kw_only=True)
    hessian: int = field(default=9, kw_only=True)
    spectrum: int | Literal["all"] = field(default="all", kw_only=True)
    search: int = field(default=6, kw_only=True)
    beside: int | Sequence[int] | np.ndarray | None = field(default=None, kw_only=True)
    hessian_precision: Precision = field(default="float64", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    certify_floor: float = field(default=0.0, kw_only=True)
    proof: Proof = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        if self.every is not None and self.at is not None:
            raise ValueError(f"every or at, not both: got every = {self.every!r} and at = {checks.shown(self.at)}")
        if self.every is not None and self.every != "log":
            checks.whole('every (a number of steps, or "log")', self.every, least=1)
        if self.at is not None:
            steps = tuple(sorted({checks.whole("at", step, least=0) for step in self.at}))
            object.__setattr__(self, "at", steps)
            if len(steps) > MOST_PROBES:
                raise ValueError(f"at must name at most {MOST_PROBES:,} steps, got {len(steps):,}")
        for name in ("hessian", "search", "seed"):
            checks.whole(name, getattr(self, name), least=0)
        check_seconds("certify_floor", self.certify_floor)
        if self.spectrum != "all":
            checks.whole('spectrum (a number of probes, or "all")', self.spectrum, least=0)
        check_kernel_name(self.kernel)
        check_proof(self.proof)

    def plain(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {
            name: np.asarray(value).tolist() if np.ndim(value) else value  # pyright: ignore[reportArgumentType]
            for name, value in vars(self).items()
        }

    def steps(self, last: int) -> tuple[int, ...]:
        """Return the steps to probe in a run of steps 0 to `last`, both ends among them.

        Raises:
            ValueError: if there are more than 10,000 of them.
        """
        if self.at is not None:
            return tuple(sorted({0, *(step for step in self.at if step <= last), last}))
        if self.every == "log":
            return tuple(sorted({0, *itertools.takewhile(lambda step: step <= last, _log_spaced()), last}))
        return probe_epochs(last, max(1, last // 40) if self.every is None else self.every)

    def due(self, step: int) -> bool:
        """Return whether a step is probed in a run of unknown length; its last step is probed besides."""
        if step == 0:
            return True
        if self.at is not None:
            return step in self.at
        if self.every is None or self.every == "log":
            return step == round(2 ** (round(2 * math.log2(step)) / 2))
        return step % self.every == 0

    def ids(self, problem: Problem, name: Literal["subset", "beside"]) -> np.ndarray | None:
        """Return the samples of a subset, drawn in equal shares of the classes where one is to be measured alone.

        Raises:
            ValueError: for samples that the problem does not have.
        """
        chosen = getattr(self, name)
        if chosen is None:
            return None
        if np.ndim(chosen):
            ids = np.unique(np.asarray(chosen))
            if ids.size != np.size(chosen) or ids.dtype.kind not in "iu" or not 0 <= ids[0] <= ids[-1] < problem.n:
                raise ValueError(f"{name} must name distinct samples 0 to {problem.n - 1}, got {checks.shown(chosen)}")
            return ids
        count = checks.whole(name, chosen, least=1, most=problem.n, of="n")
        y = np.asarray(problem.y)
        if name == "subset" and y.ndim == 2 and y.shape[1] > 1 and count % y.shape[1] == 0:
            try:
                return diagnostics.stratified_ids(y, count)
            except ValueError:  # targets that are no classes
                pass
        return diagnostics.subset_ids(problem.n, count, seed=self.seed)


def _log_spaced() -> Iterator[int]:
    return (round(2 ** (k / 2)) for k in itertools.count())


def kernel_probe(
    problem: Problem,
    probes: Probes,
    *,
    steps: Sequence[int] | None,
    taken: Collection[int] = (),
    ending: Callable[[], bool] = lambda: False,
    save_to: Path | None = None,
    batches: Batches | None = None,
    learning_rate: float = math.nan,
) -> tuple[KernelProbe, dict[str, np.ndarray]]:
    """Return what measures a problem at its probes, and the record's arrays that say of which samples.

    Args:
        problem: the problem.
        probes: what to measure.
        steps: the steps that will be probed; None where they are not known.
        taken: steps probed so far, kept by the caller, where they are not known.
        ending: whether the probe at hand is the last one, where they are not known.
        save_to: where to keep the parameters of every probe.
        batches: mini-batches whose noise is measured, where the kernel is of all samples; None for none.
        learning_rate: η of a step on all data; NaN where it is not known, or moves.
    """
    subset, beside = probes.ids(problem, "subset"), probes.ids(problem, "beside")
    if subset is not None and beside is not None:
        raise ValueError("subset or beside, not both: the kernel of all samples is not measured where subset is given")
    x, y = problem.data
    said: dict[str, np.ndarray] = {}
    if subset is not None:
        x, y = jax.tree.map(lambda leaf: leaf[subset], x), problem.y[subset]
        said = {"subset_ids": subset, "kernel_samples": np.asarray(np.int64(subset.size))}
    if beside is not None:
        said = {"subset_ids": beside}

    def doubled(step: int) -> bool:
        number = len(taken) + (step not in taken)
        return number & (number - 1) == 0 or ending()

    def when(count: int | str) -> Collection[int] | Callable[[int], bool]:
        if steps is None:
            return (lambda step: True) if count == "all" else doubled if count else ()
        return frozenset(steps) if count == "all" else spread(steps, int(count))

    probe = KernelProbe(
        problem.objective,
        x,
        np.asarray(y),
        subset=beside,
        kernel=probes.kernel,
        hessian_epochs=when(probes.hessian),
        hessian_precision=probes.hessian_precision,
        spectrum_epochs=when(probes.spectrum),
        save_to=save_to,
        batches=batches if subset is None else None,
        certify_floor=probes.certify_floor if subset is None else 0.0,
        proof=probes.proof,
        learning_rate=learning_rate if subset is None else math.nan,
    )
    return probe, said
