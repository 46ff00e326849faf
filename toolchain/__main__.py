"""``python -m toolchain``: the same as the command ``attune``."""

from toolchain.cli import main

main()
