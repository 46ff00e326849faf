"""The options and arguments that several commands share, each declared once.

Defaults stand in ``toolchain.defaults``; a command without its own words for an option takes it
from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runtime_py.loop.errors import LoopError

AndroidBundle = Annotated[Path, typer.Argument(help="A bundle with an Android part.")]
AnyBundle = Annotated[Path, typer.Argument(help="A bundle that attune export wrote.")]
AdapterPath = Annotated[Path, typer.Argument(help="A PEFT folder or a .ptd file.")]
Dialogues = Annotated[
    Path, typer.Option(help="Dialogues: .jsonl or .jsonl.gz with id and turns in each row.")
]
SourceModel = Annotated[
    str | None, typer.Option(help="The model it was made from: folder, .gguf or hub id.")
]
Threads = Annotated[int | None, typer.Option(help="Default: all cores.", min=1)]
KeepMb = Annotated[float, typer.Option(help="Budget of --memory high, in MB.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Datasets = Annotated[Path, typer.Option(help="The folder that the datasets lie in.")]
Computes = Annotated[str, typer.Option(help="What computes: cpu or cuda.")]
WorkerThreads = Annotated[int, typer.Option(help="Of each worker.", min=1)]
Jobs = Annotated[int | None, typer.Option(help="Workers at once. Default: 1.", min=1)]
RayAddress = Annotated[str | None, typer.Option(help="A Ray cluster: host:port, auto, or local.")]


def names_of(option: str, value: str | None) -> tuple[str, ...] | None:
    """The names of a list by comma; None where the option is not given. Raises ``LoopError`` for a
    list of nothing, which could be taken for the default."""
    if value is None:
        return None
    names = tuple(part.strip() for part in value.split(",") if part.strip())
    if not names:
        raise LoopError(f"{option} {value!r} names nothing: give names by comma, or leave it out.")
    return names
