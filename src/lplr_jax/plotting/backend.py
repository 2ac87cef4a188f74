"""Matplotlib without the user's backend: figures here are drawn on a canvas of their own."""

import contextlib
import importlib
import os
import sys

VARIABLE = "MPLBACKEND"


def import_matplotlib() -> None:
    """Import matplotlib, also where `MPLBACKEND` names no backend, over which its import fails.

    A backend that there is becomes that of pyplot, as matplotlib itself would do it.
    """
    named = os.environ.get(VARIABLE)
    if not named or "matplotlib" in sys.modules:
        importlib.import_module("matplotlib")
        return
    del os.environ[VARIABLE]
    try:
        matplotlib = importlib.import_module("matplotlib")
    finally:
        os.environ[VARIABLE] = named
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = named
