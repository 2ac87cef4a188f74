"""Binary MNIST, as `make mnist` runs it; every option of `lplr mnist` is taken."""

import sys

from lplr_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["mnist", *sys.argv[1:]]))
