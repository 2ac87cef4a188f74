"""Bounds on the assembly of a convolutional network's kernel, against ball arithmetic with a hundred digits.

The oracle evaluates the program with dual numbers whose entries are balls (python-flint): convolutions are loops over
their definition, derivatives are forward-mode. It shares nothing with the patches and cotangents under test.
"""

import itertools
import math

import flint
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from lplr_jax import diagnostics
from lplr_jax.linalg import min_eig
from lplr_jax.ntk import empirical_ntk, engine
from lplr_jax.proofs import assembly, assembly_conv, assembly_steps
from lplr_jax.proofs.assembly import assembly_bound
from lplr_jax.proofs.assembly_steps import Activate, Bias, Contract, Part
from lplr_jax.proofs.incidence import Incidence, Rows, windows

exact = np.vectorize(lambda a: flint.arb(float(a)), otypes=[object])
U = 2.0**-53
ZERO, ONE = flint.arb(0), flint.arb(1)


def zeros(shape):
    return np.full(shape, ZERO, object)


def sizes(shape, window, strides, padding, base, spread):
    rows = zip(shape, window, strides, padding, base, spread, strict=True)
    return [((a - 1) * d + 1 + sum(p) - (w - 1) * e - 1) // s + 1 for a, w, s, p, d, e in rows]


def source(out, at, shape, strides, padding, base, spread):
    """Position in the array that entry `at` of window `out` reads, or None in padding and holes."""
    place = []
    for o, k, size, stride, (low, _), dilation, step in zip(
        out, at, shape, strides, padding, base, spread, strict=True
    ):
        position = o * stride + k * step - low
        if position % dilation or not 0 <= position // dilation < size:
            return None
        place.append(position // dilation)
    return tuple(place)


def every(shape):
    return itertools.product(*map(range, shape))


def convolve(x, w, params):
    """Values of lax.conv_general_dilated by its definition; entries may be anything with + and *."""
    numbers = params["dimension_numbers"]
    x, w = x.transpose(numbers.lhs_spec), w.transpose(numbers.rhs_spec)
    geometry = (params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"])
    grid = sizes(x.shape[2:], w.shape[2:], *geometry)
    out = np.full((x.shape[0], w.shape[0], *grid), None, object)
    groups = params["feature_group_count"]
    for b, f, *o in every(out.shape):
        total = 0 * x.flat[0] * w.flat[0]
        for i, *k in every(w.shape[1:]):
            place = source(o, k, x.shape[2:], *geometry)
            if place is not None:
                channel = f // (w.shape[0] // groups) * w.shape[1] + i
                total = total + x[(b, channel, *place)] * w[(f, i, *k)]
        out[(b, f, *o)] = total
    return out.transpose(np.argsort(numbers.out_spec))


class Dual:
    """A ball with its derivatives, (q,)."""

    def __init__(self, value, slope):
        self.value, self.slope = value, slope

    def __add__(self, other):
        return Dual(self.value + other.value, self.slope + other.slope)

    def __mul__(self, other):
        if not isinstance(other, Dual):
            return Dual(self.value * other, self.slope * flint.arb(other))
        return Dual(self.value * other.value, self.slope * other.value + other.slope * self.value)

    __rmul__ = __mul__

    def through(self, value, slope):
        return Dual(value, self.slope * slope)


def duals(values, start=0, q=None):
    """Values that are the variables start, start + 1, … of q."""
    flat = exact(values).reshape(-1)
    q = flat.size if q is None else q
    out = np.empty(flat.size, object)
    for i, value in enumerate(flat):
        slope = zeros(q)
        if start is not None:
            slope[start + i] = ONE
        out[i] = Dual(value, slope)
    return out.reshape(np.shape(values))


ACTIVATIONS = {
    "softplus": lambda a: a.through((1 + a.value.exp()).log(), 1 / (1 + (-a.value).exp())),
    "tanh": lambda a: a.through(a.value.tanh(), 1 - a.value.tanh() ** 2),
    "relu": lambda a: a.through(*((a.value, ONE) if a.value > 0 else (ZERO, ZERO))),
}


def apply_op(op, operands, activation):
    """One operation on arrays of duals."""
    a, p = operands[0], op.params
    match op.name:
        case "reshape":
            return a.reshape(p["new_sizes"])
        case "squeeze":
            return a.squeeze(p["dimensions"])
        case "transpose":
            return a.transpose(p["permutation"])
        case "rev":
            return np.flip(a, p["dimensions"])
        case "slice":
            return a[tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or [1] * a.ndim))]
        case "broadcast_in_dim":
            shape = [1] * len(p["shape"])
            for axis, size in zip(p["broadcast_dimensions"], a.shape, strict=True):
                shape[axis] = size
            return np.broadcast_to(a.reshape(shape), p["shape"])
        case "reduce_sum":
            return a.sum(axis=p["axes"])
        case "reduce_window_sum":
            geometry = (p["window_strides"], p["padding"], p["base_dilation"], p["window_dilation"])
            out = np.empty(sizes(a.shape, p["window_dimensions"], *geometry), object)
            for o in every(out.shape):
                places = (source(o, k, a.shape, *geometry) for k in every(p["window_dimensions"]))
                out[o] = sum((a[place] for place in places if place is not None), start=0 * a.flat[0])
            return out
        case "conv_general_dilated":
            return convolve(a, operands[1], p)
        case "dot_general":
            return np.tensordot(a, operands[1], p["dimension_numbers"][0])
        case "add":
            return a + operands[1]
        case "mul":
            return a * operands[1]
        case "div":
            return a * (1 / operands[1])
    return np.vectorize(ACTIVATIONS[activation], otypes=[object])(a)


def run(program, params, x, activation):
    """Every slot for one sample (1, …), as duals in all parameters."""
    q = sum(leaf.size for leaf in params)
    starts = np.cumsum([0, *(leaf.size for leaf in params)])
    env = {slot: duals(leaf, start, q) for slot, leaf, start in zip(program.params, params, starts, strict=False)}
    env[program.inputs[0]] = duals(x, None, q)
    for op in program.ops:
        operands = [env[a] if isinstance(a, int) else flint.arb(float(a.val)) for a in op.ins]
        env[op.outs[0]] = apply_op(op, operands, activation)
    return env


def norm(balls):
    """Upper bound of a 2-norm that is exact to a hundred digits."""
    return sum((ball.abs_upper() ** 2 for ball in balls), start=ZERO).sqrt().upper()


def ratio(error, limit):
    return float(error) / float(limit) if limit > 0.0 else 0.0


def oracle(apply_fn, params, x, activation):
    """Slots of every sample, exact Jacobian (n c, p), and the kernel rounded once."""
    with jax.enable_x64(True):
        program = engine.trace(apply_fn, params, x).program
    truth = [run(program, params, row[None], activation) for row in x]
    jacobian = np.array([a.slope for env in truth for a in env[program.output].flat], object)
    theta = np.array([[float(entry) for entry in row] for row in jacobian @ jacobian.T])
    return program, truth, jacobian, theta


def conv(x, w, strides, padding, spec, **settings):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=spec, **settings)


