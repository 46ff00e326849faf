"""``attune evaluate``: perplexity of a bundle's program beside PyTorch with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from runtime_py.bundle.bundle import open_bundle
from runtime_py.loop.errors import BundleError
from runtime_py.loop.stream import read_dialogues
from toolchain.cli.options import AndroidBundle, Dialogues, Json, SourceModel
from toolchain.report.console import bold, counted_progress, line, output, print_json, styled

if TYPE_CHECKING:  # PyTorch is loaded only once the command runs
    from toolchain.verify.evaluation import Evaluation


def evaluate(
    bundle: AndroidBundle,
    data: Dialogues,
    dialogues: Annotated[int, typer.Option(help="The first so many of them.", min=1)] = 200,
    longest: Annotated[int, typer.Option(help="Tokens of a dialogue at most.", min=8)] = 512,
    source: SourceModel = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of both engines. Default: all cores.", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the Android program with PyTorch on dialogues: perplexity, tokens, logits.

    Exit code 1 where their perplexities differ by more than 1 %.

    Example: [bold]attune evaluate out/tiny --data dialogues.jsonl --dialogues 20[/]
    """
    from toolchain.bench.machine import usable_cores
    from toolchain.compile.source import find_source
    from toolchain.verify import evaluation

    opened = open_bundle(bundle)
    opened.android  # noqa: B018 - a bundle without one is told now
    chosen = read_dialogues(data, dialogues)
    original = find_source(opened.manifest, source)
    if isinstance(original, str):
        raise BundleError(f"{bundle} cannot be compared with PyTorch: {original}.")
    texts = evaluation.texts_of(opened, chosen, longest)
    with counted_progress(as_json) as bar:
        task = bar.add_task("", total=1)

        def stage(name: str, tokens: int) -> None:
            bar.reset(task, total=tokens or 1, description=name)

        result = evaluation.evaluate(
            opened,
            original,
            texts,
            threads=threads or usable_cores(),
            stage=stage,
            progress=lambda tokens: bar.advance(task, tokens),
        )
    if as_json:
        print_json({"bundle": str(bundle), "data": str(data)} | result.as_json())
    else:
        _show(bundle, result)
    if not result.passed:
        raise typer.Exit(1)


def _show(bundle: Path, result: Evaluation) -> None:
    output.print(
        line(
            bold(bundle),
            f" ({result.quantize}) on {result.dialogues} dialogues, {result.tokens:,} predicted "
            f"tokens",
        )
    )
    table = Table("", "perplexity", "", box=None, pad_edge=False)
    table.add_row(
        "ExecuTorch, lm.pte", f"{result.executorch:.4f}", f"{result.ratio - 1:+.3%} of PyTorch's"
    )
    table.add_row("PyTorch, the same weights", f"{result.pytorch:.4f}", "")
    change = result.pytorch / result.float32 - 1
    table.add_row("PyTorch, float32", f"{result.float32:.4f}", f"quantization costs {change:+.2%}")
    output.print(table)
    output.print(f"the same greedy token at {result.same_token:.2%} of positions")
    table = Table("logits of the first dialogue", box=None, pad_edge=False)
    for heading in ("largest difference", "rms difference", "same token"):
        table.add_column(heading, justify="right")
    for name, row in (
        ("ExecuTorch against PyTorch", result.first),
        ("noise floor: PyTorch, embeddings ± 1e-7", result.floor),
    ):
        table.add_row(name, f"{row.largest:.2e}", f"{row.rms:.2e}", f"{row.same_token:.1%}")
    output.print(table)
    near, far = styled("green", "within 1 %"), styled("bold red", "more than 1 % apart")
    output.print(line("perplexity of program and PyTorch: ", near if result.passed else far))
