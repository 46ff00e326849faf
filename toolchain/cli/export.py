"""``attune export``: a checkpoint and an adapter into a bundle."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from exporters.errors import ExportError
from exporters.model.names import model_name
from runtime_py.bundle.manifest import Manifest, Policy
from toolchain.cli.inspect import describe, paraphrases
from toolchain.cli.options import Json, names_of
from toolchain.defaults import BUILTIN, PRECISIONS, TARGETS, TRAIN_LENGTHS, TRAIN_WEIGHTS
from toolchain.report.console import Stages, bold, console, line, megabytes, print_json

_FRESH = Policy()
_LENGTHS = ",".join(map(str, TRAIN_LENGTHS))


def _known(targets: Sequence[str]) -> str:
    """The precisions of some targets, for a person."""
    return "; ".join(f"{target}: {', '.join(PRECISIONS[target])}" for target in targets)


def _precisions(values: Sequence[str], targets: Sequence[str]) -> dict[str, str]:
    """``8da4w`` goes to the target that knows it; ``ios=none`` names its target."""
    chosen: dict[str, str] = {}
    for value in values:
        target, _, precision = value.rpartition("=")
        fitting = [t for t in targets if precision in PRECISIONS[t] and target in ("", t)]
        if not fitting:
            raise ExportError(
                f"--quantize {value} fits no target of this export; known: {_known(targets)}."
            )
        chosen |= dict.fromkeys(fitting, precision)
    return chosen


def _lengths(value: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise ExportError(
            f"--train-lengths {value!r} is not a list of numbers: give such as 256,512."
        )
    return tuple(map(int, parts))


_Model = Annotated[
    str,
    typer.Argument(help=f"[bold]{BUILTIN}[/] (built in), a hub id, a folder, or a .gguf file."),
]
_Out = Annotated[Path, typer.Option(help="The bundle to write: a new folder.")]
_Target = Annotated[
    list[str] | None,
    typer.Option(help=f"{' or '.join(TARGETS)}; may be given twice. Default: both."),
]
_Adapter = Annotated[
    Path | None, typer.Option(help="A PEFT LoRA folder; without it a fresh adapter.")
]
_Context = Annotated[
    int | None, typer.Option(help="Tokens of context (default: the model's, at most 2048).")
]
_Quantize = Annotated[
    list[str] | None,
    typer.Option(
        help=f"{_known(TARGETS)}; TARGET=… where both know it. Default: the smallest whose "
        "perplexity stays within 3 % of float32."
    ),
]
_LoraRank = Annotated[
    int | None, typer.Option(help=f"Rank of a fresh adapter ({_FRESH.lora_rank}).")
]
_LoraAlpha = Annotated[float | None, typer.Option(help=f"Its α ({_FRESH.lora_alpha:g}).")]
_LoraTargets = Annotated[
    str | None, typer.Option(help=f"Its modules, by comma ({','.join(_FRESH.lora_targets)}).")
]
_ChatTemplate = Annotated[
    Path | None, typer.Option(help="A Jinja file in place of the model's own.")
]
_TrainWeights = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(TRAIN_WEIGHTS[:-1])} or {TRAIN_WEIGHTS[-1]}: the base weights of "
        "training. Default: those that lm has."
    ),
]
_TrainLengths = Annotated[str, typer.Option(help="Tokens of the training programs, by comma.")]
_Policy = Annotated[
    Path | None,
    typer.Option(
        help="JSON with fields of the loop's policy, and lora_rank, lora_alpha, lora_targets."
    ),
]
_Force = Annotated[bool, typer.Option(help="Replace an existing bundle.")]


def export(
    model: _Model,
    out: _Out,
    target: _Target = None,
    adapter: _Adapter = None,
    context: _Context = None,
    quantize: _Quantize = None,
    lora_rank: _LoraRank = None,
    lora_alpha: _LoraAlpha = None,
    lora_targets: _LoraTargets = None,
    chat_template: _ChatTemplate = None,
    train_weights: _TrainWeights = None,
    train_lengths: _TrainLengths = _LENGTHS,
    policy: _Policy = None,
    force: _Force = False,
    as_json: Json = False,
) -> None:
    """Compile a model and its LoRA adapter into one bundle for Android and iOS.

    Example: [bold]attune export tiny --out out/tiny[/]
    """
    from toolchain.compile import bundle_export

    targets = tuple(dict.fromkeys(target or TARGETS))
    start = time.monotonic()
    with Stages(f"export {model_name(Path(model))}", quiet=as_json) as stages:
        manifest = bundle_export.export(
            model,
            out,
            targets=targets,
            adapter=adapter,
            context=context,
            quantize=_precisions(quantize or [], [t for t in targets if t in TARGETS]),
            rank=lora_rank,
            alpha=lora_alpha,
            modules=names_of("--lora-targets", lora_targets),
            chat_template=chat_template,
            train_weights=train_weights,
            train_lengths=_lengths(train_lengths),
            policy=policy,
            force=force,
            progress=stages,
        )
    seconds, peak = time.monotonic() - start, peak_memory()
    if as_json:
        extra = {"seconds": seconds, "stages": stages.seconds, "peak_memory_bytes": peak}
        print_json(describe(manifest) | {"bundle": str(out)} | extra)
    else:
        summary(manifest, out, seconds, peak)
        talk = (", ", bold(f"attune chat {out}")) if manifest.android else ()
        console.print(line("next: ", bold(f"attune inspect {out}"), *talk))


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
    console.print(f"paraphrases: {paraphrases(manifest)}")
    console.print(
        line(
            bold(out),
            f"  {megabytes(sum(f.bytes for f in manifest.files))} in "
            f"{len(manifest.files)} files, {seconds:.0f} s, peak memory {megabytes(peak)}",
        )
    )
