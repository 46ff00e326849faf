"""The command line. A user's mistake is one sentence on stderr and exit code 2."""

from __future__ import annotations

import sys

import typer

import toolchain.report.quiet  # noqa: F401  (before the heavy imports)
from exporters.errors import ExportError
from runtime_py.loop.errors import AdapterError, BundleError, LoopError, TrainingError
from toolchain.cli import (
    adapter,
    bench,
    chat,
    data,
    demo,
    doctor,
    evaluate,
    export,
    fleet,
    inspect,
    parity,
    simulate,
    store,
    stream,
    study,
    train,
    tune,
)
from toolchain.report.console import print_error

MISTAKES = (ExportError, AdapterError, BundleError, LoopError, TrainingError)

app = typer.Typer(
    name="attune",
    help="Compile a language model and its LoRA adapter into artifacts that learn on the phone.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("export")(export.export)
app.command("inspect")(inspect.inspect)
app.command("chat")(chat.chat)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("parity")(parity.parity)
app.command("simulate")(simulate.simulate)
app.command("stream")(stream.stream)
app.command("study")(study.study)
app.command("fleet")(fleet.fleet)
app.command("tune")(tune.tune)
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)
app.add_typer(adapter.app, name="adapter")
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")
app.add_typer(store.app, name="store")


def run(arguments: list[str] | None = None) -> None:
    """Runs one command; ``arguments`` are the process's own by default."""
    try:
        app(arguments)
    except MISTAKES as error:
        print_error(error)
        sys.exit(2)


def main() -> None:
    run()
