"""Text as sequences of tokens, each with the token that follows it: bytes, numbered by those that occur."""

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from lplr_jax import checks
from lplr_jax.data.problem import DataError

DESCRIPTIONS = (
    *("twenty_newsgroups", "lfw", "kddcup99", "rcv1", "olivetti_faces", "species_distributions"),
    *("california_housing", "covtype"),
)
"""Descriptions of data sets that scikit-learn ships in English prose, 28,072 bytes; read in this order, as one text."""
MOST = 2**24
"""Most bytes of a text that are used."""
OWN = "name another with --data, a file of text in any encoding"


@dataclass(frozen=True, eq=False)
class Text:
    """Sequences of a text, and the token that follows each of theirs.

    Attributes:
        x: tokens, shape (n, T), int32, read-only; sequence i is bytes i T to (i + 1) T - 1.
        y: the token after each, shape (n, T): x one place further on in the text.
        vocabulary: the bytes that occur, ascending; token k is byte k of it.
        source: where the text came from, in words without a path.
        licence: under which it is passed on; empty for a text of one's own.
        checksum: "sha256:" and the SHA-256 of the n T + 1 bytes that are used, lines ending with a line feed.
    """

    x: Int32[np.ndarray, "n t"]
    y: Int32[np.ndarray, "n t"]
    vocabulary: bytes
    source: str
    licence: str = ""
    checksum: str = field(init=False)

    def __post_init__(self) -> None:
        used = np.frombuffer(self.vocabulary, np.uint8)[np.append(self.x, self.y[-1, -1])]
        object.__setattr__(self, "checksum", f"sha256:{hashlib.sha256(used.tobytes()).hexdigest()}")
        for letter in ("x", "y"):
            view = getattr(self, letter).view()
            view.setflags(write=False)
            object.__setattr__(self, letter, view)

    @property
    def n(self) -> int:
        """Sequences."""
        return self.x.shape[0]

    @property
    def length(self) -> int:
        """Positions T of a sequence."""
        return self.x.shape[1]

    @property
    def c(self) -> int:
        """Tokens of the vocabulary."""
        return len(self.vocabulary)

    def provenance(self, location: Path | None = None) -> dict[str, str | None]:
        """Return what a record says of its data, with the file that was asked for."""
        return {
            "name": "text",
            "source": self.source,
            "checksum": self.checksum,
            "location": str(location) if location else None,
            "subject": f"bytes 0 to {self.x.size:,} of the text",
            "inputs": f"{self.n} sequences of {self.length} bytes, as numbers of the {self.c} bytes that occur",
            "targets": "the byte that follows each",
            **({"licence": self.licence} if self.licence else {}),
        }

    def contexts(self) -> Int32[np.ndarray, " m"]:
        """Return for each (sequence, position), sequence-major, the number of its context: what a causal network sees.

        Equal numbers stand for equal tokens up to a position and equal positions.
        """
        numbers: dict[bytes, int] = {}
        found = np.empty(self.x.shape, np.int32)
        for i, sequence in enumerate(self.x):
            for t in range(self.length):
                found[i, t] = numbers.setdefault(sequence[: t + 1].tobytes(), len(numbers))
        return found.reshape(-1)


def load_text(*, n: int, length: int, data: Path | None = None) -> Text:
    """Read the first n T + 1 bytes of a text as n sequences of T bytes.

    Without a file it is what scikit-learn, which mlxtend brings along, ships in prose: `DESCRIPTIONS`.

    Args:
        n: sequences.
        length: positions T of each.
        data: a file with a text of one's own.

    Raises:
        DataError: for a text that cannot be read, is too short, or is one byte again and again.
        ValueError: for a count out of range.

    Example:
        >>> text = load_text(n=2, length=8)
        >>> text.x.shape, bytes(text.vocabulary[token] for token in text.x[0])
        ((2, 8), b'.. _20ne')
    """
    wanted = checks.whole("n", n, least=1) * checks.whole("length", length, least=1) + 1
    checks.whole("n length + 1, the bytes of the text,", wanted, most=MOST)
    if data is None:
        raw, source, licence = *_descriptions(), "BSD-3-Clause"
    else:
        raw, source, licence = _read(checks.path("data", data), most=2 * wanted), "a text of one's own", ""
    raw = raw.replace(b"\r\n", b"\n")
    if len(raw) < wanted:
        fewer = f"ask for fewer sequences or positions, or {OWN}"
        raise DataError(f"{n} sequences of {length} bytes need {wanted:,} bytes, {source} has {len(raw):,}; {fewer}")
    used = np.frombuffer(raw[:wanted], np.uint8)
    vocabulary, tokens = np.unique(used, return_inverse=True)
    if vocabulary.size < 2:
        raise DataError(f"the first {wanted:,} bytes of the text are all equal, so nothing is to be learnt; {OWN}")
    tokens = tokens.astype(np.int32)
    return Text(tokens[:-1].reshape(n, length), tokens[1:].reshape(n, length), vocabulary.tobytes(), source, licence)


def _descriptions() -> tuple[bytes, str]:
    # Found, not imported: importing scikit-learn takes a second.
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError(f"the text is that of scikit-learn, which is not installed: pip install scikit-learn, or {OWN}")
    folder = Path(found.origin).parent / "datasets" / "descr"
    read = [_read(folder / f"{name}.rst", most=MOST) for name in DESCRIPTIONS]
    version = importlib.metadata.version("scikit-learn")
    return b"".join(read), f"scikit-learn {version} (descriptions of its data sets)"


def _read(path: Path, *, most: int) -> bytes:
    reason = "no ordinary file"
    try:
        if path.is_file():  # a pipe would be waited for
            with path.open("rb") as file:
                return file.read(most)
    except (OSError, ValueError) as error:  # ValueError: a name with a null
        reason = getattr(error, "strerror", None) or str(error)
    raise DataError(f"the text {checks.shown(str(path))} cannot be read ({reason}); {OWN}")