def average(h):
    # Flax divides by a NumPy integer, which strict promotion refuses in float64.
    with jax.numpy_dtype_promotion("standard"):
        return nn.avg_pool(h, (2, 2), (2, 2))


def plain(p, x):
    """Padded convolution with bias, average pooling, a dense layer."""
    h = jax.nn.softplus(conv(x, p[0], (1, 1), "SAME", ("NHWC", "HWIO", "NHWC")) + p[1].reshape(1, 1, 1, -1))
    h = average(h)
    return h.reshape(x.shape[0], -1) @ p[2] + p[3].reshape(1, -1)


def strided(p, x):
    """One dimension, strict, strides, holes, groups, and a dense layer at every position."""
    spec = ("NWC", "WIO", "NWC")
    h = jnp.tanh(conv(x, p[0], (2,), "VALID", spec, rhs_dilation=(2,), feature_group_count=2))
    h = jnp.tanh(h @ p[1] + p[2].reshape(1, 1, -1))
    return (h * 0.3).mean(axis=1)


def rectified(p, x):
    """Channels first, a transposed convolution, a residual sum, slices and reversals."""
    spec = ("NCHW", "OIHW", "NCHW")
    h = jax.nn.relu(conv(x, p[0], (1, 2), ((1, 1), (-1, 2)), spec, lhs_dilation=(1, 2)))
    h = h + jax.nn.relu(conv(h, p[1], (1, 1), "SAME", spec, feature_group_count=2) + p[2].reshape(1, -1, 1, 1))
    h = jnp.flip(h.transpose(0, 2, 3, 1), 1)[:, :, 1:]
    return h.sum(axis=(1, 2)) @ p[3]


