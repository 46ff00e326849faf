"""``attune study``: what is learned, of a whole plan of cells, with intervals and a report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from runtime_py.loop.errors import LoopError
from runtime_py.loop.files import write_bytes
from toolchain.cli.options import AndroidBundle, Json
from toolchain.report.console import (
    bold,
    console,
    counted_progress,
    line,
    output,
    print_json,
    styled,
)
from toolchain.report.tables import plain_table

if TYPE_CHECKING:
    from toolchain.study.cells import Cell, CellResult, StudyPlace
    from toolchain.study.study_run import Crew, Failure, Study
    from toolchain.study.study_tables import StudyTable
    from toolchain.study.summary import Summary

_Plan = Annotated[
    str,
    typer.Option(help="A plan that ships, such as quick, main or confirm, or your own .toml file."),
]
_Data = Annotated[Path | None, typer.Option(help="The folder that the datasets lie in.")]
_Out = Annotated[
    Path, typer.Option(help="The results: a new folder, or one to go on with, of the same study.")
]
_Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="That PyTorch computes on.")]
_Threads = Annotated[
    int, typer.Option(help="Of the engine in each worker; they decide the last bits.", min=1)
]
_Jobs = Annotated[
    int | None,
    typer.Option(help="Workers at once. Default: 1; with --ray, all there is room for.", min=1),
]
_Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Work on a Ray cluster: host:port, auto, or local."),
]
_Limit = Annotated[int | None, typer.Option(help="At most so many cells this time.", min=1)]
_Only = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="Only cells whose name, 'ROW @ STREAM #ORDERING', matches."),
]
_ReportOnly = Annotated[
    bool, typer.Option("--report-only", help="Measure nothing: report what --out has.")
]
_Markdown = Annotated[
    Path | None, typer.Option(help="Write tables to this file, and pictures beside it.")
]


def study(
    bundle: AndroidBundle,
    out: _Out,
    plan: _Plan = "main",
    data: _Data = None,
    device: _Device = "cpu",
    threads: _Threads = 1,
    jobs: _Jobs = None,
    ray: _Ray = None,
    limit: _Limit = None,
    only: _Only = None,
    report_only: _ReportOnly = False,
    as_json: Json = False,
    markdown: _Markdown = None,
) -> None:
    """Measure what is learned: rows against each other on the same orderings and dialogues.

    An interrupted study goes on where it was. Exit code 1 where a cell failed; the others are
    there, and running the command again tries it again.

    Example: [bold]attune study out/tiny --plan main --data ../shared/data --out out/study
    --jobs 2[/]
    """
    from toolchain.study.cells import StudyPlace
    from toolchain.study.plan import read_plan
    from toolchain.study.study_run import Crew, chosen, prepare, reopen

    failures: list[Failure] = []
    if report_only:
        opened = reopen(out)
    else:
        if data is None:
            raise LoopError("give the folder that the datasets lie in by --data.")
        place = StudyPlace(bundle.resolve(), data.resolve(), device, threads)
        opened = prepare(read_plan(plan), place, out)
        cells = chosen(opened, only, limit)
        if not as_json:
            _announce(opened, len(cells))
        failures = _measure(opened, cells, place, Crew(jobs, ray), as_json)
    _report(opened, out, as_json, markdown)
    if failures:
        _tell_failures(opened, failures)
        raise typer.Exit(1)


def _announce(opened: Study, count: int) -> None:
    there = len(opened.cells) - len(opened.missing)
    console.print(
        line(
            bold(opened.plan.name),
            f": {len(opened.cells):,} cells, {there:,} there, {count:,} to be measured now",
        )
    )
    for path in opened.damaged:
        console.print(line(styled("yellow", "damaged, measured anew:"), f" {path}"), soft_wrap=True)


def _measure(
    opened: Study, cells: list[Cell], place: StudyPlace, crew: Crew, quiet: bool
) -> list[Failure]:
    from toolchain.study.cell import run_cell
    from toolchain.study.study_run import run
    from toolchain.study.world import open_world

    with counted_progress(quiet) as bar:
        task = bar.add_task(opened.plan.name, total=len(cells))
        show = _lines(opened, len(cells), quiet or console.is_terminal)

        def told(outcome: CellResult | Failure) -> None:
            bar.advance(task)
            show(outcome)

        return run(opened, cells, crew, place, open_world, run_cell, told)


def _lines(opened: Study, total: int, quiet: bool) -> Callable[[CellResult | Failure], None]:
    """One line a cell, for a log: where there is no terminal, there is no bar."""
    from toolchain.study.study_run import name_of

    names = {one.cell: name_of(one) for one in opened.planned}
    began, done = time.monotonic(), 0

    def show(outcome: CellResult | Failure) -> None:
        nonlocal done
        done += 1
        if quiet:
            return
        left = (time.monotonic() - began) / done * (total - done)
        console.print(
            f"{done}/{total}  {names[outcome.cell]}  {left / 60:.0f} min left",
            soft_wrap=True,
        )

    return show


def _report(opened: Study, out: Path, as_json: bool, markdown: Path | None) -> None:
    from toolchain.study.page import write_page
    from toolchain.study.study_markdown import write_markdown
    from toolchain.study.summary import summarize

    summary = summarize(opened)
    write_page(out / "report.html", summary)
    write_bytes(out / "report.json", json.dumps(summary.as_json(), indent=1).encode())
    if markdown is not None:
        write_markdown(markdown, summary)
    if as_json:
        print_json(summary.as_json())
        return
    _show(summary)
    output.print(line("next: open ", bold(out / "report.html")), soft_wrap=True)


def _show(summary: Summary) -> None:
    from toolchain.study.study_tables import contrast_table, tables

    for one in (*tables(summary), contrast_table(summary)):
        if one.rows:
            output.print(line("\n", bold(one.title)))
            _print_table(one)
    minutes = summary.study.folder.seconds(summary.study.done) / 60
    output.print(f"\n{len(summary.study.done):,} cells in {minutes:,.1f} minutes of all workers")
    if summary.missing:
        output.print(f"{summary.missing:,} of {summary.cells:,} cells are missing")


def _print_table(one: StudyTable) -> None:
    """Without what a terminal has no room for."""
    narrow = {"ROUGE-L", "dialogues", "difference"}
    hidden = {place for place, head in enumerate(one.heads) if head in narrow}
    if "ROUGE-L" in one.heads:
        hidden.add(one.heads.index("ROUGE-L") + 1)  # its change
    shown = [place for place in range(len(one.heads)) if place not in hidden]
    heads = [one.heads[place] for place in shown]
    table = plain_table(heads, texts=(heads[0], "streams", "score"), whole=("orderings", heads[0]))
    for row in one.rows:
        table.add_row(*(str(row[place].content) for place in shown))
    output.print(table)


def _tell_failures(opened: Study, failures: list[Failure]) -> None:
    from toolchain.study.study_run import name_of

    names = {one.cell: name_of(one) for one in opened.planned}
    for failure in failures:
        console.print(
            line(styled("bold red", "failed:"), f" {names[failure.cell]}: {failure.sentence}"),
            soft_wrap=True,
        )
    console.print(
        f"{len(failures)} of the cells failed; why stands in {opened.folder.path}"
        f"/failed. Run the command again to try them again.",
        soft_wrap=True,
    )
