"""The step-size boundary, as `make boundary` runs it; every option of `lplr boundary` is taken."""

import sys

from lplr_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["boundary", *sys.argv[1:]]))
