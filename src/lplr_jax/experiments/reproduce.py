"""The paper, sentence by sentence: runs what is missing, judges every statement, and searches for the set-up."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from lplr_jax import arms, checks, diagnostics, experiments, statements
from lplr_jax.checks import integers
from lplr_jax.data import DataError, Pixels
from lplr_jax.experiments import drifts, mnist, search
from lplr_jax.experiments.drifts import Met
from lplr_jax.experiments.sweep import ArmsPart
from lplr_jax.files import atomic_write
from lplr_jax.records import Record
from lplr_jax.reports import statements as written
from lplr_jax.reports.exit_codes import OK
from lplr_jax.reports.follow import SCREEN_ALONE, FollowConfig, Following
from lplr_jax.reports.screen import CONSOLE, say
from lplr_jax.runs.folder import claimed, joined
from lplr_jax.runs.lock import Lock
from lplr_jax.statements import Runs

READ = ("mnist", "ablation", "initialisation", "cifar")
"""Experiments whose records are read."""
SEEDS = "0,1,2,3,4"
"""Seeds of the law of λ_0. Calibrated."""
WIDTHS = (128, 256, 512, 1024)
"""Its widths (paper, Table 1)."""
SMOKE_WIDTHS = (16, 32, 64)
"""Those of the preset "smoke"."""
ONE_AFTER_THE_OTHER = ArmsPart()
"""Arms run in this process."""
SEARCHED = "searched.csv"
"""Table of the search: in the package that of ours, in the folder of the command one's own."""


def reproduce(
    preset: Literal["smoke", "default"] = "default",
    runs: Path = Path("runs"),
    out: Path | None = None,
    page: Path | None = None,
    data: Path | None = None,
    seeds: str = SEEDS,
    run_missing: bool = True,
    do_search: Annotated[tyro.conf.UseCounterAction[int], tyro.conf.arg(name="search")] = 0,
    minutes: float = 120.0,
    arms: Annotated[ArmsPart, tyro.conf.arg(name="")] = ONE_AFTER_THE_OTHER,
    also: Annotated[FollowConfig, tyro.conf.arg(name="")] = SCREEN_ALONE,
) -> int:
    """Judge the paper's empirical statements, one by one, from the records of mnist, ablation, initialisation, cifar.

    Args:
        preset: whose folders are read: runs/mnist and so on, or runs/mnist-smoke.
        runs: folder that holds those of the experiments.
        out: folder for the tables [default: RUNS/reproduce, or RUNS/reproduce-smoke].
        page: a page of Markdown that holds the table between its marks, to be written anew.
        data: file or folder with CIFAR-10; without it and without records of it, its statements are not decided.
        seeds: seeds over which λ_0 against width is judged, with commas; kernels at initialisation alone.
        run_missing: run experiments whose records are missing.
        do_search: search for the set-up instead: short runs, one factor at a time, then the best pairs; the same
            command goes on with what is left.
        minutes: of the search: nothing is begun later, unless it runs elsewhere.
        arms: where the arms of missing experiments and the set-ups of the search run; with --search, --list-arms and
            --arm are its set-ups.
        also: where else than on screen the runs show themselves.
    """
    suffix = "-smoke" if preset == "smoke" else ""
    folder = checks.folder("--out", out or runs / f"reproduce{suffix}")
    checks.number("minutes", minutes, above=0)
    each = integers("seeds", seeds, least=0)
    arms.check()
    arms.check_jobs()
    smoke = preset == "smoke"
    if arms.list_arms or arms.arm is not None:
        if not do_search:
            raise ValueError("--arm and --list-arms are for the set-ups of --search; an experiment has arms of its own")
        return _one_set_up(folder, arms, smoke=smoke)
    if page is not None and not checks.path("--page", page).is_file():
        raise ValueError(f"--page must be a file that holds {written.BEGIN} and {written.END}, got {page}")
    if do_search and arms.elsewhere:
        command = ["reproduce", "--preset", preset, "--out", str(folder), "--search"]
        run = partial(arms.run_arms, command, folder=folder, say=say)
        if code := search.search_elsewhere(folder / "search", run, **_settings(smoke=smoke)):
            return code
    with claimed(folder, "reproduce", {"preset": preset}, force=False, say=say) as lock:
        if do_search:
            _search(folder, minutes, lock.check, smoke=smoke)
            return OK
        if run_missing:
            with Following(CONSOLE, also) as following:
                _run_missing(runs, suffix, preset, data, following, arms)
        found = gather(runs, suffix)
        starts = initial_eigenvalues(folder / "starts.json", each, check=lock.check, smoke=preset == "smoke")
        findings = statements.judge(replace(found, starts=starts))
        shares = _shares(folder)
        for statement in statements.STATEMENTS:
            finding = findings[statement.id]
            say(f"§{statement.section:4}{finding.outcome:18} {statement.sentence} {finding.numbers}")
        say(written.counts(findings))
        for path in written.save(findings, shares, folder / "reproduction"):
            say(f"table    {path}")
        if page is not None:
            written.put(page, written.to_markdown(findings, shares))
            say(f"page     {page}")
    return OK


