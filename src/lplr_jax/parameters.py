"""Which leaves of a parameter tree are θ, and which are carried along: one definition for every function.

θ is the floating leaves of the tree: arrays of JAX and NumPy, scalars of NumPy and Python among them (a Python float
counts as a float64 array without axes). Integers, booleans, random keys, text and functions are carried along and
never differentiated. A container that says what trains is believed: of Flax variables the collection `params`, of NNX
modules and states the variables of type `nnx.Param`, of Equinox modules the floating arrays. `trainable` says it for
any other tree.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey, keystr

from lplr_jax import checks
from lplr_jax.types import ApplyFn, Params

Trainable = Any
"""A pytree of booleans, whole or a prefix of the parameters, or a function from the path of a leaf to one."""

# Names under which frameworks keep running statistics, which no gradient step moves.
_STATISTICS = ("batch_stats", "running_mean", "running_var", "moving_mean", "moving_var", "moving_variance", "ema")


class NoParametersError(TypeError, ValueError):
    """No leaf of a parameter tree is θ."""


class UntrainedLeafWarning(UserWarning):
    """A leaf counts as θ although nothing seems to train it."""


@dataclass(frozen=True)
class Static:
    """A leaf that is no array."""

    value: Any


@dataclass(frozen=True)
class Leaf:
    """What one leaf is.

    Attributes:
        path: where it is in the tree, as JAX writes it.
        reason: why it is carried along; empty for a leaf of θ.
        index: its place among the arrays of the tree, None where it is no array.
        size: numbers in it.
    """

    path: str
    reason: str
    index: int | None
    size: int

    @property
    def is_theta(self) -> bool:
        """Whether the leaf is part of θ."""
        return not self.reason


@dataclass(frozen=True, eq=False)
class Parameters:
    """A parameter tree taken apart.

    Attributes:
        treedef: its structure.
        arrays: the leaves that are arrays, in order, θ and others.
        static: for each leaf a `Static`, or None where an array goes.
        leaves: what each leaf is.
        theta: places of θ among `arrays`.
    """

    treedef: Any
    arrays: tuple[Any, ...]
    static: tuple[Static | None, ...]
    leaves: tuple[Leaf, ...]
    theta: tuple[int, ...]

    @property
    def values(self) -> list[Any]:
        """The arrays of θ, in order."""
        return [self.arrays[i] for i in self.theta]

    @property
    def size(self) -> int:
        """p, the numbers in θ."""
        return sum(leaf.size for leaf in self.leaves if leaf.is_theta)

    @property
    def paths(self) -> tuple[str, ...]:
        """Path of each array."""
        return tuple(leaf.path for leaf in self.leaves if leaf.index is not None)

    def join(self, arrays: Sequence[Any]) -> Params:
        """Put the tree together again from all of its arrays."""
        left = iter(arrays)
        return jax.tree.unflatten(self.treedef, [next(left) if leaf is None else leaf.value for leaf in self.static])

    @property
    def carried(self) -> list[Any]:
        """The arrays that are no part of θ, in order."""
        return [array for i, array in enumerate(self.arrays) if i not in self.theta]

    @property
    def told_by(self) -> tuple[Any, ...]:
        """What tells trees apart, their arrays aside."""
        return self.treedef, self.static, self.theta

    @property
    def structure(self) -> "Parameters":
        """The tree without its arrays."""
        return self.cast(lambda _: None)

    def with_theta(self, theta: Sequence[Any], carried: Sequence[Any]) -> Params:
        """Put the tree together again from θ and the arrays that are no part of it."""
        left, right = iter(theta), iter(carried)
        return self.join([next(left) if i in self.theta else next(right) for i in range(len(self.arrays))])

    def cast(self, convert: Callable[[Any], Any]) -> "Parameters":
        """Return the same tree with its arrays converted."""
        arrays = tuple(convert(array) for array in self.arrays)
        return Parameters(self.treedef, arrays, self.static, self.leaves, self.theta)


def is_array(leaf: Any) -> bool:
    """Return whether a leaf is an array, or a scalar of NumPy."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _stands_for_array(leaf: Any) -> bool:
    return is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def split(params: Params, trainable: Trainable = None) -> Parameters:
    """Take a parameter tree apart into θ and what is carried along.

    Args:
        params: pytree of parameters, Flax variables, an NNX module or state, an Equinox module; or what this function
            returned.
        trainable: pytree of booleans (a prefix of `params` will do) or a function from the path of a leaf, a tuple of
            keys such as ("dense_0", "kernel"), to a boolean; floating leaves without it are carried along. None: what
            the container says, or else all floating leaves.

    Raises:
        TypeError: for a complex leaf that would be θ, an array of text or objects, or a `trainable` that is neither.
        ValueError: for a tree of booleans that does not fit.
        NoParametersError: where no leaf is θ.

    Example:
        >>> split({"w": np.ones(2), "b": 0.5, "steps": 3}).size
        3
    """
    if isinstance(params, Parameters):
        return params
    found = jax.tree_util.tree_flatten_with_path(params)
    chosen = [""] * len(found[0]) if trainable is None else _filtered(params, found[0], trainable)
    declared = _declared(params) if trainable is None else [""] * len(found[0])
    arrays: list[Any] = []
    static: list[Static | None] = []
    leaves: list[Leaf] = []
    theta: list[int] = []
    for (path, found_leaf), filtered, said in zip(found[0], chosen, declared, strict=True):
        name, leaf = keystr(path), found_leaf
        inexact, why = _kind(name, leaf)
        why = why or filtered or said
        # Of Equinox's modules a Python float is a setting, such as a dropout rate, as `equinox.filter_grad` has it.
        array: Any = np.asarray(leaf) if inexact and not why and isinstance(leaf, float | complex) else leaf
        if not _stands_for_array(array):
            static.append(Static(leaf))
            leaves.append(Leaf(name, why, None, 0))
            continue
        if inexact and not why:
            if jnp.issubdtype(array.dtype, jnp.complexfloating):
                raise TypeError(
                    f"params{name} is complex; J Jᵀ is defined for real parameters: keep real and imaginary parts apart"
                )
            theta.append(len(arrays))
        leaves.append(Leaf(name, why, len(arrays), math.prod(array.shape)))
        static.append(None)
        arrays.append(array)
    if not theta:
        reasons = ", ".join(sorted({leaf.reason for leaf in leaves}))
        got = f"got a leaf of dtype {arrays[0].dtype}" if arrays else "and params must be a pytree of arrays, got "
        raise NoParametersError(
            f"params hold no floating arrays, {got if arrays else got + checks.shown(params)}"
            f"{f' ({reasons})' if reasons else ''}: there is nothing to differentiate by; pass the pytree that "
            "apply_fn takes first, or say with trainable= what trains"
        )
    return Parameters(found[1], tuple(arrays), tuple(static), tuple(leaves), tuple(theta))


