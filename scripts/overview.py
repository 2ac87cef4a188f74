"""Draw figures/overview.png from docs/overview.csv and the table of sentences in docs/reproduction.md."""

import csv
from pathlib import Path

from lplr_jax import plotting

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    with (ROOT / "docs" / "overview.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    plotting.save(plotting.overview(rows, page), ROOT / "figures" / "overview.png")
