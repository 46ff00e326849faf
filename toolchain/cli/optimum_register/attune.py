"""``optimum-cli export attune …``, found by optimum in ``optimum.commands.register``."""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class AttuneExportCommand(BaseOptimumCLICommand):
    """Passes its arguments to ``attune export`` as they are."""

    COMMAND = CommandInfo(
        name="attune", help="Export to a bundle that personalizes itself on Android and iOS."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=REMAINDER, help="as for 'attune export'")

    def run(self) -> None:
        from toolchain.cli.app import run

        run(["export", *self.args.arguments])


REGISTER_COMMANDS = [(AttuneExportCommand, ExportCommand)]
