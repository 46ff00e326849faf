"""``attune parity``: the proof that a bundle computes what PyTorch computes, or the place where
it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import AnyBundle, Json, SourceModel
from toolchain.report.console import Stages, console, print_json


def parity(
    bundle: AnyBundle,
    rung: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this rung; may be given several times. Rungs: eager, captured, quantized, "
            "executorch, arm64, coreml, decisions."
        ),
    ] = None,
    source: SourceModel = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter inputs.")] = False,
    cpu: Annotated[
        str, typer.Option(help="The processor that QEMU emulates for the arm64 rung.")
    ] = "cortex-a76",
    html: Annotated[
        Path | None, typer.Option(help="Write a page with pictures to this file.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Show every check, not only each program's worst.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prove that a bundle computes what PyTorch computes, rung by rung.

    Exit code 1 where a rung fails: then the first layer and operator that differ are named.

    Example: [bold]attune parity out/tiny --html parity.html[/]
    """
    from runtime_py.loop.errors import BundleError
    from toolchain.verify.parity import ladder, parity_report

    with Stages(f"parity {bundle.resolve().name}", quiet=as_json) as stages:
        report = ladder.climb(
            bundle,
            rungs=tuple(rung or ()),
            source=source,
            quick=quick,
            cpu=cpu,
            progress=stages,
        )
    if html is not None:
        from toolchain.verify.parity.parity_page import write_page

        try:
            write_page(report, html)
        except OSError as error:
            raise BundleError(
                f"{html} cannot be written ({error.strerror}): choose another --html."
            ) from error
    if as_json:
        print_json(parity_report.as_json(report))
    else:
        parity_report.show(report, every)
        if html is not None:
            console.print(f"{html} has the details")
    if report.failed:
        raise typer.Exit(1)
