"""The width ablation, as `make ablation` runs it; every option of `lplr ablation` is taken."""

import sys

from lplr_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablation", *sys.argv[1:]]))
