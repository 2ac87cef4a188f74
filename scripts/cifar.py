"""CIFAR-10 with a residual network, as `make cifar` runs it; every option of `lplr cifar` is taken."""

import sys

from lplr_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["cifar", *sys.argv[1:]]))
