"""``attune inspect``: what a bundle holds, after every file was checked against its hash."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from runtime_py.bundle.bundle import open_bundle
from runtime_py.bundle.manifest import Manifest, PlatformTarget, Tensor
from toolchain.cli.options import AnyBundle, Json
from toolchain.defaults import LOWEST_YIELD
from toolchain.report.console import bold, dim, line, megabytes, output, print_json


def inspect(
    bundle: AnyBundle,
    as_json: Json = False,
) -> None:
    """Show a bundle's programs, signatures, sizes, delegation, adapter and hashes.

    Example: [bold]attune inspect out/tiny[/]
    """
    manifest = open_bundle(bundle).manifest
    if as_json:
        print_json(describe(manifest))
    else:
        _show(bundle, manifest)


def describe(manifest: Manifest) -> dict:
    """The manifest as one object, with the programs of both targets in one list."""
    value = manifest.model_dump(mode="json")
    value["programs"] = [
        {"target": name} | program
        for name in ("android", "ios")
        if value[name]
        for program in value[name]["programs"]
    ]
    value["bytes"] = sum(file.bytes for file in manifest.files)
    return value


def paraphrases(manifest: Manifest) -> str:
    """The form of paraphrases that was chosen, what each gave, and whether it is used."""
    synthesis = manifest.policy.synthesis
    if synthesis is None or not synthesis.measured:
        if manifest.android is not None:
            return "as the policy file has them, not tried"
        return "not tried, for there is no Android program that runs here"
    rows = [f"{row.form} {row.usable} of {row.tried}" for row in synthesis.measured]
    best = max(row.usable / row.tried for row in synthesis.measured)
    if manifest.policy.loop["paraphrases"]:
        verdict = f"the form {synthesis.form}"
    elif best < LOWEST_YIELD:
        verdict = f"off, for no form gave {LOWEST_YIELD:.0%}"
    else:
        verdict = f"off, as the policy says; with them on, the form {synthesis.form}"
    return f"{verdict} (usable pairs: {', '.join(rows)})"


def _tensors(tensors: tuple[Tensor, ...]) -> str:
    lines = [f"{t.name} {list(t.shape)} {t.dtype}".replace("'", "") for t in tensors]
    if len(lines) > 4:
        lines = [*lines[:3], f"… and {len(lines) - 3} more"]
    return "\n".join(lines)


def _show(bundle: Path, manifest: Manifest) -> None:
    model = manifest.model
    output.print(
        line(
            bold(bundle),
            f"  {model.name}: {model.architecture}, {model.layers} layers, "
            f"{model.parameters / 1e6:.1f} M parameters, context {model.context}",
        )
    )
    output.print(f"source   {model.source}", soft_wrap=True)
    adapter = manifest.adapter
    output.print(
        f"adapter  LoRA r {adapter.rank}, α {adapter.alpha:g} on {', '.join(adapter.targets)}: "
        f"{adapter.peft} (PEFT)" + (f", {adapter.runtime} (runtime)" if adapter.runtime else "")
    )
    output.print(f"paraphrases: {paraphrases(manifest)}")
    for name, target in (("android", manifest.android), ("ios", manifest.ios)):
        if target is not None:
            _show_target(name, target)
    table = Table("file", "size", "SHA-256", box=None, pad_edge=False)
    for file in manifest.files:
        table.add_row(file.path, megabytes(file.bytes), file.sha256[:16] + "…")
    output.print(table)
    total = sum(file.bytes for file in manifest.files)
    output.print(f"{len(manifest.files)} files, {megabytes(total)}, all as exported")


def _show_target(name: str, target: PlatformTarget) -> None:
    chosen = "chosen by perplexity" if target.chosen_by == "perplexity" else "as asked"
    output.print(line("\n", bold(name), f"  {target.quantize} ({chosen})"))
    if target.measured:
        table = Table("precision", "perplexity", "× fp32", box=None, pad_edge=False)
        for row in target.measured:
            table.add_row(row.quantize, f"{row.perplexity:.2f}", f"{row.ratio_to_fp32:.3f}")
        output.print(table)
    table = Table("program", "inputs", "outputs", "delegated", box=None, pad_edge=False)
    for program in target.programs:
        fraction = program.delegated_flops_fraction
        share = "" if fraction is None else f"{fraction:.1%} of FLOPs\n{program.delegates} parts"
        rest = "".join(f"\nnot: {op}" for op in program.not_delegated)
        table.add_row(
            line(f"{program.name}\n", dim(program.file)),
            _tensors(program.inputs) + (f"\n+ {len(program.states)} states" * bool(program.states)),
            _tensors(program.outputs),
            share + rest,
        )
    output.print(table)
