"""Programs that are shown to treat their samples apart: networks of every kind, what mixes them, random programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lplr_jax import parameters
from lplr_jax.ntk import empirical_ntk, separation
from lplr_jax.ntk.coupling import FEW
from lplr_jax.ntk.traced import trace

N = 4  # samples, as many as some axes have entries


@pytest.fixture(autouse=True)
def _as_jax_comes():
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def shown(apply_fn, params, x) -> bool:
    split = parameters.split(params)
    return separation.look(apply_fn, split, x, trace(apply_fn, split, x), FEW).apart


def params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 4), "b": (4,), "table": (7, 4), "filter": (3, 3, 2, 4), "line": (3, 4, 4), "own": (N, 4)}
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def images(x: jax.Array) -> jax.Array:
    return jnp.reshape(jnp.tile(x, (1, 8)), (x.shape[0], 4, 4, 2))


def conv(h, w, **settings):
    return lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)


def attention(h: jax.Array) -> jax.Array:
    weights = jax.nn.softmax(h @ jnp.swapaxes(h, 1, 2))
    return weights @ h


def halves(h: jax.Array) -> jax.Array:
    return jnp.stack([h, h * 2], axis=1)


def noise(x: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.key(0), x.shape, x.dtype)


def steps(h, w):
    return lax.scan(lambda state, row: (jnp.tanh(state @ w + row), state), jnp.zeros_like(h[:, 0]), h.swapaxes(0, 1))


APART = {
    "dense": lambda p, x: jnp.tanh(x @ p["w"] + p["b"]),
    "one output": lambda p, x: jnp.tanh(x @ p["w"])[:, 0],
    "first of the batch axis": lambda p, x: jnp.swapaxes(p["w"] @ x.T, 0, 1),
    "rank of one more": lambda p, x: (x @ p["w"] + p["b"][None]) * p["b"][None],
    "convolution": lambda p, x: jnp.mean(jax.nn.relu(conv(images(x), p["filter"])), (1, 2)),
    "grouped": lambda p, x: jnp.mean(conv(images(x), p["filter"][:, :, :1], feature_group_count=2), (1, 2)),
    "pooling": lambda p, x: jnp.sum(
        lax.reduce_window(images(x) * p["b"][:2], -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), (1, 2)
    ),
    "attention": lambda p, x: jnp.sum(attention(halves(x @ p["w"])), 1),
    "positions and batch in one axis": lambda p, x: jnp.reshape(
        jnp.tanh(jnp.reshape(halves(x), (-1, 4)) @ p["w"]), (x.shape[0], -1)
    ),
    "batch behind positions": lambda p, x: jnp.sum(jnp.swapaxes(halves(x), 0, 1) @ p["w"], 0),
    "norm": lambda p, x: jax.nn.standardize(x @ p["w"], axis=-1) * p["b"],
    "embedding": lambda p, x: p["table"][jnp.argmax(x, -1)] * p["b"],
    "one of each row": lambda p, x: jax.vmap(lambda h, one: h[one])(x @ p["w"], jnp.argsort(x, -1)[:, :2]),
    "unstacked": lambda p, x: sum(jnp.tanh(x @ w) for w in jnp.unstack(p["line"])),
    "the largest": lambda p, x: lax.top_k(x @ p["w"], 2)[0],
    "columns": lambda p, x: (x @ p["w"])[:, jnp.array([2, 0])],
    "written columns": lambda p, x: (x @ p["w"]).at[:, 1].set(x[:, 0]),
    "padded": lambda p, x: jnp.pad(x @ p["w"], ((0, 0), (1, 0))),
    "joined": lambda p, x: jnp.concatenate([x, jnp.ones_like(x), x @ p["w"]], -1),
    "token": lambda p, x: jnp.concatenate([jnp.broadcast_to(p["b"], (x.shape[0], 1, 4)), halves(x)], 1)[:, 1],
    "numbered positions": lambda p, x: jnp.sum(halves(x @ p["w"]) + lax.iota(x.dtype, 4), 1),
    "one-hot": lambda p, x: jax.nn.one_hot(jnp.argmax(x, -1), 4, dtype=x.dtype) @ p["w"],
    "recurrent": lambda p, x: steps(halves(x), p["w"])[0],
    "recurrent, all states": lambda p, x: steps(halves(x), p["w"])[1][-1],
    "vmap": lambda p, x: jax.vmap(lambda one: jnp.tanh(p["w"] @ one) + p["b"])(x),
    "vmap of a product with itself": lambda p, x: jax.vmap(lambda one: jnp.sum(jnp.outer(one, one) @ p["w"], 0))(x),
    "spectrum": lambda p, x: jnp.fft.rfft(x @ p["w"], axis=-1).real,
    "custom derivative": lambda p, x: jax.nn.silu(jax.nn.relu(x @ p["w"])),
    "jit": lambda p, x: jax.jit(lambda h: jnp.where(h > 0, h, 0.1 * h))(x @ p["w"]),
    "cumulated": lambda p, x: jnp.cumsum(x @ p["w"], axis=1)[:, ::-1],
    "branch": lambda p, x: lax.cond(p["b"][0] > 0, lambda h: h, lambda h: -h, x @ p["w"]),
    "loop": lambda p, x: lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), x),
    "solved": lambda p, x: lax.linalg.triangular_solve(
        jnp.eye(4, dtype=x.dtype) + jnp.einsum("ni,nj->nij", x, x), halves(x @ p["w"]), lower=True
    )[:, 0],
}
MIXED = {
    "mean of the batch": lambda p, x: (x - jnp.mean(x, 0)) @ p["w"],
    "softmax over the batch": lambda p, x: jax.nn.softmax(x @ p["w"], axis=0),
    "largest of the batch": lambda p, x: x @ p["w"] - jnp.max(x),
    "cumulated over the batch": lambda p, x: jnp.cumsum(x @ p["w"], axis=0),
    "reversed": lambda p, x: (x @ p["w"])[::-1],
    "rolled": lambda p, x: jnp.roll(x @ p["w"], 1, axis=0),
    "sorted": lambda p, x: jnp.sort(x, axis=0) @ p["w"],
    "taken by number": lambda p, x: (x @ p["w"])[jnp.array([2, 0, 1, 3])[: x.shape[0]]],
    "taken by the sample": lambda p, x: (x @ p["w"])[jnp.argmax(x, -1) % x.shape[0]],
    "samples with samples": lambda p, x: x @ x.T @ jnp.ones((x.shape[0], 4), x.dtype) @ p["w"],
    "other order": lambda p, x: jnp.reshape((x @ p["w"]).T, (x.shape[0], 4)),
    "across rows": lambda p, x: jnp.reshape(jnp.roll(jnp.reshape(x @ p["w"], -1), 1), (x.shape[0], 4)),
    "numbered": lambda p, x: (x @ p["w"]) * lax.iota(x.dtype, x.shape[0])[:, None],
    "own parameter each": lambda p, x: (x @ p["w"]) * p["own"][: x.shape[0]],
    "divided by their number": lambda p, x: (x @ p["w"]) / x.shape[0],
    "noise": lambda p, x: x @ p["w"] + noise(x),
    "state through the batch": lambda p, x: lax.scan(lambda s, row: (s + row, s @ p["w"]), jnp.zeros_like(x[0]), x)[1],
    "convolution over the batch": lambda p, x: lax.conv_general_dilated(
        x[None], p["line"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0],
    "window over the batch": lambda p, x: lax.reduce_window(x @ p["w"], 0.0, lax.add, (2, 1), (1, 1), "SAME"),
    "spectrum of the batch": lambda p, x: jnp.fft.fft(x @ p["w"], axis=0).real,
    "the first sample's": lambda p, x: x @ p["w"] + x[:1] * p["b"],
    "the first written": lambda p, x: (x @ p["w"]).at[0].set(x[-1]),
    "written where a sample says": lambda p, x: (x @ p["w"]).at[:, jnp.argmax(x[0])].set(0.0),
    "a shift of the batch": lambda p, x: jnp.pad(x @ p["w"], ((1, 0), (0, 0)))[:-1],
    "only several": lambda p, x: x @ p["w"] + (jnp.mean(x, 0) if x.shape[0] > 1 else 0.0),
    "largest by number": lambda p, x: (x @ p["w"]) * jnp.argmax(x, 0),
    "a step that a sample decides": lambda p, x: lax.while_loop(lambda h: h[0, 0] < 1, lambda h: h + 1, x @ p["w"]),
    "a branch that a sample decides": lambda p, x: lax.cond(x[0, 0] > 0, lambda h: h, lambda h: -h, x @ p["w"]),
    "sum over the batch": lambda p, x: x @ jnp.tensordot(x, x, (0, 0)) @ p["w"],
    "shifted by padding": lambda p, x: lax.pad(x @ p["w"], jnp.zeros((), x.dtype), ((1, -1, 0), (0, 0, 0))),
    "the first row for all": lambda p, x: (x @ p["w"])[jnp.argmax(x, -1) * 0],
    "zero for the first": lambda p, x: (x @ p["w"]).at[0].set(0.0),
    "a power by their number": lambda p, x: (x @ p["w"]) ** x.shape[0],
    "as many steps": lambda p, x: lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, length=x.shape[0])[0],
    "batches of matrices": lambda p, x: jnp.broadcast_to(p["w"], (x.shape[0], 4, 4))[:, 0] @ (x.T @ x),
}


@pytest.mark.parametrize("name", APART)
def test_networks_are_shown_apart(name):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(N, 4)))
    assert shown(APART[name], params(), x)


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_samples_is_not_shown_apart(name):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(N, 4)))
    assert not shown(MIXED[name], params(), x)


def test_one_program_of_one_sample_and_two_of_several():
    """A function whose single sample is another's, and whose batches are not, is looked at by itself."""
    x = np.random.default_rng(1).normal(size=(N, 4))
    weights = {"w": np.ones((4, 2))}
    alone = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    together = lambda p, x: jnp.tanh((x - jnp.mean(x, 0) if x.shape[0] > 1 else x) @ p["w"])  # noqa: E731
    empirical_ntk(alone, weights, x)
    with pytest.raises(ValueError, match="depends on the other samples"):
        empirical_ntk(together, weights, x)