def solid(p, x):
    """Three dimensions, one group a channel."""
    h = conv(x, p[0], (1, 2, 1), "SAME", ("NDHWC", "DHWIO", "NDHWC"), feature_group_count=2)
    return jax.nn.softplus(h).mean(axis=(1, 2, 3)) @ p[1]


def dense(p, x):
    """What the reader of fully connected networks does not take: moved weights, two biases, a skipped layer."""
    h = jnp.tanh(jnp.tanh(x @ p[0].reshape(3, 2) + p[1].reshape(1, -1) + p[2][None]))
    return h @ p[3].T + x @ p[4]


NETWORKS = {
    "plain": (plain, "softplus", (4, 4, 1), [(3, 3, 1, 2), (2,), (8, 2), (2,)]),
    "strided": (strided, "tanh", (7, 4), [(2, 2, 4), (4, 2), (2,)]),
    "rectified": (rectified, "relu", (2, 3, 3), [(2, 2, 2, 2), (2, 1, 3, 3), (2,), (2, 1)]),
    "dense": (dense, "tanh", (3,), [(6,), (2,), (2,), (2, 2), (3, 2)]),
    "solid": (solid, "softplus", (2, 3, 2, 2), [(2, 2, 1, 1, 4), (4, 1)]),
}


def network(name, n=3, seed=0):
    apply_fn, activation, shape, leaves = NETWORKS[name]
    rng = np.random.default_rng(seed)
    return apply_fn, [rng.standard_normal(a) for a in leaves], rng.standard_normal((n, *shape)), activation


def read(apply_fn, params, x):
    with jax.enable_x64(True):
        program = engine.trace(apply_fn, params, x).program
    steps = assembly_steps.read_steps(program, params)
    assert steps is not None
    return program, steps


