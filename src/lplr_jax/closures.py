"""What a function reads beside its arguments, so that a change of it is seen without tracing the function again."""

import enum
import functools
import sys
import sysconfig
import types
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import jax
import jax.core
import numpy as np

_PATHS = {sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")}
# An environment may be reached through a link, and code knows itself by either path.
_LIBRARIES = tuple(_PATHS | {str(Path(path).resolve()) for path in _PATHS})
_OWN = str(Path(__file__).parent)
# Names through which code reads what no fingerprint sees.
_DOORS = frozenset(
    {
        "globals",
        "locals",
        "vars",
        "eval",
        "exec",
        "environ",
        "getenv",
        "open",
        "random",
        "time",
        "import_module",
        "__import__",
    }
)
_MOST_BYTES = 2**20
_MOST_OBJECTS = 4096


class _Unknown(Exception):  # noqa: N818  # no error: it only leaves the recursion
    """The value may change unseen."""


class Same:
    """An object that equals nothing but itself."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def fingerprint(function: Any) -> Hashable | None:
    """Return what a function is and all that it reads beside its arguments, by value; None where that is not known.

    Code of installed packages is taken not to change; that of the user is followed through closures, defaults, globals,
    methods and attributes. Arrays of JAX cannot change and are told by identity.

    Example:
        >>> import functools, operator
        >>> scale = {"by": 2.0}
        >>> function = functools.partial(operator.getitem, scale)
        >>> before = fingerprint(function)
        >>> before == fingerprint(function)
        True
        >>> scale["by"] = 3.0
        >>> before == fingerprint(function)
        False
    """
    try:
        return _Reader().read(function)
    except _Unknown:
        return None


def _hashed(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        raise _Unknown from None
    return value


@functools.cache
def _installed(module: str | None) -> bool:
    """Whether a module belongs to an installed package or to Python."""
    if not module:
        return False
    if module.partition(".")[0] in sys.stdlib_module_names:
        return module != "__main__"
    place = getattr(sys.modules.get(module), "__file__", None)
    return place is not None and str(Path(place).resolve()).startswith((*_LIBRARIES, _OWN))


class _Reader:
    """Reads a value; objects met before stand for themselves, which ends cycles."""

    def __init__(self) -> None:
        # Objects are held, so that no other gets the address of one that is gone.
        self._met: dict[int, tuple[int, Any]] = {}

    def read(self, value: Any) -> Hashable:
        """Return the fingerprint of a value.

        Raises:
            _Unknown: where the value may change unseen.
        """
        if value is None or isinstance(value, str | bytes | enum.Enum | np.dtype):
            return value
        if isinstance(value, bool | int | float | complex) and not isinstance(value, np.generic):
            return type(value).__name__, repr(value)
        if isinstance(value, jax.core.Tracer):
            raise _Unknown
        if isinstance(value, jax.tree_util.PyTreeDef):
            return _hashed(value)
        if isinstance(value, jax.Array | types.BuiltinFunctionType | types.CodeType):
            return Same(value)
        if isinstance(value, np.ndarray | np.generic):
            if value.dtype.hasobject or value.nbytes > _MOST_BYTES:
                raise _Unknown
            return value.shape, value.dtype.str, value.tobytes()
        if id(value) in self._met:
            return "met", self._met[id(value)][0]
        if len(self._met) > _MOST_OBJECTS:
            raise _Unknown
        self._met[id(value)] = len(self._met), value
        return self._inside(value)

    def _inside(self, value: Any) -> Hashable:
        if isinstance(value, tuple | list):
            return type(value).__name__, tuple(self.read(part) for part in value)
        if isinstance(value, dict):
            return "dict", tuple((self.read(name), self.read(part)) for name, part in value.items())
        if isinstance(value, types.ModuleType):
            if not _installed(value.__name__):
                raise _Unknown
            return Same(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return self.read(value.__func__), self.read(value.__self__)
        if isinstance(value, functools.partial):
            return self.read(value.func), self.read(value.args), self.read(value.keywords)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, staticmethod | classmethod):
            return self.read(value.__func__)
        if isinstance(value, property):
            return self.read(value.fget)
        if hasattr(value, "lower") and hasattr(value, "__wrapped__"):  # a jitted function, of which JAX keeps the trace
            return Same(value)
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            raise _Unknown
        return self.read(type(value)), self.read(attributes)

    def _function(self, function: types.FunctionType) -> Hashable:
        code = function.__code__
        try:
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
        except ValueError:  # a cell that is not filled yet
            raise _Unknown from None
        beside = (function.__defaults__, function.__kwdefaults__, cells)
        parts: list[Hashable] = [Same(code), *(self.read(part) for part in beside)]
        if not _installed(function.__module__):
            space = function.__globals__
            names = _names(code)
            if names & _DOORS:
                raise _Unknown
            parts += [(name, self.read(space[name])) for name in sorted(names) if name in space]
        return tuple(parts)

    def _class(self, kind: type) -> Hashable:
        if _installed(kind.__module__):
            return Same(kind)
        members = [
            (name, self.read(member))
            for name, member in vars(kind).items()
            if isinstance(member, types.FunctionType | staticmethod | classmethod | property)
            or not (name.startswith("__") or callable(member) or hasattr(type(member), "__get__"))
        ]
        return Same(kind), tuple(members), tuple(self.read(base) for base in kind.__bases__)


def _names(code: types.CodeType) -> set[str]:
    """Names that code, and code within it, looks up."""
    found = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found |= _names(const)
    return found