def test_a_number_of_samples_above_which_it_mixes():
    """The samples that are handed over are looked at, where four are tried."""
    far = lambda p, x: jnp.tanh((x - jnp.mean(x, 0) if x.shape[0] > 4 else x) @ p["w"])  # noqa: E731
    weights = {"w": jnp.ones((4, 2))}
    assert shown(far, weights, jnp.ones((4, 4)))
    assert not shown(far, weights, jnp.ones((5, 4)))


def random_program(rng: np.random.Generator):
    """A function of some random operations along random axes, and what they are called."""
    plan = [(str(rng.choice(NAMES)), rng.integers(0, 12, 4).tolist()) for _ in range(rng.integers(2, 7))]

    def apply_fn(p, x):
        h = x * p["s"]
        for name, numbers in plan:
            h = OPERATIONS[name](h, *numbers)
        return h.reshape(h.shape[0], -1) if h.ndim > 1 else h

    return apply_fn, plan


def axis(h: jax.Array, number: int) -> int:
    return number % h.ndim


def weights(rows: int, columns: int) -> np.ndarray:
    return np.cos(np.arange(rows * columns, dtype=float)).reshape(rows, columns)


def merge(h, a, *_):
    at = a % max(1, h.ndim - 1)
    return h if h.ndim < 2 else h.reshape(*h.shape[:at], -1, *h.shape[at + 2 :])