def _run_missing(runs: Path, suffix: str, preset: str, data: Path | None, following: Following, arms: ArmsPart) -> None:
    """Run experiments whose records are not all there; one that has no data is left out, and said so."""
    for name in READ:
        experiment = experiments.find(name)
        config = experiment.preset(preset)
        folder = runs / f"{name}{suffix}"
        if name == "mnist":
            there = (folder / "record.npz").exists()
        elif name == "initialisation":
            config = replace(config, ablation=runs / f"ablation{suffix}")
            there = all((folder / init / "record.npz").exists() for init in config.each_init())
        else:
            assert experiment.arms is not None
            there = all((folder / arm / "record.npz").exists() for arm in experiment.arms(config))
        if there:
            continue
        argv = [name, "--preset", preset, "--out", str(folder)]
        if name == "cifar":
            config = replace(config, data=data)
            argv += [] if data is None else ["--data", str(data)]
        if isinstance(config, ArmsPart):
            config = replace(config, jobs=arms.jobs, cluster=arms.cluster, job_options=arms.job_options)
        say(f"{name}: records are missing in {folder}, so it is run")
        try:
            experiment.execute(replace(config, out=folder), preset=preset, following=following, argv=argv)
        except DataError as error:
            say(f"{name}: left out, {error}")


def gather(runs: Path, suffix: str = "") -> Runs:
    """Read the records that are there.

    Args:
        runs: folder that holds those of the experiments.
        suffix: behind the name of every experiment.
    """

    def read(name: str) -> Mapping[str, Record]:
        folder = runs / f"{name}{suffix}"
        if not (folder / "record.npz").exists() and not list(folder.glob("*/record.npz")):
            return {}
        there = arms.load(folder)
        return there if isinstance(there, arms.Arms) else {name: there}

    ablation = {name: record for name, record in read("ablation").items() if name.startswith("m")}
    of_widths = search.runs_of(ablation) if ablation else Runs()
    return replace(of_widths, mnist=read("mnist").get("mnist"), inits=read("initialisation"), seeds=read("cifar"))


def initial_eigenvalues(
    path: Path,
    seeds: tuple[int, ...],
    *,
    pixels: Pixels = "unit",
    check: Callable[[], None] = lambda: None,
    smoke: bool = False,
) -> dict[int, dict[int, float]]:
    """Measure λ_0 of the full kernel by seed and width, or read what is there of it.

    Args:
        path: JSON file that keeps them.
        seeds: of the initialisation.
        pixels: scaling of the pixels.
        check: called before every write.
        smoke: few images and narrow networks.
    """
    known: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    values: dict[int, dict[int, float]] = {}
    for seed in seeds:
        for width in SMOKE_WIDTHS if smoke else WIDTHS:
            config = mnist.MnistConfig(width=width, seed=seed, pixels=pixels, n_train=100 if smoke else 1000)
            setting = {"width": width, "seed": seed, "pixels": pixels, "checksum": mnist.load_data(config).checksum}
            value = next((entry["value"] for entry in known if entry["setting"] == setting), None)
            if value is None:
                problem = mnist.set_up(config)
                value = float(diagnostics.empirical_ntk_min_eig(problem.apply_fn, problem.params, problem.x))
                known.append({"setting": setting, "value": value})
                check()
                with atomic_write(path) as temporary:
                    temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
            values.setdefault(seed, {})[width] = value
    return values


