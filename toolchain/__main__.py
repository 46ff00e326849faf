"""``python -m toolchain``: the same as the command ``attune``."""

from toolchain.cli.app import main

main()