def kernel_of(part: Part, rows, size):
    """Columns of K̂ of a part with the indices of its leaf, as balls."""
    columns = zeros((rows, size))
    if part.product is not None:
        h, delta, entries = part.product
        c = rows // len(h)
        for row in range(rows):
            outer = np.outer(exact(h[row // c]), exact(delta[row]))
            columns[row, entries.reshape(-1)] = outer.reshape(-1)
    for entries, block in part.blocks():
        columns[:, entries] = exact(block)
    return columns


@pytest.mark.parametrize("name", NETWORKS)
def test_true_errors_stay_below_their_bounds(name, monkeypatch):
    monkeypatch.setattr(assembly_steps, "_PATCH_ENTRIES", 1)
    monkeypatch.setattr(assembly_steps, "_FACTOR_ENTRIES", 1)
    monkeypatch.setattr(assembly_conv, "_BLOCK_ENTRIES", 1)
    monkeypatch.setattr(assembly_conv, "_INNER", 3)
    apply_fn, params, x, activation = network(name)
    ratios = []
    with flint.ctx.workdps(100):
        program, truth, jacobian, theta = oracle(apply_fn, params, x, activation)
        bound = assembly_bound(apply_fn, params, x, theta)
        assert bound is not None
        steps = assembly_steps.read_steps(program, params)
        assert steps is not None
        values = assembly_conv.forward(program, steps, x.reshape(len(x), -1))
        assert values is not None
        for step, (i, env) in itertools.product(steps, enumerate(truth)):
            rows = values[step.out]
            error = norm(exact(rows.value[i]) - np.array([a.value for a in env[step.out].flat], object))
            assert error <= flint.arb(float(rows.error[i]))
            ratios.append(ratio(error, rows.error[i]))
        starts = np.cumsum([0, *(leaf.size for leaf in params)])
        factor = zeros(jacobian.shape)
        parts = list(assembly_conv.backward(program, steps, values))
        assert sorted(part.leaf for part in parts) == list(range(len(params)))
        for part in parts:
            where = slice(starts[part.leaf], starts[part.leaf + 1])
            factor[:, where] = kernel_of(part, len(theta), params[part.leaf].size)
            for i, row in enumerate(factor[:, where] - jacobian[:, where]):
                assert norm(row) <= flint.arb(float(part.error[i]))
                ratios.append(ratio(norm(row), part.error[i]))
        assert math.fsum(float(e) ** 2 for part in parts for e in part.error) <= bound.factor_error**2
        # Both bounds are on Frobenius norms, which are the larger ones, up to the rounding term of the kernel.
        assert norm((factor - jacobian).flat) <= flint.arb(bound.factor_error)
        assert norm((exact(theta) - factor @ factor.T).flat) <= flint.arb(bound.assembly_error)
        kernel = jacobian @ jacobian.T
        result = min_eig(theta, **vars(bound))
        assert positive_definite(kernel - np.diag([flint.arb(result.lower)] * len(theta)))
        assert not positive_definite(kernel - np.diag([flint.arb(result.upper)] * len(theta)))
    assert result.proved
    # Not vacuous: some bound is within three digits of the truth, and together they are close to rounding.
    assert max(ratios) > 1e-3
    assert bound.assembly_error < 1e3 * U * np.trace(theta)
    assert bound.factor_error < 1e4 * U * math.sqrt(np.trace(theta))


def positive_definite(a):
    """Whether a symmetric matrix of balls is positive definite, by elimination."""
    a = a.copy()
    for i in range(len(a)):
        if not a[i, i] > 0:
            return False
        for j in range(i + 1, len(a)):
            a[j] = a[j] - a[i] * (a[j, i] / a[i, i])
    return True


@pytest.mark.parametrize("name", NETWORKS)
def test_each_step_covers_its_own_rounding_and_the_errors_it_inherits(name):
    """With exact inputs only the step's rounding is left; with inputs off by 1e-3 only what they cause counts."""
    apply_fn, params, x, activation = network(name, n=2)
    program, steps = read(apply_fn, params, x)
    values = assembly_conv.forward(program, steps, x.reshape(2, -1))
    assert values is not None
    ops = {op.outs[0]: op for op in program.ops}
    known = dict(zip(program.params, params, strict=True))
    for op in program.ops:
        if op.ins[0] in known and len(op.ins) == 1:
            with jax.enable_x64(True):
                known[op.outs[0]] = np.asarray(op.evaluate([known[op.ins[0]]])[0])
    rng = np.random.default_rng(1)
    with flint.ctx.workdps(100):
        for step, off in itertools.product(steps, (0.0, 1e-3)):
            op, given = ops[step.out], [values[slot].value for slot in step.sources]
            moved = [off * rng.standard_normal(v.shape) for v in given]
            if isinstance(step, Activate) and activation == "relu":
                moved = [0.0 * m for m in moved]  # the bound supposes that no kink is crossed
            errors = [np.linalg.norm(m, axis=1) * (1 + 1e-9) for m in moved]
            inputs = [Rows(v, e) for v, e in zip(given, errors, strict=True)]
            computed = step.forward(*inputs)
            c = 2
            delta = rng.standard_normal((2 * c, computed.value.shape[1]))
            delta_off = off * rng.standard_normal(delta.shape)
            delta_rows = Rows(delta, np.linalg.norm(delta_off, axis=1) * (1 + 1e-9))
            pulled = step.backward(delta_rows, *inputs)
            part = step.part(delta_rows, inputs[0]) if isinstance(step, Bias | Contract) else None
            columns = None if part is None else kernel_of(part, 2 * c, params[part.leaf].size)
            for i in range(2):
                width = given[0].shape[1]
                leaf = next((a for a in op.ins if isinstance(a, int) and a in known), None)
                extra = 0 if leaf is None else known[leaf].size
                operands = {
                    slot: duals((v[i] + 0).reshape(program.avals[slot].shape), 0 if j == 0 else None, width + extra)
                    for j, (slot, v) in enumerate(zip(step.sources, given, strict=True))
                }
                for slot, m in zip(step.sources, moved, strict=True):
                    for a, shift in zip(operands[slot].flat, m[i], strict=True):
                        a.value = a.value + flint.arb(shift)
                if leaf is not None:
                    operands[leaf] = duals(known[leaf], width, width + extra)
                arguments = [operands[a] if isinstance(a, int) else flint.arb(float(a.val)) for a in op.ins]
                result = apply_op(op, arguments, activation).reshape(-1)
                true = np.array([a.value for a in result], object)
                slopes = np.array([a.slope for a in result], object)
                assert norm(exact(computed.value[i]) - true) <= flint.arb(float(computed.error[i]))
                for row in range(i * c, i * c + c):
                    g = (exact(delta[row]) + exact(delta_off[row])) @ slopes
                    assert norm(exact(pulled.value[row]) - g[:width]) <= flint.arb(float(pulled.error[row]))
                    if part is not None and columns is not None:
                        where = leaf_places(program, op, params)
                        target = zeros(columns.shape[1])
                        for place, value in zip(where, g[width:], strict=True):
                            target[place] = target[place] + value
                        assert norm(columns[row] - target) <= flint.arb(float(part.error[row]))


def leaf_places(program, op, params):
    """Index in the leaf of each entry of the operand that holds it."""
    known = {slot: np.arange(leaf.size).reshape(leaf.shape) for slot, leaf in zip(program.params, params, strict=True)}
    for move in program.ops:
        if len(move.ins) == 1 and move.ins[0] in known:
            known[move.outs[0]] = np.asarray(move.evaluate([jnp.asarray(known[move.ins[0]], jnp.int32)])[0])
    slot = next(a for a in op.ins if isinstance(a, int) and a in known)
    return known[slot].reshape(-1)


@pytest.mark.parametrize("name", NETWORKS)
def test_norm_of_a_convolution_is_bounded(name):
    apply_fn, params, x, _ = network(name, n=1)
    program, steps = read(apply_fn, params, x)
    for step in steps:
        if isinstance(step, Contract):
            d = math.prod(program.avals[step.sources[0]].shape)
            matrix = step.forward(Rows(np.eye(d), np.zeros(d))).value
            (bound,) = step.forward(Rows(np.zeros((1, d)), np.ones(1))).error
            assert np.linalg.norm(matrix, 2) <= bound <= 4 * np.linalg.norm(matrix, 2)


def test_windows_with_padding_strides_and_holes():
    at, out = windows((3,), (2,), (2,), ((1, 1),), (2,), (1,))
    # 0 a 0 b 0 c 0 with holes: (pad, a), (hole, b), (hole, c)
    assert out == (3,)
    np.testing.assert_array_equal(at, [[-1, 0], [-1, 1], [-1, 2]])
    at, out = windows((2, 3), (1, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 2))
    assert out == (2, 1)
    np.testing.assert_array_equal(at, [[0, 2], [3, 5]])


def test_norm_of_an_incidence_is_bounded():
    index = np.array([[0, 1, 2], [2, 3, -1], [-1, -1, -1]])
    matrix = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], float)
    incidence = Incidence(index, 5)
    assert (incidence.fan_in, incidence.fan_out) == (3, 2)
    assert np.linalg.norm(matrix, 2) <= incidence.norm <= math.sqrt(6) * (1 + 1e-5)
    np.testing.assert_array_equal(incidence.values(np.eye(5)), matrix.T)
    np.testing.assert_array_equal(incidence.transposed_values(np.eye(3)), matrix)


class Net(nn.Module):
    norm: str = ""

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(4, (3, 3), strides=2)(x)
        # Flax takes the statistics of float64 values in float32, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            h = {"group": nn.GroupNorm(2), "layer": nn.LayerNorm()}.get(self.norm, lambda h: h)(h)
        h = nn.max_pool(h, (2, 2)) if self.norm == "max" else nn.softplus(h)
        h = nn.softplus(nn.Conv(8, (3, 3))(h))
        return nn.Dense(1)(average(h).reshape(x.shape[0], -1))


def spread(p, x, **settings):
    return conv(x, p[0], (1,), "SAME", ("NWC", "WIO", "NWC"), **settings)


W = np.ones((3, 2, 2))
X = np.ones((2, 4, 2))


@pytest.mark.parametrize(
    ("apply_fn", "params", "x"),
    [
        (lambda p, x: jnp.sin(spread(p, x)).sum(axis=1), [W], X),
        (lambda p, x: spread(p, spread(p, x)).sum(axis=1), [W], X),
        (lambda p, x: jnp.maximum(spread(p, x), 0.5).sum(axis=1), [W], X),
        (lambda p, x: (spread(p, x) * spread(p[1:], x)).sum(axis=1), [W, W], X),
        (lambda p, x: (spread(p, x) + jnp.array([[[1.0, 2.0]]])).sum(axis=1), [W], X),
        (lambda p, x: (spread(p, x) * p[1].reshape(1, 1, 2)).sum(axis=1), [W, np.ones(2)], X),
        (lambda p, x: (1.0 / spread(p, x)).sum(axis=1), [W], X),
        (lambda p, x: (spread(p, x) - x).sum(axis=1), [W], X),
        (lambda p, x: spread([p[0][:, :, :2]], x).sum(axis=1), [np.ones((3, 2, 3))], X),
        (lambda p, x: spread(p, x.repeat(2, axis=0), batch_group_count=2).sum(axis=1), [W], X),
        (lambda p, x: spread(p, x).astype(jnp.float32).sum(axis=1), [W], X),
        (lambda p, x: spread(p, x).sum(axis=1) * p[1], [W, 2], X),
    ],
)
def test_programs_with_a_step_without_a_bound_have_none(apply_fn, params, x):
    assert assembly_bound(apply_fn, params, x, np.eye(4), proof="never") is None


def test_overflow_has_no_bound():
    assert assembly_bound(lambda p, x: spread(p, x * 1e200).sum(axis=1), [W * 1e200], X, np.eye(4)) is None


@pytest.mark.parametrize("norm", ["group", "layer", "max"])
def test_layers_without_a_bound_have_none(norm):
    model, x = Net(norm), np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(x)))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    assert assembly_bound(model.apply, params, x, np.eye(2), proof="never") is None