def _shares(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the shares of one's own search, or of that in the package."""
    own = folder / SEARCHED
    if own.exists():
        return written.shares_of(own.read_text(encoding="utf-8"))
    packaged = resources.files("lplr_jax.statements") / SEARCHED
    return written.shares_of(packaged.read_text(encoding="utf-8")) if packaged.is_file() else {}


def _settings(*, smoke: bool) -> dict[str, Any]:
    """Return what the search departs from, and to where."""
    if not smoke:
        return {"base": search.SHORT, "factors": search.FACTORS}
    base = replace(search.SHORT, widths="8,16,32", epochs=40, n_train=60)
    return {"base": base, "factors": {"labels": ("bits",), "output_init": ("zero",)}, "pairs_of": 2}


def _one_set_up(folder: Path, arms: ArmsPart, *, smoke: bool) -> int:
    """List the set-ups of the search, or run one of them beside others that run; pairs are given by their names."""
    settings = _settings(smoke=smoke)
    names = [one.name for one in search.one_at_a_time(settings["factors"])]
    if arms.list_arms:
        say(json.dumps(names))
        return OK
    assert arms.arm is not None
    name = names[int(arms.arm)] if arms.arm.isdecimal() and int(arms.arm) < len(names) else arms.arm
    set_up = search.SetUp.of(name, settings["factors"])
    with joined(folder, "reproduce", {"preset": "smoke" if smoke else "default"}):
        lock = Lock(folder / "search" / name, say=say)
        lock.acquire()
        try:
            search.take_one(set_up, folder / "search", base=settings["base"], say=say, check=lock.check)
        finally:
            lock.release()
    return OK


def _search(folder: Path, minutes: float, check: Callable[[], None], *, smoke: bool) -> None:
    settings = _settings(smoke=smoke)
    done = search.search(folder / "search", minutes=minutes, say=say, check=check, **settings)
    rows = [(one.set_up.name, one.findings, one.numbers) for one in done]
    rows += _starts_searched(folder, check, smoke=smoke)
    check()
    with atomic_write(folder / SEARCHED) as temporary:
        temporary.write_text(written.searched_csv(rows), encoding="utf-8")
    ranked = sorted(done, key=lambda one: one.score[0] / max(1, one.score[1]), reverse=True)
    for one in ranked[:3]:
        say(f"nearest  {one.set_up.name}: {one.score[0]} of {one.score[1]} statements")
    say(f"table    {folder / SEARCHED}")
    if not smoke:
        met = drifts.study(folder / "drifts", say=say, check=check)
        write_drifts(met, folder / "drifts.csv")
        say(f"table    {folder / 'drifts.csv'}")


def _starts_searched(folder: Path, check: Callable[[], None], *, smoke: bool) -> list[written.Row]:
    """Judge λ_0 against width for every scaling of the pixels, over several seeds."""
    rows = []
    for pixels in get_args(Pixels):
        seeds = integers("seeds", SEEDS, least=0)
        starts = initial_eigenvalues(folder / "starts.json", seeds, pixels=pixels, check=check, smoke=smoke)
        rows.append((f"λ_0 over {len(seeds)} seeds, pixels={pixels}", statements.judge(Runs(starts=starts)), {}))
    return rows


def write_drifts(found: list[Met], target: Path) -> None:
    """Write how near every set-up comes to both drifts."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    reach = [f"drift_at_{eta_beta:g}" for eta_beta in drifts.COMMON]
    writer.writerow(["set_up", "eta_beta", "epoch", "drift_common", "drift_smaller", "off_by", "met", *reach])
    for one in found:
        numbers = (one.eta_beta, one.epoch, one.common, one.smaller, one.off)
        ends = [f"{one.reach.get(eta_beta, float('nan')):.4g}" for eta_beta in drifts.COMMON]
        writer.writerow([one.name, *(f"{number:.4g}" for number in numbers), int(one.met), *ends])
    with atomic_write(target) as temporary:
        temporary.write_text(out.getvalue(), encoding="utf-8")