def count_parameters(params: Params, trainable: Trainable = None) -> int:
    """Return p, the number of scalars in θ.

    Raises:
        TypeError, ValueError: as `split`.
    """
    return split(params, trainable).size


def still(params: Params) -> Params:
    """Return a tree whose arrays of NumPy are copies, as their owner may move them in place."""
    return jax.tree.map(lambda leaf: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf, params)


def strong(params: Params) -> Params:
    """Return a tree whose array leaves compute in the type that they are stored in.

    JAX lets an array made of a Python number alone, such as `jnp.full(3, 0.1)`, give way to any other floating type.
    """
    return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype) if getattr(leaf, "weak_type", False) else leaf, params)


def theta_alone(apply_fn: ApplyFn, params: Params) -> tuple[ApplyFn, Params]:
    """Return a function of a list of the arrays of θ, and that list, where a tree carries other leaves along.

    What is carried along is held as it is in `params`. Where all leaves are arrays of θ, both are returned as they are.
    """
    parts = split(params)
    leaves = jax.tree.leaves(params)
    if len(parts.theta) == len(leaves) and all(map(is_array, leaves)):
        return apply_fn, params

    def of_theta(theta: Sequence[Any], x: Any) -> Any:
        return apply_fn(parts.with_theta(theta, parts.carried), x)

    return of_theta, strong([jnp.asarray(leaf) for leaf in parts.values])


def on_theta(function: Callable[..., Any], params: Parameters) -> Callable[..., Any]:
    """Return a function of (params, ...) as one of (θ, carried, ...), both lists of arrays."""
    structure = params.structure  # values would keep functions that compute the same apart

    def of_theta(theta: Sequence[Any], carried: Sequence[Any], *args: Any) -> Any:
        return function(structure.with_theta(theta, carried), *args)

    return of_theta


def warn_of_statistics(params: Parameters) -> None:
    """Warn of leaves of θ whose names are those of running statistics."""
    for leaf in params.leaves:
        words = leaf.path.lower()
        if leaf.is_theta and any(name in words for name in _STATISTICS):
            warn(f"params{leaf.path} counts as θ, and its name is that of a running statistic")


def warn_of_unused(paths: Sequence[str]) -> None:
    """Warn of leaves of θ by which the outputs have no gradient."""
    if paths:
        names = ", ".join(f"params{path}" for path in paths)
        warn(f"the outputs do not depend on {names}, yet such leaves count as θ")


