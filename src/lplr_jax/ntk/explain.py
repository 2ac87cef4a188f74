"""What the engine would do for each leaf, in words and numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LeafExplanation:
    """How one parameter leaf is served.

    Attributes:
        path: Where the leaf is in the pytree of parameters.
        shape: Its shape.
        rule: Name of the rule, or "none" for a leaf on which the output does not depend.
        multiply_adds: Multiply-adds of its share of the kernel, sweeps not counted.
        bytes: Bytes of its features for all samples.
        reason: Why no rule serves it, empty where one does.
    """

    path: str
    shape: tuple[int, ...]
    rule: str
    multiply_adds: int
    bytes: int
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The plan of a kernel; `str()` prints it leaf by leaf.

    Attributes:
        leaves: One entry for each leaf of θ.
        outputs: "full", "trace" or "diagonal".
        n: Samples.
        c: Outputs per sample.
        blocks: Of each group of leaves that is computed together, the samples whose features are held at once.
        carried: Path of each leaf that is no part of θ, and why.
        narrow: Where the function rounds to a narrower type than asked for, in a sentence; empty where it does not.
    """

    leaves: tuple[LeafExplanation, ...]
    outputs: str
    n: int
    c: int
    blocks: tuple[int, ...]
    carried: tuple[tuple[str, str], ...] = ()
    narrow: str = ""

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all leaves."""
        return sum(leaf.multiply_adds for leaf in self.leaves)

    @property
    def bytes(self) -> int:
        """Bytes of all features."""
        return sum(leaf.bytes for leaf in self.leaves)

    def __str__(self) -> str:
        head = ("leaf", "shape", "rule", "multiply-adds", "bytes", "reason")
        rows = [
            (
                leaf.path or "(the only leaf)",
                str(leaf.shape),
                leaf.rule,
                f"{leaf.multiply_adds:.3g}",
                _bytes(leaf.bytes),
                leaf.reason,
            )
            for leaf in self.leaves
        ]
        rows.append(("total", "", "", f"{self.multiply_adds:.3g}", _bytes(self.bytes), ""))
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            f"{self.outputs} kernel of {self.n} samples with {self.c} outputs; samples held at once: {self.blocks}"
        ]
        for row in (head, *rows):
            cells = [
                cell.rjust(w) if i in (3, 4) else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        lines += [f"not θ: {path or '(the only leaf)'}, {why}" for path, why in self.carried]
        return "\n".join([*lines, self.narrow] if self.narrow else lines)


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
