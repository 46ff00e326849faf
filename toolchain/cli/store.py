"""``attune store``: what to do about a store that is damaged."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import Json
from toolchain.report.console import bold, line, output, print_json

app = typer.Typer(help="Look after the loop's store.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``recover`` a command of its own while it is the only one."""


@app.command()
def recover(
    path: Annotated[Path, typer.Argument(help="The damaged loop.sqlite; it is only read.")],
    out: Annotated[Path, typer.Argument(help="Where the new store is written.")],
    as_json: Json = False,
) -> None:
    """Write what can still be read of a damaged store into a new one.

    Example: [bold]attune store recover out/sim/phone/loop.sqlite recovered.sqlite[/]
    """
    from runtime_py.loop.recovery import recover as rescue
    from runtime_py.loop.schedule import Moment

    now = time.time()
    recovered = rescue(path, out, Moment(now, int(now // 86400)))
    if as_json:
        print_json({"out": str(out), "rows": recovered.rows, "problems": list(recovered.problems)})
        return
    rows = ", ".join(f"{count} {table}" for table, count in recovered.rows.items() if count)
    output.print(f"saved: {rows or 'nothing'}")
    for problem in recovered.problems:
        output.print(f"  {problem}")
    output.print(line("next: put ", bold(out), f" where {path} was, beside its adapters"))