def test_black_corners_are_no_kink_under_a_zero_bias():
    def apply_fn(p, x):
        h = jax.nn.relu(conv(x, p[0], (1, 1), "SAME", ("NHWC", "HWIO", "NHWC")) + p[1].reshape(1, 1, 1, -1))
        h = jax.nn.relu(conv(h, p[2], (1, 1), "SAME", ("NHWC", "HWIO", "NHWC")))
        return h.mean(axis=(1, 2))

    rng = np.random.default_rng(0)
    params = [rng.standard_normal((3, 3, 1, 2)), np.zeros(2), rng.standard_normal((3, 3, 2, 2))]
    x = rng.standard_normal((2, 6, 6, 1))
    x[:, 2:] = 0.0
    with flint.ctx.workdps(100):
        _, _, _, theta = oracle(apply_fn, params, x, "relu")
    bound = assembly_bound(apply_fn, params, x, theta)
    assert bound is not None
    # The oracle's slope at zero is 0, as that of JAX.
    assert jax.grad(jax.nn.relu)(0.0) == 0.0
    assert bound.assembly_error < 1e-10 * np.trace(theta)
    near = [params[0], np.full(2, -1e-17), params[2]]
    assert assembly_bound(apply_fn, near, x, theta, proof="never") is None
    # More digits tell on which side of the kink it is.
    assert assembly_bound(apply_fn, near, x, theta).assembly_error < 1e-10 * np.trace(theta)