def divide(h, a, b, *_):
    at, by = axis(h, a), 2 + b % 3
    return h if h.shape[at] % by else h.reshape(*h.shape[:at], *((by, -1) if b % 2 else (-1, by)), *h.shape[at + 1 :])


def with_itself(h, a, *_):
    return h if h.ndim < 2 else jnp.matmul(h, jnp.swapaxes(h, -1, -2)) if a % 2 else jnp.einsum("...i,...i->...i", h, h)


def scanned(h, a, b, *_):
    at = axis(h, a)
    h = jnp.moveaxis(h, at, 0)
    return jnp.moveaxis(lax.scan(lambda s, row: (jnp.tanh(s + row), s + row), jnp.zeros_like(h[0]), h)[1], 0, at)


OPERATIONS = {
    "tanh": lambda h, *_: jnp.tanh(h),
    "square": lambda h, *_: h * h,
    "sum": lambda h, a, *_: jnp.sum(h, axis(h, a)) if h.ndim > 2 else h,
    "centre": lambda h, a, *_: h - jnp.mean(h, axis(h, a), keepdims=True),
    "softmax": lambda h, a, *_: jax.nn.softmax(h, axis(h, a)),
    "cumsum": lambda h, a, *_: jnp.cumsum(h, axis(h, a)),
    "flip": lambda h, a, *_: jnp.flip(h, axis(h, a)),
    "sort": lambda h, a, *_: jnp.sort(h, axis(h, a)),
    "roll": lambda h, a, *_: jnp.roll(h, 1, axis(h, a)),
    "swap": lambda h, a, b, *_: jnp.swapaxes(h, axis(h, a), axis(h, b)),
    "back": lambda h, a, *_: jnp.moveaxis(h, axis(h, a), 0),
    "merge": merge,
    "divide": divide,
    "dense": lambda h, a, b, *_: jnp.tensordot(h, weights(h.shape[-1], 2 + b % 3), 1),
    "dense at": lambda h, a, b, *_: jnp.moveaxis(
        jnp.tensordot(weights(2 + b % 3, h.shape[axis(h, a)]), h, (1, axis(h, a))), 0, axis(h, a)
    ),
    "itself": with_itself,
    "cut": lambda h, a, *_: lax.slice_in_dim(h, 1, None, axis=axis(h, a)) if h.shape[axis(h, a)] > 1 else h,
    "twice": lambda h, a, *_: jnp.concatenate([h, h], axis(h, a)),
    "pad": lambda h, a, *_: jnp.pad(h, [(int(i == axis(h, a)), 0) for i in range(h.ndim)]),
    "stack": lambda h, a, *_: jnp.stack([h, 2 * h], a % (h.ndim + 1)),
    "rows": lambda h, a, b, *_: jnp.take(h, np.array([b, 0]) % h.shape[axis(h, a)], axis(h, a)),
    "own rows": lambda h, a, *_: jnp.take_along_axis(h, jnp.argsort(h, axis(h, a)), axis(h, a)),
    "number": lambda h, a, *_: h + lax.broadcasted_iota(h.dtype, h.shape, axis(h, a)),
    "scan": scanned,
    "first": lambda h, a, *_: h + lax.slice_in_dim(h, 0, 1, axis=axis(h, a)),
    "write": lambda h, a, *_: jnp.moveaxis(jnp.moveaxis(h, axis(h, a), 0).at[0].set(0.0), 0, axis(h, a)),
    "size": lambda h, a, *_: h / h.shape[axis(h, a)],
}
NAMES = sorted(OPERATIONS)


