"""``attune export``: a checkpoint and an adapter into a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from runtime_py.bundle.manifest import Manifest
from toolchain.cli.inspect import describe
from toolchain.report.console import Stages, console, megabytes, print_json


def _split(value: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if value else None


def _quantize(values: list[str], targets: tuple[str, ...]) -> dict[str, str | None]:
    """``8da4w`` goes to the target that knows it; ``ios=none`` names its target."""
    from exporters.errors import ExportError
    from toolchain.compile.precision import SCHEMES

    chosen: dict[str, str | None] = {}
    for value in values:
        target, _, scheme = value.rpartition("=")
        fitting = [t for t in targets if scheme in SCHEMES[t] and target in ("", t)]
        if not fitting:
            known = "; ".join(f"{t}: {', '.join(SCHEMES[t])}" for t in targets)
            raise ExportError(f"--quantize {value} fits no target of this export; known: {known}.")
        chosen |= dict.fromkeys(fitting, scheme)
    return chosen


def _lengths(value: str) -> tuple[int, ...]:
    from exporters.errors import ExportError

    parts = _split(value) or ()
    if not parts or not all(part.isdigit() for part in parts):
        raise ExportError(
            f"--train-lengths {value!r} is not a list of numbers: give such as 256,512."
        )
    return tuple(map(int, parts))


def export(
    model: Annotated[
        str, typer.Argument(help="[bold]tiny[/] (built in), a hub id, a folder, or a .gguf file.")
    ],
    out: Annotated[Path, typer.Option(help="The bundle to write: a new folder.")],
    target: Annotated[
        list[str] | None, typer.Option(help="android or ios; may be given twice. Default: both.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT LoRA folder; without it a fresh adapter.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of context (default: the model's, at most 2048).")
    ] = None,
    quantize: Annotated[
        list[str] | None,
        typer.Option(
            help="android: 8da8w, 8da4w, none; ios: int8, int4, fp16, none; TARGET=… where both "
            "know it. Default: the smallest whose perplexity stays within 3 % of float32."
        ),
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of a fresh adapter (8).")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Its α (16).")] = None,
    lora_targets: Annotated[
        str | None, typer.Option(help="Its modules, by comma (q_proj,k_proj,v_proj).")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file in place of the model's own.")
    ] = None,
    train_weights: Annotated[
        str | None,
        typer.Option(
            help="fp32, int8 or int4: the base weights of training. Default: those that lm has."
        ),
    ] = None,
    train_lengths: Annotated[
        str, typer.Option(help="Tokens of the training programs, by comma.")
    ] = "256",
    force: Annotated[bool, typer.Option(help="Replace an existing bundle.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compile a model and its LoRA adapter into one bundle for Android and iOS.

    Example: [bold]attune export tiny --out out/tiny[/]
    """
    from toolchain.compile.bundle_export import Request, peak_memory
    from toolchain.compile.bundle_export import export as run

    targets = tuple(dict.fromkeys(target or ["android", "ios"]))
    known = tuple(t for t in targets if t in ("android", "ios"))
    request = Request(
        model=model,
        out=out,
        targets=targets,
        adapter=adapter,
        context=context,
        quantize=_quantize(quantize or [], known),
        rank=lora_rank,
        alpha=lora_alpha,
        modules=_split(lora_targets),
        chat_template=chat_template,
        train_weights=train_weights,
        train_lengths=_lengths(train_lengths),
        force=force,
    )
    start = time.monotonic()
    with Stages(f"export {Path(model).name}", quiet=as_json) as stages:
        manifest = run(request, stages)
    seconds = time.monotonic() - start
    if as_json:
        extra = {"seconds": seconds, "stages": stages.seconds, "peak_memory_bytes": peak_memory()}
        print_json(describe(manifest) | {"bundle": str(out)} | extra)
    else:
        summary(manifest, out, seconds, peak_memory())
        talk = f", [bold]attune chat {out}[/]" if manifest.android else ""
        console.print(f"next: [bold]attune inspect {out}[/]{talk}")


def summary(manifest: Manifest, out: Path, seconds: float, peak: int) -> None:
    """The table after an export: precision, perplexity, sizes, time (s), memory (bytes)."""
    table = Table("target", "precision", "perplexity", "files", box=None, pad_edge=False)
    for name, target in (("android", manifest.android), ("ios", manifest.ios)):
        if target is None:
            continue
        rates = {row.quantize: row for row in target.measured}
        rate = rates[target.quantize]
        size = sum(f.bytes for f in manifest.files if f.path.startswith(f"{name}/"))
        table.add_row(
            name,
            target.quantize,
            f"{rate.perplexity:.2f} ({rate.ratio_to_fp32 - 1:+.1%} of float32)",
            megabytes(size),
        )
    console.print(table)
    console.print(
        f"[bold]{out}[/]  {megabytes(sum(f.bytes for f in manifest.files))} in "
        f"{len(manifest.files)} files, {seconds:.0f} s, peak memory {megabytes(peak)}"
    )