def test_the_engine_s_kernel_is_proved_and_a_wrong_one_is_charged_for_its_distance():
    apply_fn, params, x, _ = network("plain")
    theta = np.array(empirical_ntk(apply_fn, params, x))
    result = diagnostics.certified_min_eig(apply_fn, params, x, theta)
    assert result.proved
    assert set(assembly.ASSUMPTIONS) < set(result.assumptions)
    assert result.lower > 0
    assert 0 < result.assembly_error < 1e3 * U * np.trace(theta)
    theta[0, 0] += 1e-3
    bound = assembly_bound(apply_fn, params, x, theta)
    assert bound is not None
    assert bound.assembly_error == pytest.approx(1e-3, rel=1e-3)


class Digits(nn.Module):
    activation: str

    @nn.compact
    def __call__(self, x):
        sigma = getattr(jax.nn, self.activation)
        h = average(sigma(nn.Conv(8, (3, 3))(x)))
        h = average(sigma(nn.Conv(16, (3, 3))(h)))
        h = sigma(nn.Conv(16, (3, 3))(h))
        return nn.Dense(1)(h.reshape(x.shape[0], -1))


@pytest.mark.slow
def test_relative_width_on_a_thousand_digits():
    from lplr_jax import data

    x = np.asarray(data.load("mnist").x).reshape(1000, 28, 28, 1)
    # The kernel of the softplus network has λ_max / λ_min = 1e12, and factorisation alone leaves a tenth of λ_min open.
    model = Digits("relu")
    params = model.init(jax.random.key(0), x[:1])
    result = diagnostics.empirical_ntk_min_eig(model.apply, params, x)
    assert result.proved
    assert result.lower > 0
    assert (result.upper - result.lower) / result.value <= 1e-5
