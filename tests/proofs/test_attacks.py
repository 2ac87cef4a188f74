"""Random small networks of every kind of layer, their Jacobians enclosed and held against sixty decimal digits.

The oracle evaluates the program that JAX traces of the derivative on arrays of mpmath numbers, entry by entry, with
mpmath's own functions: of the arithmetic under test it shares nothing.
"""

import itertools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax import lax

from lplr_jax import layouts, linalg, parameters
from lplr_jax.proofs import jacobian
from lplr_jax.proofs.assembly import bound_or_reason
from lplr_jax.proofs.fixed import UndecidedError

DIGITS = 60
CALLS = {"jit", "pjit", "custom_jvp_call", "custom_vjp_call", "remat", "remat2", "checkpoint", "closed_call"}


def mpf(a):
    array = np.asarray(a)
    if array.dtype.kind != "f":
        return array
    return (
        np.asarray(np.frompyfunc(lambda value: mpmath.mpf(float(value)), 1, 1)(array), object) if array.size else array
    )


def each(function):
    return lambda eqn, *ins: np.frompyfunc(function, len(ins), 1)(*ins)


def compare(function):
    return lambda eqn, a, b: np.asarray(np.frompyfunc(function, 2, 1)(a, b)).astype(bool)


def contracted(eqn, a, b):
    (of_a, of_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    of = [""] * a.ndim, [""] * b.ndim
    for pairs in (zip(batch_a, batch_b, strict=True), zip(of_a, of_b, strict=True)):
        for i, j in pairs:
            of[0][i] = of[1][j] = next(letters)
    out = [of[0][i] for i in batch_a]
    for side, array in zip(of, (a, b), strict=True):
        for i in range(array.ndim):
            if not side[i]:
                side[i] = next(letters)
                out.append(side[i])
    return np.einsum(f"{''.join(of[0])},{''.join(of[1])}->{''.join(out)}", a, b)


def convolved(eqn, x, w):
    """By the definition, output by output."""
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    x, w = x.transpose(numbers.lhs_spec), w.transpose(numbers.rhs_spec)
    out = np.zeros([eqn.outvars[0].aval.shape[i] for i in numbers.out_spec], object)
    groups, batches = p["feature_group_count"], p["batch_group_count"]
    for at in itertools.product(*map(range, out.shape)):
        n, o, place, total = at[0], at[1], at[2:], mpmath.mpf(0)
        group = o // (w.shape[0] // max(groups, batches))
        for inner in itertools.product(*map(range, w.shape[1:])):
            c, window = inner[0], inner[1:]
            where = []
            for k, i, stride, (low, _), spread, step, size in zip(
                window, place, p["window_strides"], p["padding"], p["rhs_dilation"], p["lhs_dilation"], x.shape[2:],
                strict=True,
            ):  # fmt: skip
                position = i * stride + k * spread - low
                if position % step or not 0 <= position // step < size:
                    break
                where.append(position // step)
            else:
                sample = n + group * (x.shape[0] // batches) if batches > 1 else n
                channel = c + group * w.shape[1] if groups > 1 else c
                total += x[(sample, channel, *where)] * w[(o, *inner)]
        out[at] = total
    return out.transpose(np.argsort(numbers.out_spec))


def windowed(eqn, x):
    p = eqn.params
    padded = np.full([n + low + high for n, (low, high) in zip(x.shape, p["padding"], strict=True)], None)
    padded[tuple(slice(low, low + n) for n, (low, _) in zip(x.shape, p["padding"], strict=True))] = x
    out = np.zeros(eqn.outvars[0].aval.shape, object)
    for at in itertools.product(*map(range, out.shape)):
        start = [i * s for i, s in zip(at, p["window_strides"], strict=True)]
        held = padded[tuple(slice(i, i + n) for i, n in zip(start, p["window_dimensions"], strict=True))]
        out[at] = max(value for value in held.reshape(-1) if value is not None)
    return out


def scattered(eqn, source, x):
    p, out = eqn.params, np.full(x.shape, mpmath.mpf(0), object)
    for at in itertools.product(*map(range, source.shape)):
        best = None
        for k in itertools.product(*map(range, p["window_dimensions"])):
            where = tuple(
                i * s + j - low for i, s, j, (low, _) in zip(at, p["window_strides"], k, p["padding"], strict=True)
            )
            if all(0 <= i < n for i, n in zip(where, x.shape, strict=True)) and (best is None or x[where] > x[best]):
                best = where
        out[best] += source[at]
    return out


def gathered(eqn, *ins):
    """Where entries come from is asked of JAX, with their numbers in their place."""
    x, rest = ins[0], ins[1:]
    index = np.arange(1, x.size + 1, dtype=np.float64).reshape(x.shape)
    found = np.asarray(layouts.bind(eqn, [index, *rest])[0]).astype(np.int64)
    return np.concatenate([[mpmath.mpf(0)], x.reshape(-1)])[found]


def scatter_added(eqn, x, index, updates):
    out = x.copy()
    for k in range(updates.size):
        one = np.zeros(updates.size)
        one[k] = 1.0
        hits = np.asarray(layouts.bind(eqn, [np.zeros(x.shape), index, one.reshape(updates.shape)])[0])
        for at in zip(*np.nonzero(hits), strict=True):
            out[at] += updates.reshape(-1)[k]
    return out


def reduced(function):
    def rule(eqn, x):
        axes = eqn.params["axes"]
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        flat = x.transpose(*kept, *axes).reshape(*(x.shape[axis] for axis in kept), -1)
        return np.frompyfunc(lambda i: function(flat.reshape(-1, flat.shape[-1])[i]), 1, 1)(
            np.arange(flat[..., 0].size).reshape(flat.shape[:-1])
        )

    return rule


def moved(eqn, x):
    index = np.arange(x.size, dtype=np.float64).reshape(x.shape)
    return x.reshape(-1)[np.asarray(layouts.bind(eqn, [index])[0]).astype(np.int64)]


def padded(eqn, x, value):
    index = np.arange(1, x.size + 1, dtype=np.float64).reshape(x.shape)
    found = np.asarray(layouts.bind(eqn, [index, np.float64(0)])[0]).astype(np.int64)
    return np.concatenate([[value[()] if isinstance(value, np.ndarray) else value], x.reshape(-1)])[found]


RULES = {
    **{name: each(lambda a, b: a + b) for name in ("add", "add_any")},
    "sub": each(lambda a, b: a - b),
    "mul": each(lambda a, b: a * b),
    "div": each(lambda a, b: a / b),
    "max": each(max),
    "min": each(min),
    "neg": each(lambda a: -a),
    "abs": each(abs),
    "sign": each(lambda a: mpmath.sign(a)),
    "square": each(lambda a: a * a),
    "one_minus_square": each(lambda a: 1 - a * a),
    "integer_pow": lambda eqn, a: np.frompyfunc(lambda v: v ** eqn.params["y"], 1, 1)(a),
    "exp": each(mpmath.exp),
    "log": each(mpmath.log),
    "log1p": each(mpmath.log1p),
    "expm1": each(mpmath.expm1),
    "tanh": each(mpmath.tanh),
    "logistic": each(lambda a: 1 / (1 + mpmath.exp(-a))),
    "erf": each(mpmath.erf),
    "erfc": each(mpmath.erfc),
    "sin": each(mpmath.sin),
    "cos": each(mpmath.cos),
    "sqrt": each(mpmath.sqrt),
    "rsqrt": each(lambda a: 1 / mpmath.sqrt(a)),
    "gt": compare(lambda a, b: a > b),
    "ge": compare(lambda a, b: a >= b),
    "lt": compare(lambda a, b: a < b),
    "le": compare(lambda a, b: a <= b),
    "eq": compare(lambda a, b: a == b),
    "ne": compare(lambda a, b: a != b),
    "select_n": lambda eqn, which, *cases: np.choose(
        np.broadcast_to(which, cases[0].shape).astype(int), [np.asarray(case, object) for case in cases]
    ),
    "stop_gradient": lambda eqn, a: a,
    "copy": lambda eqn, a: a,
    "copy_p": lambda eqn, a: a,
    "is_finite": lambda eqn, a: np.ones(np.shape(a), bool),
    "reduce_sum": reduced(lambda v: mpmath.fsum(v)),
    "reduce_max": reduced(max),
    "reduce_window_max": windowed,
    "select_and_scatter_add": scattered,
    "dot_general": contracted,
    "conv_general_dilated": convolved,
    "gather": gathered,
    "scatter-add": scatter_added,
    "scatter_add": scatter_added,
    "pad": padded,
    "concatenate": lambda eqn, *xs: np.concatenate(xs, axis=eqn.params["dimension"]),
    "split": lambda eqn, a: np.split(a, np.cumsum(eqn.params["sizes"])[:-1], axis=eqn.params["axis"]),
    "convert_element_type": lambda eqn, a: a,
}
MOVES = {"broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "slice", "rev"}


def evaluate(closed, args):
    """Evaluate a program on mpmath numbers; whole numbers and truth values by JAX."""
    closed = closed if isinstance(closed, jex.ClosedJaxpr) else jex.ClosedJaxpr(closed, ())
    env = dict(zip(closed.jaxpr.constvars, map(mpf, closed.consts), strict=True))
    env.update(zip(closed.jaxpr.invars, args, strict=True))
    read = lambda var: mpf(var.val) if isinstance(var, jex.Literal) else env[var]  # noqa: E731
    for eqn in closed.jaxpr.eqns:
        ins = [read(var) for var in eqn.invars]
        name, floats = eqn.primitive.name, any(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.invars)
        if name == "custom_jvp_call" and "exp_neg_sq at" in str(eqn.params["call_jaxpr"].jaxpr.debug_info):
            # JAX's e^(-x²) by the bits of x: the number that is meant.
            outs = [np.frompyfunc(lambda v: mpmath.exp(-v * v), 1, 1)(ins[0])]
        elif name in CALLS:
            outs = evaluate(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), ins)
        elif not floats:
            outs = [mpf(out) for out in layouts.bind(eqn, ins)]
        elif name in MOVES:
            outs = [moved(eqn, np.asarray(ins[0], object))]
        else:
            outs = RULES[name](eqn, *ins)
            outs = outs if isinstance(outs, list) else [outs]
        env.update(zip(eqn.outvars, [np.asarray(out) for out in outs], strict=True))
    return [read(var) for var in closed.jaxpr.outvars]


# Networks.


def normal(rng, *shape):
    return rng.normal(size=shape) * rng.choice([1e-4, 0.3, 1.0, 3.0], p=[0.05, 0.35, 0.5, 0.1])


ACTIVATIONS = [
    jax.nn.relu, jax.nn.silu, jax.nn.gelu, lambda z: jax.nn.gelu(z, approximate=False), jax.nn.softplus, jnp.tanh,
    jax.nn.sigmoid, jax.nn.elu, jnp.sin, lambda z: z * jax.nn.sigmoid(1.7 * z), jnp.abs, jax.nn.leaky_relu,
]  # fmt: skip


def layer_norm(z, scale):
    centred = z - z.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * scale.reshape(1, -1)


def rms_norm(z, scale):
    return z / jnp.sqrt((z**2).mean(axis=-1, keepdims=True) + 1e-6) * scale.reshape(1, -1)


def fast_norm(z, scale):
    mean, square = z.mean(axis=-1, keepdims=True), (z * z).mean(axis=-1, keepdims=True)
    variance = jnp.maximum(0.0, square - mean * mean)
    return (z - mean) * jax.lax.rsqrt(variance + 1e-5) * scale.reshape(1, -1)


def dense_network(rng):
    width, activations = int(rng.integers(2, 5)), rng.choice(len(ACTIVATIONS), 2)
    norm = [layer_norm, rms_norm, fast_norm][rng.integers(3)]
    params = [normal(rng, 3, width), normal(rng, width), normal(rng, width, width), normal(rng, width, 2)]

    def apply_fn(p, x):
        h = ACTIVATIONS[activations[0]](norm(x @ p[0], p[1]))
        return (h + ACTIVATIONS[activations[1]](h @ p[2])) @ p[3]

    return apply_fn, params, normal(rng, 2, 3)


def convolutional(rng):
    stride, dilation = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    activation, pool = ACTIVATIONS[rng.integers(len(ACTIVATIONS))], bool(rng.integers(2))
    groups = int(rng.integers(1, 3))
    params = [normal(rng, 2, 2, 2 // groups, 2), normal(rng, 2), normal(rng, 2)]

    def apply_fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        h = lax.conv_general_dilated(
            x, p[0], (stride, 1), "SAME", rhs_dilation=(1, dilation), dimension_numbers=numbers,
            feature_group_count=groups,
        )  # fmt: skip
        h = activation(h + p[1].reshape(1, 1, 1, -1))
        if pool:
            h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 2, 1), "SAME")
        return (h.mean(axis=(1, 2)) * p[2].reshape(1, -1)).sum(axis=1)

    return apply_fn, params, normal(rng, 2, 3, 3, 2)


def attention(rng):
    width, masked = int(rng.integers(2, 4)), bool(rng.integers(2))
    params = [normal(rng, 4, width), normal(rng, width, 3 * width), normal(rng, width), normal(rng, width, 2)]

    def apply_fn(p, tokens):
        h = p[0][tokens]
        query, key, value = jnp.split(jax.vmap(lambda row: layer_norm(row, p[2]))(h) @ p[1], 3, axis=-1)
        scores = jnp.einsum("nie,nje->nij", query, key) * width**-0.5
        if masked:
            low = jnp.finfo(scores.dtype).min
            scores = jnp.where(jnp.tril(jnp.ones((3, 3), bool))[None], scores, low)
        h = h + jax.nn.softmax(scores) @ value
        return (h @ p[3])[:, -1]

    return apply_fn, params, rng.integers(0, 4, (2, 3)).astype(np.int32)


def tied(rng):
    params = {"w": normal(rng, 3, 3), "s": normal(rng, 3)}
    activation = ACTIVATIONS[rng.integers(len(ACTIVATIONS))]

    def apply_fn(p, x):
        w = p["w"] / jnp.sqrt((p["w"] ** 2).sum(axis=0, keepdims=True) + 1e-3) * p["s"].reshape(1, -1)
        h = x
        for _ in range(3):
            h = activation(h @ w) + h
        return jnp.log1p(jnp.exp(h @ w.T))[:, :2]

    return apply_fn, params, normal(rng, 2, 3)


KINDS = [dense_network, convolutional, attention, tied]


def attack(seed, kind):
    """Enclose a random network; return whether it was decided."""
    apply_fn, params, x = kind(np.random.default_rng(seed))
    with jax.enable_x64(True):
        split = parameters.split(params)
        closed = jacobian.traced(apply_fn, split, x)
        c = closed.out_avals[0].shape[1]
        exact = []
        with mpmath.workdps(DIGITS):
            for i in range(len(x)):
                found = evaluate(closed, [*map(mpf, split.arrays), mpf(x[i : i + 1])])
                exact.append([np.asarray(leaf, object).reshape(c, -1) for leaf in found])
        for i in range(len(x)):
            try:
                rows = jacobian.sample_rows(closed, split.arrays, [x[i : i + 1]])
            except UndecidedError:
                return False
            with mpmath.workdps(DIGITS):
                for part, error, truth in zip(rows.leaves, rows.errors, exact[i], strict=True):
                    for row, bound, precise in zip(part, error, truth, strict=True):
                        off = mpmath.sqrt(
                            mpmath.fsum((mpmath.mpf(float(a)) - b) ** 2 for a, b in zip(row, precise, strict=True))
                        )
                        assert off <= mpmath.mpf(float(bound)), (seed, kind.__name__, off, bound)
        with mpmath.workdps(DIGITS):
            j = mpmath.matrix(np.concatenate([np.concatenate(rows, axis=1) for rows in exact]).tolist())
            theta = j * j.T
            least = min(mpmath.eigsy(theta, eigvals_only=True))
        given = np.array(theta.tolist(), dtype=float)
        rng = np.random.default_rng(seed)
        given = given * (1 + 1e-9 * rng.choice([0.0, 1.0]) * rng.normal(size=given.shape))
        given = 0.5 * (given + given.T)
        bound, why = bound_or_reason(apply_fn, split, x, given, proof="always")
        assert bound is not None, why
        found = linalg.min_eig(given, assembly_error=bound.assembly_error, factor_error=bound.factor_error)
        with mpmath.workdps(DIGITS):
            assert mpmath.mpf(found.lower) <= least <= mpmath.mpf(found.upper), (seed, kind.__name__)
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_networks_are_held(kind):
    assert sum(attack(seed, kind) for seed in range(2)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_networks_are_held(kind):
    decided = [attack(seed, kind) for seed in range(100, 160)]
    assert sum(decided) >= 57  # a kink that is hit exactly, as by |z| at 0, has a slope; few are out of range


def test_what_is_far_below_by_rounding_alone_is_not_proved():
    """Float64 takes e^t for 0 where t = 0: the exact kernel is zero, and the computed one is not."""
    size, step = 1e26, 2.0**32  # a quarter of a unit in the last place of 10²⁶, a hundred times
    params = {
        "head": np.zeros(2),
        "sum": np.array(size),
        "steps": np.full(100, step),
        "start": np.array(-(size + 100 * step)),
    }
    assert params["start"] + size == -100 * step

    def apply_fn(p, x):
        total = p["sum"]
        for i in range(100):
            total = total + p["steps"][i]
        return (x @ p["head"]) * (1 - jnp.exp(p["start"] + total))

    x = np.array([[1.0, 0.0], [0.0, 2.0]])
    with jax.enable_x64(True):
        bound, why = bound_or_reason(apply_fn, params, x, np.diag([1.0, 4.0]), proof="always")
    assert bound is None or bound.kernel_error(np.diag([1.0, 4.0])) >= 4.0
    assert "a large number is added to one that masks something out" in why
