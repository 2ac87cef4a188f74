"""lplr-jax: which hypotheses of local Polyak-Łojasiewicz theory hold on a training run.

``import lplr_jax as lp`` costs no JAX: every name below is imported when it is first asked for.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lplr_jax import rooms

if TYPE_CHECKING:  # the names of `rooms.FACE` once more, for tools that read and do not run; a test compares the two
    from lplr_jax import curves as curves
    from lplr_jax import data as data
    from lplr_jax import diagnostics as diagnostics
    from lplr_jax import experiments as experiments
    from lplr_jax import linalg as linalg
    from lplr_jax import losses as losses
    from lplr_jax import models as models
    from lplr_jax import ntk as ntk
    from lplr_jax import plotting as plotting
    from lplr_jax import records as records
    from lplr_jax import schema as schema
    from lplr_jax import theory as theory
    from lplr_jax import training as training
    from lplr_jax.arms import load as load
    from lplr_jax.plotting import plot as plot
    from lplr_jax.records import Record as Record
    from lplr_jax.records import RecordError as RecordError
    from lplr_jax.reports.page import report as report
    from lplr_jax.runs.entries import series as series
    from lplr_jax.runs.loop import train as train
    from lplr_jax.runs.point import verify_point as verify_point
    from lplr_jax.runs.problem import Probes as Probes
    from lplr_jax.runs.problem import Problem as Problem
    from lplr_jax.runs.snapshots import measure as measure
    from lplr_jax.runs.watch import Watch as Watch
    from lplr_jax.runs.watch import watch as watch
    from lplr_jax.theory import Verdict as Verdict
    from lplr_jax.theory import Verdicts as Verdicts
    from lplr_jax.theory import verify as verify
else:  # hidden from those tools, for which any name would exist otherwise
    __all__ = ["__version__", *rooms.FACE]

    def __getattr__(name: str) -> Any:
        """Import a name of the public face when it is first asked for."""
        return rooms.through_door(__name__, name)


__doc__ = f"{__doc__}\nThe rooms, each importing only from those before it:\n\n" + "\n".join(
    f"    {room.name:12} {room.wing:7} {room.holds}" for room in rooms.ROOMS
)

try:
    __version__ = version("lplr-jax")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __dir__() -> list[str]:
    """List the public face, for completion."""
    return sorted(["__version__", *rooms.FACE])