def warn(what: str) -> None:
    """Warn of a leaf, with the way out."""
    way = "leave out with trainable=, a pytree of booleans or a function of the path, what no gradient step moves"
    # The caller of a public function is above the function, and that above this module.
    warnings.warn(f"{what}; {way}", UntrainedLeafWarning, stacklevel=5)


def _kind(name: str, leaf: Any) -> tuple[bool, str]:
    """Return whether a leaf is inexact, and why it is carried along whatever the container says."""
    if not _stands_for_array(leaf):
        if isinstance(leaf, float | complex):
            return True, ""
        word = {bool: "boolean", int: "integer"}.get(type(leaf))
        return False, word or ("function" if callable(leaf) else "no number")
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return False, "random key"
    if getattr(leaf.dtype, "kind", "") in tuple("OUSMm"):
        raise TypeError(f"params{name} must hold numbers, got dtype {leaf.dtype}; convert it")
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return True, ""
    return False, "boolean" if leaf.dtype == bool else "integer"


def _filtered(params: Any, found: list[tuple[Any, Any]], trainable: Any) -> list[str]:
    """Return for each leaf why `trainable` leaves it out, empty where it does not."""
    if callable(trainable) and not isinstance(trainable, type):
        says = [trainable(keys_of(path)) for path, _ in found]
    else:
        try:
            spread = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), trainable, params)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"trainable must be a pytree of booleans like params, or a prefix of it: {error}"
            ) from None
        says = jax.tree.leaves(spread)
        if len(says) != len(found):
            raise ValueError(
                f"trainable must be a pytree of booleans like params, or a prefix of it, without None; it says "
                f"something of {len(says)} of {len(found)} leaves"
            )
    for (path, _), said in zip(found, says, strict=True):
        if not isinstance(said, bool | np.bool_):
            raise TypeError(f"trainable must give True or False for params{keystr(path)}, got {checks.shown(said)}")
    return ["" if said else "left out by trainable" for said in says]


def keys_of(path: Sequence[Any]) -> tuple[Any, ...]:
    """Return the keys of a path in plain Python: names of fields and entries, numbers of positions."""

    def key(part: Any) -> Any:
        if isinstance(part, DictKey | FlattenedIndexKey):
            return part.key
        if isinstance(part, GetAttrKey):
            return part.name
        return part.idx if isinstance(part, SequenceKey) else str(part)

    return tuple(key(part) for part in path)


def _declared(params: Any) -> list[str]:
    """Return for each leaf what its container says against its training, empty where it says nothing."""
    if _is_variables(params):
        reasons = [
            "" if name == "params" else f"in the collection {name!r}, not in params" for name in _first_keys(params)
        ]
        return [reason or deeper for reason, deeper in zip(reasons, _by_type(params), strict=True)]
    return list(_by_type(params))


def _is_variables(params: Any) -> bool:
    """Whether a tree is what Flax's `init` gives: a mapping of collections, `params` one of several."""
    if not isinstance(params, Mapping) or len(params) < 2 or "params" not in params:
        return False
    return all(isinstance(collection, Mapping) for collection in params.values())


def _first_keys(params: Any) -> list[Any]:
    return [keys_of(path)[0] for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def _by_type(params: Any) -> Iterator[str]:
    """For each leaf, what the NNX variable or the Equinox module that holds it says."""
    for node in jax.tree.leaves(params, is_leaf=lambda node: bool(_framework(type(node)))):
        framework = _framework(type(node))
        if framework == "nnx":
            kind = getattr(node, "type", type(node))
            kind = kind if isinstance(kind, type) else type(node)
            said = "" if _inherits(kind, "Param", "flax.nnx") else f"nnx.{kind.__name__}, not nnx.Param"
            yield from [said] * len(jax.tree.leaves(node))
        elif framework == "equinox":
            for leaf in jax.tree.leaves(node):
                loose = isinstance(leaf, float | complex) and not _stands_for_array(leaf)
                yield "number in an Equinox module, which trains arrays" if loose else ""
        else:
            yield ""


@functools.cache
def _framework(kind: type) -> str:
    """Whose container a node is, told by names, so that nobody needs a framework who does not use it."""
    if _inherits(kind, "Variable", "flax.nnx") or _inherits(kind, "VariableState", "flax.nnx"):
        return "nnx"
    return "equinox" if _inherits(kind, "Module", "equinox") else ""


def _inherits(kind: type, name: str, package: str) -> bool:
    return any(base.__name__ == name and base.__module__.startswith(package) for base in kind.__mro__)
