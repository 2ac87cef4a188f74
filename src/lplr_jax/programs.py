"""Traced functions told apart by what they compute, so that compiled code is found again by it and by nothing else.

A function is traced anew at every public call: what it reads beside its arguments may have changed since the last one.
Its program (the jaxpr) is the key under which compiled code is kept; captured arrays are arguments of it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from lplr_jax import closures, layouts
from lplr_jax.closures import Same

CUSTOM_RULES = {
    "custom_jvp_call": ("jvp_jaxpr_fun",),
    "custom_vjp_call": ("fwd_jaxpr_thunk", "bwd", "out_trees"),
}
"""Primitives that carry a derivative rule of their own, and the settings in which they hold it."""

# Here rules are functions of modules, which read nothing but their arguments.
_RULES_OF_JAX = tuple(str(Path(jax.__file__).parent / "_src" / name) for name in ("nn", "numpy", "scipy", "lax/other"))
_MAX_KEPT = 64


def digest(array: Any) -> Hashable:
    """Return what tells an array from others: shape, dtype and contents."""
    if jnp.issubdtype(jnp.result_type(array), jax.dtypes.extended):
        return str(array.dtype), digest(jax.random.key_data(array))
    host = np.ascontiguousarray(np.asarray(array))
    if host.nbytes <= 64:
        return host.shape, host.dtype.name, host.tobytes()
    return (
        host.shape,
        host.dtype.name,
        hashlib.blake2b(host.reshape(-1).view(np.uint8).data, digest_size=16).digest(),
    )


def key(closed: Any, *, rules: bool) -> Hashable:
    """Return what a program computes, whatever its captured arrays hold, as something to look it up by.

    Args:
        closed: what `jax.make_jaxpr` returned.
        rules: whether derivative rules of its own count, for a program that will be differentiated.
    """
    return _jaxpr_key(closed.jaxpr, rules)


def _jaxpr_key(jaxpr: Any, rules: bool) -> Hashable:
    numbers: dict[Any, int] = {}

    def atom(var: Any) -> Hashable:
        if isinstance(var, jex.Literal):
            return _value_key(var.val, rules), _aval_key(var.aval)
        return numbers[var]

    for var in (*jaxpr.constvars, *jaxpr.invars):
        numbers[var] = len(numbers)
    inputs = tuple(_aval_key(var.aval) for var in numbers)
    equations = []
    for eqn in jaxpr.eqns:
        ins = tuple(atom(var) for var in eqn.invars)
        outs = tuple(_aval_key(var.aval) for var in eqn.outvars)
        for var in eqn.outvars:
            numbers[var] = len(numbers)
        equations.append((eqn.primitive.name, ins, outs, equation_key(eqn, rules=rules)))
    return inputs, tuple(equations), tuple(atom(var) for var in jaxpr.outvars)


def _aval_key(aval: Any) -> Hashable:
    return getattr(aval, "shape", ()), getattr(aval, "dtype", aval), getattr(aval, "weak_type", False)


def equation_key(eqn: Any, *, rules: bool) -> Hashable:
    """Return the settings of an equation as something to compare."""
    held = CUSTOM_RULES.get(eqn.primitive.name, ())
    settings = tuple((name, _value_key(eqn.params[name], rules)) for name in sorted(eqn.params) if name not in held)
    return (settings, rule_key(eqn)) if held and rules else settings


def rule_key(eqn: Any) -> Hashable:
    """Return what the derivative rule of an equation computes."""
    infos = tuple(
        getattr(getattr(part, "debug_info", None), "func_src_info", None) or ""
        for part in (eqn.params["call_jaxpr"].jaxpr, eqn.params.get("jvp_jaxpr_fun"))
    )
    if all(info.partition(" at ")[2].startswith(_RULES_OF_JAX) for info in infos):
        return infos
    try:
        derivative = _jvp if eqn.primitive.name == "custom_jvp_call" else vjp_of_equation
        return key(derivative(eqn), rules=False)  # differentiated already
    except Exception:  # a rule that cannot be traced by itself equals no other
        return Same(eqn)


def _operands(eqn: Any) -> tuple[list[Any], list[int]]:
    specs = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.invars]
    return specs, [i for i, spec in enumerate(specs) if jnp.issubdtype(spec.dtype, jnp.inexact)]


def _of_moving(eqn: Any, moving: list[int], operands: Sequence[Any]) -> Callable[..., Any]:
    def function(*values: Any) -> list[Any]:
        every = list(operands)
        for i, value in zip(moving, values, strict=True):
            every[i] = value
        out = layouts.bind(eqn, every)
        return [leaf for leaf in out if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    return function


def _jvp(eqn: Any) -> Any:
    specs, moving = _operands(eqn)

    def derivative(operands: list[Any], tangents: list[Any]) -> Any:
        return jax.jvp(_of_moving(eqn, moving, operands), [operands[i] for i in moving], tangents)

    return jax.make_jaxpr(derivative)(specs, [specs[i] for i in moving])


def vjp_of_equation(eqn: Any) -> Any:
    """Trace the reverse-mode derivative of one equation by its inexact operands; raises where it has none."""
    specs, moving = _operands(eqn)
    results = [
        jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
        for var in eqn.outvars
        if jnp.issubdtype(var.aval.dtype, jnp.inexact)
    ]

    def derivative(operands: list[Any], cotangents: list[Any]) -> Any:
        return jax.vjp(_of_moving(eqn, moving, operands), *[operands[i] for i in moving])[1](cotangents)

    return jax.make_jaxpr(derivative)(specs, results)


def _value_key(value: Any, rules: bool) -> Hashable:
    if value is None or isinstance(value, str | bytes):
        return value
    if isinstance(value, bool | int | float | complex) and not isinstance(value, np.generic):
        # 1, 1.0 and True are equal, and -0.0 equals 0.0.
        return type(value).__name__, repr(value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return digest(value)
    if isinstance(value, tuple | list):
        return type(value).__name__, tuple(_value_key(part, rules) for part in value)
    if isinstance(value, dict):
        return tuple(sorted((repr(name), _value_key(part, rules)) for name, part in value.items()))
    if isinstance(value, jex.ClosedJaxpr):
        return _jaxpr_key(value.jaxpr, rules), tuple(_value_key(const, rules) for const in value.consts)
    if isinstance(value, jex.Jaxpr):
        return _jaxpr_key(value, rules)
    try:
        hash(value)
    except TypeError:
        return Same(value)
    return type(value).__name__, value


def identity(value: Any) -> Hashable:
    """Return a value to be compared by what it holds, or by being itself where it cannot be."""
    return _value_key(value, rules=False)


class Key:
    """A nested key that is hashed once."""

    __slots__ = ("_hash", "_value")

    def __init__(self, value: Hashable) -> None:
        self._value, self._hash = value, hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Key) and self._hash == other._hash and self._value == other._value


class Kept:
    """The last few things made, by key."""

    def __init__(self, most: int = _MAX_KEPT) -> None:
        self._most = most
        self._known: OrderedDict[Hashable, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: Hashable) -> bool:
        return name in self._known

    def __getitem__(self, name: Hashable) -> Any:
        self._known.move_to_end(name)
        return self._known[name]

    def values(self) -> list[Any]:
        """Return all that is kept."""
        return list(self._known.values())

    def clear(self) -> None:
        """Let everything go."""
        self._known.clear()

    def put(self, name: Hashable, made: Any) -> None:
        """Keep something, and let go what was asked for longest ago."""
        self._known[name] = made
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def get(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """Return what was made under this key, made now where nothing was."""
        if name not in self:
            self.put(name, make())
        return self[name]


class Found(NamedTuple):
    """A traced function.

    Attributes:
        function: of (consts, *args), the same object for the same program.
        consts: the arrays that it captures.
        out: what its result looks like.
    """

    function: Callable[..., Any]
    consts: list[Any]
    out: Any


_functions, _found = Kept(), Kept()
# Settings of JAX that change what is traced.
_OPTIONS = (
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_default_prng_impl",
    "jax_default_matmul_precision",
)


def name_of(fn: Any, *args: Any) -> Hashable | None:
    """Return what the trace of a function depends on, None where that may change unseen.

    Args:
        fn: the function, with anything else that is told by value.
        *args: pytrees of arrays, of which shapes and dtypes count.
    """
    known = closures.fingerprint(fn)
    if known is None:
        return None
    leaves, tree = jax.tree.flatten(args)
    shapes = tuple((np.shape(leaf), _dtype(leaf)) for leaf in leaves)
    return Key((known, shapes, identity(tree), tuple(getattr(jax.config, option) for option in _OPTIONS)))


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else jnp.result_type(leaf)


def find(fn: Callable[..., Any], *args: Any, told_by: Any = None) -> Found:
    """Trace a function, and return the one that was traced before where both compute the same.

    It is traced anew unless all that it reads beside its arguments is known not to have changed.

    Args:
        fn: function of pytrees of arrays.
        *args: its arguments, or their shapes and dtypes.
        told_by: what tells the function apart, where it is made afresh of others at every call: those others.

    Returns:
        The function, fit for a static argument of `jax.jit`, and the arrays that `fn` captures, its first argument.

    Example:
        >>> scale = {"by": 2.0}
        >>> first = find(lambda x: x * scale["by"], np.ones(2)).function
        >>> first is find(lambda x: x * 2.0, np.ones(2)).function
        True
        >>> scale["by"] = 3.0
        >>> first is find(lambda x: x * scale["by"], np.ones(2)).function
        False
    """
    told_by = fn if told_by is None else told_by
    before = name_of(told_by, *args)
    if before in _found:
        return _found[before]
    leaves, tree = jax.tree.flatten(args)
    closed, out = jax.make_jaxpr(lambda *flat: fn(*jax.tree.unflatten(tree, flat)), return_shape=True)(*leaves)
    refuse_tracers(closed.consts)
    refuse_missing_mode(closed)
    out_tree, jaxpr = jax.tree.structure(out), closed.jaxpr

    def make() -> Callable[..., Any]:
        def function(consts: Sequence[Any], *values: Any) -> Any:
            flat = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, list(consts)))(*jax.tree.leaves(values))
            return jax.tree.unflatten(out_tree, flat)

        return function

    function = _functions.get((tree, out_tree, key(closed, rules=True)), make)
    found = Found(function, [jnp.asarray(const) for const in closed.consts], out)
    after = name_of(told_by, *args)  # what the function itself has written is no change from outside
    if after is not None:
        _found.put(after, found)
    return found


def refuse_missing_mode(closed: Any) -> None:
    """Refuse a program that was traced through a derivative which does not exist; JAX says so when it is compiled.

    Raises:
        TypeError: if it is one.
    """

    def missing(jaxpr: Any) -> bool:
        return any(
            eqn.primitive.name == "custom_lin"
            or any(missing(getattr(body, "jaxpr", body)) for body in jex.jaxprs_in_params(eqn.params))
            for eqn in jaxpr.eqns
        )

    if missing(closed.jaxpr):
        raise TypeError("a function with a reverse-mode rule of its own (custom_vjp) has no forward mode")


def refuse_tracers(leaves: Sequence[Any]) -> None:
    """Refuse values that JAX is tracing.

    Raises:
        TypeError: if there is one.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise TypeError(
            "kernels and spectra are computed on the host from arrays with values, so this function cannot run inside "
            "jax.jit, jax.vmap, jax.grad or jax.lax.map; call it outside, and for several params or data sets in a "
            "Python loop"
        )


# Precision inside a program.


def widest(*dtypes: Any) -> Any:
    """Return the floating type with the most digits, float32 at least where some have half precision."""
    halves = [np.dtype(np.float32)] if len(set(dtypes)) > 1 else []
    return max((*map(jnp.dtype, dtypes), *halves), key=lambda dtype: jnp.finfo(dtype).nmant)
