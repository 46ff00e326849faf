"""``attune data``: what people have as attune's own files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from toolchain.cli.options import Json
from toolchain.report.console import (
    bold,
    console,
    counted_progress,
    line,
    megabytes,
    output,
    print_json,
)
from toolchain.report.tables import plain_table

if TYPE_CHECKING:
    from toolchain.streams.convert import Conversion

app = typer.Typer(help="Convert files of chats.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``convert`` a command of its own while it is the only one."""


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="JSON lines, a JSON array, CSV or TSV; plain or gzip."),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The stream to write: .jsonl or .jsonl.gz.")
    ],
    form: Annotated[
        Literal["auto", "attune", "sharegpt", "messages", "alpaca", "pairs", "table"],
        typer.Option("--from", help="The format of IN; auto finds it, and says which it is."),
    ] = "auto",
    user_name: Annotated[
        list[str] | None, typer.Option(help="A name of the user in IN; may be given several times.")
    ] = None,
    assistant_name: Annotated[
        list[str] | None,
        typer.Option(help="A name of the assistant in IN; may be given several times."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Convert chats of other formats to a stream of dialogues, and say what was left out and why.

    ShareGPT, OpenAI messages, Alpaca, prompts with responses, and tables with a message a row.

    Example: [bold]attune data convert chats.json dialogues.jsonl[/]
    """
    from toolchain.streams import convert as conversion
    from toolchain.streams.convert_formats import Speakers

    size = source.stat().st_size if source.is_file() else 0
    with counted_progress(as_json) as bar:
        task = bar.add_task("MB read", total=size / 1e6)
        result = conversion.convert(
            source,
            out,
            form=form,
            force=force,
            speakers=Speakers(frozenset(user_name or ()), frozenset(assistant_name or ())),
            told=lambda done: bar.update(task, completed=done / 1e6),
        )
    if as_json:
        told = {"in": str(source), "out": str(out), **result.as_json()}
        print_json({**told, "bytes": out.stat().st_size})
    else:
        _show(source, out, result)


def _show(source: Path, out: Path, result: Conversion) -> None:
    from toolchain.streams.convert_formats import FORMATS

    what = f": {result.format} ({FORMATS[result.format].what}), {result.container}"
    output.print(line(bold(source), what), soft_wrap=True)
    size = megabytes(out.stat().st_size)
    written = f"written {result.written:,} ({result.turns:,} turns, {size})"
    output.print(f"read {result.read:,}, {written}")
    if result.dropped:
        table = plain_table(("dropped, because", "how many", "the first"), texts=_TEXTS)
        for reason, one in result.dropped.items():
            table.add_row(reason, f"{one.count:,}", one.first)
        output.print(table)
    if result.changed:
        table = plain_table(("left out or changed in what is written", "how many"), texts=_TEXTS)
        for what, count in result.changed.items():
            table.add_row(what, f"{count:,}")
        output.print(table)
    console.print(line("next: ", bold(f"attune train BUNDLE --data {out}")), soft_wrap=True)


_TEXTS = ("dropped, because", "the first", "left out or changed in what is written")
