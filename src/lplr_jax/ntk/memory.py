"""How Θ is cut into blocks so that everything beside the result fits a memory budget."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lplr_jax.ntk.jaxpr import Program
from lplr_jax.ntk.rules import Term

# Rows of a tile of Θ on a CPU: large enough for fast matrix products, small enough for its temporaries to stay in cache
# (calibrated on two x86 cores).
TILE = 256
# Rows of a tile on an accelerator, where every program costs its launch: as many as the budget allows up to here
# (calibrated on an H100: with 256 rows the kernel of 4,000 samples of an MLP took 30 times its matrix products).
TILE_OF_ACCELERATORS = 8192


@dataclass(frozen=True)
class Group:
    """Terms whose features are kept together.

    Attributes:
        terms: Indices of the terms.
        tile: Samples on a side of the tiles in which Θ is formed, and of the blocks in which features are made.
        held: Blocks of rows whose features are kept while those of the columns pass by; all of them where they fit.
        chunk: Samples whose forward and backward sweeps run at once, at most.
        at_once: Whether the features of all samples fit twice, so that one program makes them all and then cuts them.
    """

    terms: tuple[int, ...]
    tile: int
    held: int
    chunk: int
    at_once: bool


def budget(requested: int | None) -> int:
    """The requested bytes, or a quarter of the memory of the default device, or of the machine where it has no own."""
    if requested is not None:
        return int(requested)
    stats = _default_device().memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) // 4
    share = jax.local_device_count() if jax.default_backend() == "cpu" else 1  # simulated devices share the machine
    return total_memory() // 4 // share


def _default_device() -> Any:
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return device if isinstance(device, jax.Device) else jax.local_devices()[0]


def tile_rows(platform: str | None = None) -> int:
    """Rows of Θ on a side of a tile, where the budget allows; None for the platform of the default device."""
    return TILE if (platform or _default_device().platform) == "cpu" else TILE_OF_ACCELERATORS


def total_memory() -> int:
    """Bytes of memory of the machine, or of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container may have less than the machine
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text) if text.isdigit() else total)


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays (or their specifications) in a pytree."""
    return sum(prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def sweep_bytes(program: Program, c: int) -> int:
    """Bytes that one forward sweep and c backward sweeps of one sample need: every intermediate value, kept at once."""
    held = sum(
        prod(program.steps(program.level(slot))) * bytes_of(program.avals[slot])
        for slot in program.made_by
        if slot in program.on_x and jnp.issubdtype(program.avals[slot].dtype, jnp.number)
    )
    return (1 + c) * max(held, 1)


def make_groups(
    terms: Sequence[Term],
    kept: Sequence[int],
    sweep: int,
    *,
    outputs: str,
    c: int,
    sides: tuple[int, ...],
    item: int,
    memory_budget: int,
) -> tuple[Group, ...]:
    """Group terms and set block sizes: half of the budget for features, a quarter each for sweeps and for tiles.

    Args:
        terms: Terms of Θ.
        kept: Bytes that the features of each term take for one sample.
        sweep: Bytes of the sweeps for one sample.
        outputs: "full", "trace" or "diagonal".
        c: Outputs per sample.
        sides: (n,) for one set of samples, (n1, n2) for two.
        item: Bytes of one entry of Θ.
        memory_budget: Bytes that may be used beside the result.

    Returns:
        Groups that together hold every term once.

    Raises:
        ValueError: If not even the features of one pair of samples fit.
    """
    share = memory_budget // 2
    # Without x2 the columns are rows that are kept already; a block of them passes by where not all are.
    longest, rows = max(sides), c if outputs == "full" else 1
    most = even(longest, max(1, tile_rows() // rows))
    passing = 0 if outputs == "diagonal" or len(sides) == 1 else most
    grouped: list[tuple[tuple[int, ...], int]] = []
    open_terms: list[int] = []
    size = 0
    for index, per_sample in enumerate(kept):
        if per_sample * (sides[0] + passing) > share:
            grouped.append(((index,), per_sample))
            continue
        if size and (size + per_sample) * (sides[0] + passing) > share:
            grouped.append((tuple(open_terms), size))
            open_terms, size = [], 0
        open_terms.append(index)
        size += per_sample
    if open_terms:
        grouped.append((tuple(open_terms), size))

    groups = []
    for indices, per_sample in grouped:
        tile = most
        temporary = 2 * item * max(terms[index].temporaries(rows) for index in indices)
        while tile > 1 and tile * tile * temporary > memory_budget // 4:
            tile //= 2
        fits = share // per_sample if per_sample else longest
        pair = 1 if outputs == "diagonal" and len(sides) == 1 else 2
        if fits < pair:
            raise ValueError(
                f"memory_budget = {memory_budget} bytes does not hold the features of one pair of samples; "
                f"at least {2 * pair * per_sample} are needed"
            )
        tile = even(longest, min(tile, fits // pair))
        count = ceil(sides[0] / tile)
        held = count if fits >= (count + bool(passing)) * tile else max(1, fits // tile - 1)
        at_once = fits >= 2 * sum(ceil(side / tile) * tile for side in sides)
        groups.append(Group(indices, tile, held, max(1, memory_budget // 4 // sweep), at_once))
    return tuple(groups)


def even(total: int, most: int) -> int:
    """Size at most `most` that cuts `total` into the fewest pieces of nearly the same size."""
    return ceil(total / ceil(total / max(most, 1))) if total else 1
