"""``attune demo``: the built-in model from a checkpoint to a reply, in one command."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from runtime_py.manifest import open_bundle
from toolchain.console import Stages, console, print_json

PROMPT = "I am looking for a restaurant in San Jose."


def demo(
    out: Annotated[
        Path | None, typer.Option(help="Keep the bundle here; else it is made and removed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Export the built-in model for both targets, check the bundle, and let it answer.

    Example: [bold]attune demo --out out/tiny[/]
    """
    from toolchain.commands.chat import StockRunner
    from toolchain.commands.export import summary
    from toolchain.export import Request, export, peak_memory

    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attune-demo-") as folder:
        bundle = out or Path(folder) / "tiny"
        with Stages("export tiny", quiet=as_json) as stages:
            manifest = export(Request("tiny", bundle, ("android", "ios")), stages)
            stages("check every file of the bundle")
            open_bundle(bundle)
        exported = time.monotonic() - start
        runner = StockRunner(bundle, manifest)
        reply, statistics = runner.generate(
            runner.render([{"role": "user", "content": PROMPT}]), count=40, temperature=0.0
        )
        if as_json:
            size = sum(f.bytes for f in manifest.files)
            print_json(
                {
                    "bundle_bytes": size,
                    "export_seconds": exported,
                    "stages": stages.seconds,
                    "prompt": PROMPT,
                    "reply": reply,
                    "stats": statistics,
                    "seconds": time.monotonic() - start,
                }
            )
            return
        summary(manifest, bundle, exported, peak_memory())
        console.print(f"\n[bold]user[/]       {PROMPT}\n[bold]assistant[/]  {reply.strip()}")
        console.print("[dim]— lm.pte in ExecuTorch's stock LLM runner, greedy[/]\n")
    console.print("What to try next:")
    kept = out or "out/tiny"
    lines = [
        (f"attune export tiny --out {kept}", "keep the bundle") if out is None else None,
        (f"attune chat {kept}", "talk to it"),
        (f"attune inspect {kept}", "programs, sizes, hashes"),
        ("attune export YOUR-MODEL --out out/mine", "a hub id, a folder or a .gguf file"),
    ]
    for line in lines:
        if line:
            console.print(f"  [bold]{line[0]}[/]  [dim]{line[1]}[/]")