def tried(seeds) -> tuple[int, int]:
    """How many random programs have a row for each sample, and are shown apart; these are evaluated one by one."""
    rows = apart = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        apply_fn, plan = random_program(rng)
        x = jnp.asarray(rng.normal(size=(N, *[(3, 4), (4,), (2, 4)][seed % 3])))
        point = {"s": jnp.ones(())}
        try:
            shapes = [jax.eval_shape(apply_fn, point, x[:count]).shape for count in (1, N)]
        except (ValueError, TypeError):
            continue
        if shapes[0][0] != 1 or shapes[1] != (N, *shapes[0][1:]):
            continue
        rows += 1
        if shown(apply_fn, point, x):
            apart += 1
            whole, one = np.asarray(apply_fn(point, x)), [np.asarray(apply_fn(point, x[i : i + 1])) for i in range(N)]
            scale = np.abs(whole).max()
            np.testing.assert_allclose(np.concatenate(one), whole, rtol=1e-9, atol=1e-9 * scale, err_msg=str(plan))
    return rows, apart


def test_random_programs_that_are_shown_apart_are():
    rows, apart = tried(range(60))
    assert 5 < apart < rows - 10


@pytest.mark.slow
def test_many_random_programs_that_are_shown_apart_are():
    rows, apart = tried(range(60, 6000))
    assert 500 < apart < rows - 1000
