"""python -m minibooth.bench: kernels, training and sampling measured against others'."""

import sys

from ..common import cli
from .kernels import main

if __name__ == "__main__":
    cli.run("minibooth.bench", lambda: sys.exit(main()))
