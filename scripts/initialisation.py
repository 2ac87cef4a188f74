"""Initialisations side by side, as `make initialisation` runs it; every option of `lplr initialisation` is taken."""

import sys

from lplr_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["initialisation", *sys.argv[1:]]))
