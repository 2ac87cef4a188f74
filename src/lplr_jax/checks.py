"""Checks of settings and arrays: one wording, that names the value and the way out."""

import operator
import os
import re
import reprlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120


def shown(value: Any) -> str:
    """Return a value for a message: its type and shape for an array, else its repr, cut where it is long."""
    if hasattr(value, "dtype") and isinstance(getattr(value, "shape", None), tuple) and value.shape:
        return f"{type(value).__name__} of dtype {value.dtype} and shape {tuple(value.shape)}"
    return " ".join(_REPR.repr(value).split())


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def name(what: str, value: Any) -> str:
    """Return a name that can be part of that of a file.

    Raises:
        ValueError: for anything but 1 to 64 letters, digits, - and _, the first one a letter or a digit.
    """
    if not (isinstance(value, str) and _NAME.fullmatch(value)):
        raise ValueError(f"{what} must be a name of letters, digits, - and _, got {shown(value)}")
    return value


def whole(name: str, value: Any, *, least: int | None = None, most: int | None = None, of: str = "") -> int:
    """Return an integer setting.

    Args:
        name: what the setting is called.
        value: a Python or NumPy integer; booleans are none.
        least: smallest value allowed.
        most: largest value allowed.
        of: where `most` comes from, in words.

    Raises:
        ValueError: for any other value.

    Example:
        >>> whole("width", 3, least=1)
        3
    """
    bounds = [f">= {least}"] * (least is not None) + [f"<= {most}{f' = {of}' * bool(of)}"] * (most is not None)
    try:
        found = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        kind = " and ".join(["an integer", *bounds]) if len(bounds) > 1 else " ".join(["an integer", *bounds])
        raise ValueError(f"{name} must be {kind}, got {shown(value)}")
    if least is not None and found < least:
        raise ValueError(f"{name} must be >= {least}, got {shown(found)}")
    if most is not None and found > most:
        raise ValueError(f"{name} must be at most {f'{of} = ' * bool(of)}{most}, got {shown(found)}")
    return found


def integers(name: str, text: str, *, least: int) -> tuple[int, ...]:
    """Read distinct integers from text with commas.

    Raises:
        ValueError: for anything else, or a number below `least`.

    Example:
        >>> integers("seeds", "0,1, 2", least=0)
        (0, 1, 2)
    """
    try:
        values = tuple(int(part) for part in text.split(","))
    except (ValueError, AttributeError):
        raise ValueError(
            f"{name} must be integers with commas between them, such as 0,1,2; got {shown(text)}"
        ) from None
    if min(values) < least or len(set(values)) != len(values):
        raise ValueError(f"{name} must be distinct integers >= {least}, got {text!r}")
    return values


def number(
    name: str, value: Any, *, above: float | int | None = None, least: float | int | None = None, finite: bool = True
) -> float:
    """Return a real setting.

    Args:
        name: what the setting is called.
        value: a real number of Python, NumPy or JAX; booleans and text are none.
        above: the value must be larger.
        least: smallest value allowed.
        finite: whether infinity is refused; NaN always is.

    Raises:
        ValueError: for any other value.

    Example:
        >>> number("learning_rate", 0.5, above=0)
        0.5
    """
    array = None if isinstance(value, bool | str | bytes) else as_array(value)
    real = array is not None and array.ndim == 0 and _is_real(array.dtype)
    found = float(array) if array is not None and real else float("nan")
    known = np.isfinite(found) if finite else not np.isnan(found)
    if not known or (above is not None and found <= above) or (least is not None and found < least):
        bound = f" > {above:g}" if above is not None else f" >= {least:g}" if least is not None else ""
        kind = "a finite number" if finite else "a number"
        raise ValueError(f"{name} must be {kind}{bound}, got {found if real else shown(value)}")
    return found


def one_of(name: str, value: Any, allowed: Collection[str]) -> str:
    """Return a setting that must be one of some words.

    Raises:
        ValueError: for any other value.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")
    return value


def path(name: str, value: Any) -> Path:
    """Return a path, with ~ put in.

    Raises:
        ValueError: for an empty one, one with a NUL, or the home of a user whom nobody knows.
        TypeError: for what is no path.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise TypeError(f"{name} must be a path, text or pathlib.Path, got {shown(value)}")
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise ValueError(f"{name} must be the name of a file or folder without NUL, got {shown(os.fspath(value))}")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"{name} names the home of a user who is not known, got {shown(os.fspath(value))}") from None


def folder(name: str, value: Any) -> Path:
    """Return a path at which a folder is, or can be made.

    Raises:
        ValueError: if a file, or a link that leads nowhere, stands there or on the way.
        TypeError: for what is no path.
    """
    found = path(name, value)
    for place in (found, *found.parents):
        if os.path.lexists(place):
            if not place.is_dir():
                raise ValueError(f"{name} must be a folder, got {str(found)!r}, where {place} is a file; name another")
            break
    return found


def function(name: str, value: Any, signature: str) -> None:
    """Check that a value can be called.

    Raises:
        TypeError: if it cannot.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a function {signature}, got {shown(value)}")


def instance(name: str, value: Any, kind: type, way: str) -> None:
    """Check the class of a value; `way` says how to get one.

    Raises:
        TypeError: if it is of another class.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, {way}; got {shown(value)}")


def real_array(name: str, value: Any, *, axes: str, empty: bool = False) -> np.ndarray:
    """Return a real array on the host, in float64.

    Args:
        name: what the array is called.
        value: anything that NumPy takes for a real array.
        axes: names of its axes, with blanks between them; "..." for any.
        empty: whether it may hold no entries.

    Raises:
        ValueError: for text, objects, ragged lists, complex or boolean entries, another rank, or no entries.
    """
    array = as_array(value)
    names = axes.split()
    wanted = f"({', '.join(names)}{',' * (len(names) == 1 and axes != '...')})"
    if array is None or not _is_real(array.dtype) or (axes != "..." and array.ndim != len(names)):
        found = shown(value if array is None else array)
        raise ValueError(f"{name} must be an array of real numbers of shape {wanted}, got {found}")
    if array.size == 0 and not empty:
        raise ValueError(f"{name} must be an array of shape {wanted} with at least one entry, got shape {array.shape}")
    return array.astype(np.float64, copy=False)


def _is_real(dtype: np.dtype) -> bool:
    # bfloat16 and its kin are of kind V, and NumPy knows how to cast them.
    return dtype.kind in "iuf" or (dtype.kind == "V" and dtype.names is None and np.can_cast(dtype, np.float64))


def as_array(value: Any) -> np.ndarray | None:
    """Return what NumPy makes of a value, None where it makes nothing of it."""
    try:
        return np.asarray(value)
    except Exception:  # ragged lists, objects with a broken __array__, traced values: each has its own exception
        return None
