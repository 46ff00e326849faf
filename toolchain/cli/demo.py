"""``attune demo``: the built-in model, from a checkpoint to a phone that has learned."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from runtime_py.bundle.bundle import open_bundle
from runtime_py.loop.dialogue import Turn
from toolchain.cli.options import Json
from toolchain.defaults import BUILTIN, TRAIN_LENGTHS
from toolchain.report.console import Stages, bold, console, dim, line, print_json

if TYPE_CHECKING:
    from toolchain.simulate.short_life import ShortLoop
    from toolchain.verify.parity.verdict import Report

PROMPT = "I am looking for a restaurant in San Jose."


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Keep the bundle here; else it is made and removed.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Export the built-in model for both targets, prove it, and let it learn on a short stream.

    Example: [bold]attune demo --out out/tiny[/]
    """
    from runtime_py.engine.stock_runner import StockRunner
    from toolchain.cli.export import peak_memory, summary
    from toolchain.compile import bundle_export
    from toolchain.simulate.short_life import run_short_loop
    from toolchain.verify.parity import ladder, parity_report

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attune-demo-") as folder:
        bundle = out or Path(folder) / "tiny"
        with Stages("demo", quiet=as_json) as stages:
            # The shortest sequences are enough for the stream that it learns from.
            shortest = TRAIN_LENGTHS[:1]
            bundle_export.export(BUILTIN, bundle, train_lengths=shortest, progress=stages)
            stages("check every file of the bundle")
            opened = open_bundle(bundle)
            exported = time.monotonic() - start
            stages("generate a reply")
            runner = StockRunner(opened)
            rendered = runner.text.for_runner([Turn("user", PROMPT)])
            reply, statistics = runner.generate(rendered, count=40, temperature=0.0)
            proof = ladder.climb(bundle, quick=True, progress=stages)
            stages("the loop: observe, ask, fine-tune")
            loop = run_short_loop(opened, Path(folder) / "loop")
        if as_json:
            print_json(
                {
                    "bundle_bytes": sum(f.bytes for f in opened.manifest.files),
                    "export_seconds": exported,
                    "stages": stages.seconds,
                    "prompt": PROMPT,
                    "reply": reply,
                    "stats": statistics,
                    "parity": parity_report.as_json(proof),
                    "loop": asdict(loop),
                    "seconds": time.monotonic() - start,
                }
            )
            return
        summary(opened.manifest, bundle, exported, peak_memory())
        said = ("\n", bold("user"), f"       {PROMPT}\n", bold("assistant"), f"  {reply.strip()}")
        console.print(line(*said))
        console.print(dim("— lm.pte in ExecuTorch's stock LLM runner, greedy"))
        _show_proof(proof)
        _show_loop(loop)
    _show_next(out)


def _show_proof(proof: Report) -> None:
    console.print(line("\n", bold("parity"), ", each rung against the one before it:"))
    for rung in proof.rungs:
        reason = dim(f"  {rung.reason}" if rung.reason else "")
        console.print(line(f"  {rung.rung:<11} {rung.status}", reason), soft_wrap=True)


def _show_loop(loop: ShortLoop) -> None:
    console.print(
        line(
            "\n",
            bold("the loop"),
            f" on {loop.observed} dialogues that ship with attune: {loop.kept} kept, "
            f"{loop.answered} answered, {loop.steps} steps of fine-tuning with the phone's "
            f"programs",
        )
    )
    before, after = loop.heldout_loss_before, loop.heldout_loss_after
    if before is not None and after is not None:
        console.print(f"loss on answers that were held out: {before:.3f} → {after:.3f}")
    table = Table("prompt", "before", "after", box=None, pad_edge=False)
    for row in loop.replies:
        table.add_row(row.prompt, row.before.strip(), row.after.strip())
    console.print(table)


def _show_next(out: Path | None) -> None:
    console.print("\nWhat to try next:")
    kept = out or "out/tiny"
    lines = [
        (f"attune export tiny --out {kept}", "keep the bundle") if out is None else None,
        (f"attune chat {kept}", "talk to it"),
        (f"attune inspect {kept}", "programs, sizes, hashes"),
        (f"attune parity {kept} --html parity.html", "the whole proof, with pictures"),
        ("attune export YOUR-MODEL --out out/mine", "a hub id, a folder or a .gguf file"),
    ]
    for each in lines:
        if each:
            console.print(line("  ", bold(each[0]), "  ", dim(each[1])))
