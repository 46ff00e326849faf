"""``attune stream``: a stream of dialogues by a recipe, and the tests outside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from runtime_py.loop.errors import LoopError
from toolchain.cli.options import Json
from toolchain.report.console import bold, console, line, output, print_json
from toolchain.report.tables import plain_table

if TYPE_CHECKING:
    from toolchain.streams.made import StreamDialogue
    from toolchain.streams.stream_recipe import Recipe

_ENDINGS = (".jsonl", ".jsonl.gz")


def stream(
    data: Annotated[Path, typer.Option(help="The folder that the datasets lie in.")],
    out: Annotated[Path, typer.Option(help="The stream to write: .jsonl or .jsonl.gz.")],
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="readme, mixed, drift, development, or the name of a single dataset.",
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe of your own: a .toml file.")] = None,
    test: Annotated[
        Path | None, typer.Option(help="Write the dialogues for tests here, none of the stream's.")
    ] = None,
    observed: Annotated[
        int | None,
        typer.Option(help="So many dialogues in all. Default: the recipe's, or 800.", min=1),
    ] = None,
    tests: Annotated[
        int | None, typer.Option(help="So many tests in all. Default: the recipe's, or 200.", min=0)
    ] = None,
    rows: Annotated[
        Literal["all", "development", "judging"] | None,
        typer.Option(
            help="Of the datasets: a third is for development, the rest for judging. Default: the "
            "recipe's, or judging."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: the recipe's.", min=0)] = None,
    as_json: Json = False,
) -> None:
    """Make a stream of dialogues from datasets: which, how many, in what order, with what junk.

    The same recipe and seed give the same bytes. The tests are the same for every seed.

    Example: [bold]attune stream dolly --observed 800 --seed 3 --data ../shared/data
    --out dolly.jsonl --test unseen.jsonl[/]
    """
    from toolchain.streams.made import make_stream, write_lines

    _check_outputs(out, test)
    chosen = _recipe(name, recipe, data)
    if rows is not None:
        chosen = chosen.model_copy(update={"rows": rows})
    chosen = chosen.scaled(observed, tests)
    made = make_stream(chosen, data, seed)
    if test is not None:
        write_lines(test, made.tests)
    write_lines(out, made.stream)
    used = chosen.seed if seed is None else seed
    if as_json:
        parts = {"stream": _counts(made.stream), "tests": _counts(made.tests)}
        print_json({"title": chosen.title, "seed": used, "out": str(out), **parts})
        return
    _print(chosen.title, used, made.stream, made.tests)
    console.print(line("next: ", bold(f"attune simulate BUNDLE --stream {out}")), soft_wrap=True)


def _check_outputs(out: Path, test: Path | None) -> None:
    for option, path in (("--out", out), ("--test", test)):
        if path is not None and not path.name.endswith(_ENDINGS):
            raise LoopError(f"{option} {path} is no name for a stream: end it in .jsonl[.gz].")
    if test is not None and test.resolve() == out.resolve():
        raise LoopError(f"--out and --test are both {out}: give two files.")


def _recipe(name: str | None, file: Path | None, data: Path) -> Recipe:
    from toolchain.streams.stream_recipe import find_recipe, read_recipe, recipe_names

    if (name is None) == (file is None):
        raise LoopError(
            f"give either a recipe's name ({', '.join(recipe_names())}, or a single dataset) or "
            f"--recipe FILE."
        )
    if name is not None:
        return find_recipe(name, data)
    return read_recipe(file or Path())


def _counts(dialogues: Sequence[StreamDialogue]) -> dict[str, int]:
    return dict(Counter(one.dataset for one in dialogues))


def _print(
    title: str, seed: int, made: Sequence[StreamDialogue], tests: Sequence[StreamDialogue]
) -> None:
    observed, unseen = _counts(made), _counts(tests)
    table = plain_table(("dataset", "observed", "tests"), texts=["dataset"])
    for name in dict.fromkeys((*observed, *unseen)):
        table.add_row(name, f"{observed.get(name, 0):,}", f"{unseen.get(name, 0):,}")
    table.add_row("in all", f"{len(made):,}", f"{len(tests):,}")
    output.print(f"{title}, seed {seed}")
    output.print(table)
